"""What a process leaves of itself when it ends by an error or hangs: the stacks of its threads, in run_dir/logs/stacks."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from lens_megatron import workers
from lens_megatron.errors import UsageError

_WRITE_S = 2.0  # a run folder that does not answer must not keep the run from ending


def write(run_dir: Path, rank: int, lines: Sequence[str]) -> Path | None:
    """`lines`, then the stacks of all threads; to a temporary folder where the run folder does not answer."""
    written: list[Path] = []

    def write_into(folder: Path) -> None:
        with contextlib.suppress(OSError):  # a full disk, say
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank_{rank:05}.txt"
            with path.open("w") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            written.append(path)

    for folder in (run_dir / "logs" / "stacks", Path(tempfile.gettempdir()) / f"lens-megatron-stacks-{os.getuid()}"):
        thread = threading.Thread(target=write_into, args=(folder,), daemon=True)
        thread.start()
        thread.join(_WRITE_S)
        if written:
            return written[0]
    return None


def process_line(rank: int, ranks: int) -> str:
    return f"rank {rank} of {ranks}, process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}"


@contextlib.contextmanager
def of_errors(run_dir: Path, doing: str) -> Iterator[None]:
    """Before the ranks know each other and a watch does this. Bad input leaves nothing behind."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        rank, ranks = workers.rank(), int(os.environ.get("WORLD_SIZE", "1"))
        stack = "".join(traceback.format_exception(error))
        lines = [process_line(rank, ranks), f"reason: rank {rank} failed: {error}", f"doing: {doing}", stack]
        write(run_dir, rank, lines)
        raise
