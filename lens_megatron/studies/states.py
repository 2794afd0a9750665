"""What became of each cell: a small file beside the runs, so that a study can be taken up again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lens_megatron import strict
from lens_megatron.config import RunConfig
from lens_megatron.errors import RunError, UsageError
from lens_megatron.files import replace_text
from lens_megatron.resuming import differences, is_part
from lens_megatron.run_folder import RunFolder
from lens_megatron.studies.config import Cell, Study

# begun: under way, or left so by an interrupted study
State = Literal["waiting", "begun", "done", "failed", "simulated"]
_AFRESH = "choose another study_dir, or remove its folder and its file in states/"
# may change under a study: how long is waited, what is kept, where servers and judges are
_ROOM = ("parallel", "memory", "update.tokens_per_microbatch", "placement", "rollout.slots", "rollout.servers")
_NOT_THE_RESULTS = ("name", "timeout_s", "checkpoint", "tracking", "rollout.server", "rollout.stall_seconds",
                    "rewards.workers")  # fmt: skip


@dataclass(frozen=True)
class CellState:
    state: State = "waiting"
    reason: str = ""  # why it failed
    seconds: float | None = None  # of the last attempt, start to end
    overrides: tuple[str, ...] = ()


def state_path(study: Study, cell: Cell) -> Path:
    return study.folder / "states" / f"{cell.name}.json"


def read_state(study: Study, cell: Cell) -> CellState:
    path = state_path(study, cell)
    if not path.exists():
        return CellState()
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        state = CellState(**{**tree, "overrides": tuple(tree["overrides"])})
    except (ValueError, TypeError, KeyError):
        raise RunError(f"{path}: not a state that a study wrote; remove it to run the cell again") from None
    return state


def write_state(study: Study, cell: Cell, state: CellState) -> None:
    path = state_path(study, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(asdict(state), indent=1) + "\n")


def check_same_cells(study: Study, cells: Sequence[Cell]) -> None:
    """A cell that was run with other values is another cell: its results would stand under a false name. One that is not
    done may be given more room; what else changes, its run refuses or tells when it goes on."""
    for cell in cells:
        before = read_state(study, cell)
        if before.state == "waiting":
            continue
        if before.overrides != cell.overrides:
            raise UsageError(
                f"{study.folder}: cell {cell.name} was run with other values ({' '.join(before.overrides)}): {_AFRESH}"
            )
        told = differences(RunFolder(cell.run_dir), strict.to_tree(RunConfig, cell.config))
        may_change = _NOT_THE_RESULTS if before.state == "done" else (*_NOT_THE_RESULTS, *_ROOM)
        changed = [words for key, words in told.items() if not is_part(key, may_change)]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UsageError(
                f"{study.folder}: cell {cell.name} was run from another {study.run.name} ({changed[0]}{more}): {_AFRESH}"
            )


def to_do(study: Study) -> Sequence[Cell]:
    """Cells that are not done. Failed ones are tried again."""
    return [cell for cell in study.cells if read_state(study, cell).state not in ("done", "simulated")]
