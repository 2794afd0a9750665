"""Nothing hangs: what stops answering ends the run within its timeout and ten seconds, with stacks, and one line says who
waited for whom."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.loop.runs import Command, complaint, metrics, run_tree, started, write_run

pytestmark = [pytest.mark.long, pytest.mark.distributed]
TIMEOUT_S = 10.0


def stop_rank(rank: int) -> Callable[[Command, Path], None]:
    def stop(command: Command, run_dir: Path) -> None:
        command.member("lens_megatron.cli", RANK=str(rank)).send_signal(signal.SIGSTOP)

    return stop


STALLS: dict[
    str, tuple[Callable[[Command, Path], None], str, int]
] = {  # how, what the line says, ranks that leave stacks
    "rank 1 stopped": (stop_rank(1), "rank 0 waited for rank 1", 1),
}


def stall(name: str, task: Path, folder: Path) -> tuple[float, int, str, list[str]]:
    run_dir = folder / "run"
    run = str(write_run(folder, run_tree(task, run_dir, steps=100_000, timeout_s=TIMEOUT_S)))
    with started(folder, "train", run) as command:
        command.until(lambda: len(metrics(run_dir)) > 1, "two steps")
        command.look_around()
        began = time.monotonic()
        STALLS[name][0](command, run_dir)
        code = command.ends(60.0)
        took = time.monotonic() - began
        command.nobody_left()
    return took, code, command.words(), sorted(path.name for path in (run_dir / "logs" / "stacks").glob("*"))


@pytest.fixture(scope="module")
def stalls(
    task: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[tuple[float, int, str, list[str]]]]]:
    """Side by side: most of it is waiting."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(stall, name, task, tmp_path_factory.mktemp("stall")) for name in STALLS}


@pytest.mark.parametrize("name", STALLS)
def test_a_stall_ends_in_time_with_stacks(
    stalls: dict[str, Future[tuple[float, int, str, list[str]]]], name: str
) -> None:
    took, code, words, stacks = stalls[name].result()
    print(f"{name}: {took:.1f} s")
    assert code == 1, words
    assert STALLS[name][1] in complaint(words), words
    assert took < TIMEOUT_S + 10, (took, words)
    assert len(stacks) >= STALLS[name][2], (stacks, words)


def test_a_stack_says_where_and_what_for(tmp_path: Path, workers: Callable[[int], object]) -> None:
    [text] = workers(1).run(dumped, str(tmp_path))  # type: ignore[attr-defined]
    assert "doing: sit in a lock" in text
    assert "reason: rank 0 did not finish to sit in a lock within 0.3 s" in text
    assert "sits_here" in text


def dumped(run_dir: str) -> str:
    """Ends by _leave, which is caught here: the judge found the main thread in a lock."""
    from unittest.mock import patch

    from lens_megatron.mcore import watch

    left = threading.Event()

    def sits_here() -> None:
        assert left.wait(10.0)

    with patch.object(watch, "_leave", lambda code: left.set()):
        watcher = watch.Watch(Path(run_dir), 2.0)
        with watcher.doing("sit in a lock", 0.3):
            sits_here()
        watcher.close()
    return (Path(run_dir) / "logs" / "stacks" / "rank_00000.txt").read_text()
