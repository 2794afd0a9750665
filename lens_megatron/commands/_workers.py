"""How a command of several processes starts. Before this it says what a signal does to it (`endings.on_signals`)."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lens_megatron import cuda_environment, endings, workers
from lens_megatron.mcore.hf_files import check_folder
from lens_megatron.mcore.layout import ParallelConfig, check_layout
from lens_megatron.model_spec import ModelSpec, find_weights

if TYPE_CHECKING:
    from lens_megatron.config import RunConfig


def in_layout(
    command: Sequence[str],
    layout: ParallelConfig,
    spec: ModelSpec,
    work: Callable[[], int],
    *,
    model: str | None = None,
    run: RunConfig | None = None,
    noted_in: str | None = None,
    look: Callable[[], None] | None = None,
) -> int:
    """`work` in every process of the layout: in this one, if somebody (torchrun, srun) has started it as one of them or it
    is the only one, else in workers that run `command`. What cannot work is refused before there are any.

    `model`: one whose files nobody has looked at yet. `run`: of a command that syncs weights. `noted_in`: the run folder
    where an end is noted that the workers were not left time to note. `look`: refuses in a moment what else the workers
    would refuse, who take many seconds to start."""
    cuda_environment.prepare(layout, run)
    if not workers.is_worker():
        if look is not None:
            look()
        check_layout(spec, layout, layout.processes)
        if model is not None:
            check_folder(find_weights(model), spec)
        if layout.processes > 1:

            def started() -> int:
                return workers.run_workers(layout.processes, command)

            return started() if noted_in is None else endings.noted_workers(noted_in, started)
    if workers.is_worker():  # NCCL ends a process that waits too long by SIGABRT: it shall say where it stood
        faulthandler.enable(sys.__stderr__ or sys.stderr)
    with endings.lost_peers():
        return work()
