"""Nothing hangs: what stops answering ends the run within its timeout and ten seconds, with stacks, and one line says who
waited for whom."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from lens_megatron.errors import RunError
from tests.faults.fault_rewards import SPIN_FILE
from tests.loop.runs import Command, complaint, metrics, run_tree, started, write_run
from tests.rollout.test_sglang_client import stub_server

pytestmark = pytest.mark.long
TIMEOUT_S = 10.0
Plant = Callable[[Command, Path], None]


@dataclass(frozen=True)
class Stall:
    plant: Plant
    words: str  # in the line that ends the run
    stacks: int  # ranks that leave theirs; a stopped process cannot
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class End:
    took: float
    code: int
    words: str
    stacks: list[str]


def stop_rank(rank: int) -> Plant:
    return lambda command, run_dir: command.member("lens_megatron.cli", RANK=str(rank)).send_signal(signal.SIGSTOP)


def stop_rollout_process(command: Command, run_dir: Path) -> None:
    command.member("spawn_main", RANK="0").send_signal(signal.SIGSTOP)


def stop_server(command: Command, run_dir: Path) -> None:
    """Not the run's own process: this one's, which stands for another machine."""
    [server] = [one for one in psutil.Process().children() if "benchmarks.sglang_stub" in one.cmdline()]
    server.send_signal(signal.SIGSTOP)


def spin(command: Command, run_dir: Path) -> None:
    run_dir.with_name("spin").touch()


def block_metrics(command: Command, run_dir: Path) -> None:
    """Opening a pipe that nobody reads does not return; nor does it die before it is written whole."""
    pipe = run_dir / "pipe"
    os.mkfifo(pipe)
    pipe.replace(run_dir / "metrics.jsonl")


ONE = {"parallel": {"tp": 1}}
SPINNING = {
    "rewards": {
        "default": {"kind": "function", "function": "tests.faults.fault_rewards:spins_when_told"},
        "workers": 1,
        "wall_seconds": 3.0,
    },
    "rollout": {**run_tree(Path(), Path())["rollout"], "stall_seconds": TIMEOUT_S},
}
SERVED = {
    **ONE,
    "guards": {"on_logprob_diff": "report"},  # the stub makes up its log-probs
    "rollout": {
        **run_tree(Path(), Path())["rollout"],
        "engine": "sglang",
        "stall_seconds": TIMEOUT_S,
        "server": {"control_timeout_s": TIMEOUT_S, "silence_s": 2.0, "start_timeout_s": 4.0},
        "sync": {"transport": "tensor", "fallback": "none", "timeout_s": TIMEOUT_S, "probe_tolerance": 1e9},
    },
}
STALLS: dict[str, Stall] = {
    "rank 0 stopped": Stall(stop_rank(0), "rank 1 waited for rank 0", 1),
    "rank 1 stopped": Stall(stop_rank(1), "rank 0 waited for rank 1", 1),
    "rollout process stopped": Stall(stop_rollout_process, "gave no sign of life for 10 s", 2),
    "server stopped": Stall(stop_server, "no SGLang server with the weights of version", 1, SERVED),
    "reward worker spins": Stall(spin, "waited for the reward workers: no judgement for 10 s", 2, SPINNING),
    "metrics file blocked": Stall(block_metrics, "rank 0 did not finish to write the step's files within 10 s", 2),
}


def stalled(folder: Path, tree: Mapping[str, Any], plant: Plant, after: Callable[[], None] = lambda: None) -> End:
    """Starts a run, plants the stall after two steps, waits for the end. `after`: what frees who is left in a system call,
    and could not be killed before."""
    run_dir = Path(tree["run_dir"])
    with started(folder, "train", str(write_run(folder, tree))) as command:
        command.until(lambda: len(metrics(run_dir)) > 1, "two steps")
        command.look_around()
        began = time.monotonic()
        plant(command, run_dir)
        try:
            code = command.ends(60.0)
        finally:
            after()
        took = time.monotonic() - began
        command.nobody_left()
    return End(
        took, code, command.words(), sorted(path.name for path in (run_dir / "logs" / "stacks").glob("rank_*.txt"))
    )


def end_of(name: str, task: Path, folder: Path) -> End:
    stall = STALLS[name]
    os.environ[SPIN_FILE] = str(folder / "spin")  # only one of the runs looks at it
    tree = run_tree(task, folder / "run", **{"steps": 100_000, "timeout_s": TIMEOUT_S, **stall.changes})
    with contextlib.ExitStack() as stack:
        if "server" in tree["rollout"]:
            url = stack.enter_context(stub_server("--vocab", "97", "--token-seconds", "0.005"))
            tree["rollout"] = {**tree["rollout"], "server": {**tree["rollout"]["server"], "urls": [url]}}
        return stalled(folder, tree, stall.plant)


@pytest.fixture(scope="module")
def ends(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[End]]]:
    """Side by side: most of it is waiting."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(end_of, name, task, tmp_path_factory.mktemp("stall")) for name in STALLS}


@pytest.mark.parametrize("name", STALLS)
def test_a_stall_ends_in_time_with_stacks(ends: dict[str, Future[End]], name: str) -> None:
    end = ends[name].result()
    print(f"{name}: {end.took:.1f} s; {complaint(end.words)}")
    assert end.code == 1, end
    assert STALLS[name].words in complaint(end.words), end
    assert end.took < TIMEOUT_S + 10, end
    assert len(end.stacks) >= STALLS[name].stacks, end


@pytest.fixture
def freezing(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """mount(folder): a file system of its own that `fsfreeze` makes stop answering: who writes sits in the kernel and
    cannot be killed, as with a file server that is gone."""
    tools = [shutil.which(name) for name in ("mount", "fsfreeze", "mkfs.ext4", "losetup")]
    if os.geteuid() != 0 or None in tools:
        pytest.skip("file systems are mounted and frozen by root, with util-linux and e2fsprogs")
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        image = tmp_path / f"disk{len(mounted)}"
        with image.open("wb") as file:
            file.truncate(64 * 2**20)
        folder.mkdir(parents=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
            pytest.skip("this root may not mount a loop device")
        mounted.append(folder)
        (folder / "lost+found").rmdir()

    yield mount
    for folder in mounted:
        subprocess.run(["fsfreeze", "-u", folder], capture_output=True)  # a test that failed left it frozen
        subprocess.run(["umount", "--lazy", folder], check=True)


FROZEN = {  # what stops answering, by its place in the run folder: what the line says, by where it meets the run
    ".": r"rank \d did not finish to .* within 10 s: a file system",
    "checkpoints": r"rank 0 did not finish to (begin the checkpoint|save) within 10 s|waited for rank \d to write its part",
}


@pytest.mark.parametrize("place", FROZEN)
def test_a_file_system_that_stops_answering(
    task: Path,
    tmp_path: Path,
    freezing: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where stacks go when the run folder does not answer
    frozen = tmp_path / "run" / place
    freezing(frozen)
    saving = {"every": 1, "timeout_s": TIMEOUT_S} if place == "checkpoints" else {"every": 0}
    tree = run_tree(task, tmp_path / "run", steps=100_000, timeout_s=TIMEOUT_S, checkpoint=saving)
    end = stalled(
        tmp_path,
        tree,
        lambda command, run_dir: subprocess.run(["fsfreeze", "-f", frozen], check=True).check_returncode(),
        after=lambda: subprocess.run(["fsfreeze", "-u", frozen], check=True).check_returncode(),
    )
    # a rank that the kernel holds has no exit code: another one's words may be read out after its own, which are the same
    [line] = {line for line in end.words.splitlines() if line.startswith(("error:", "failed:"))}
    print(f"{place} frozen: {end.took:.1f} s; {line}")
    assert end.code == 1, end
    assert re.search(FROZEN[place], line), end
    assert end.took < TIMEOUT_S + 10, end
    stacks = end.stacks or sorted(path.name for path in tmp_path.glob("lens-megatron-stacks-*/rank_*.txt"))
    assert stacks == ["rank_00000.txt", "rank_00001.txt"], end


def test_a_rank_whose_part_of_a_checkpoint_is_never_written(tmp_path: Path, workers: Callable[[int], Any]) -> None:
    words = workers(2).run(saved_by_one, str(tmp_path))
    assert words == [words[0]] * 2
    assert (
        "step_000001: the other ranks waited for rank 1 to write its part, for checkpoint.timeout_s = 0.5 s" in words[0]
    )


def saved_by_one(root: str) -> str:
    import torch.distributed as dist

    from lens_megatron.checkpoints import CheckpointConfig
    from lens_megatron.mcore.checkpoint import PendingSave
    from lens_megatron.mcore.checkpoint_run import Saver
    from lens_megatron.mcore.checkpoint_writer import Written

    answers = threading.Event()

    class Part:
        def write(self) -> Written:
            assert dist.get_rank() == 0 or answers.wait(60.0)
            return Written()

    saver = Saver(None, Path(root), CheckpointConfig(timeout_s=0.5))  # type: ignore[arg-type]
    saver._pending = PendingSave(Path(root) / "step_000001", Part(), lambda sizes: None)  # type: ignore[arg-type,return-value]
    try:
        saver.finish()
    except RunError as error:
        return str(error)
    finally:
        answers.set()
    return ""


def test_a_stack_says_where_and_what_for(tmp_path: Path, workers: Callable[[int], Any]) -> None:
    [text] = workers(1).run(dumped, str(tmp_path))
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


def test_an_error_says_what_it_broke_off(tmp_path: Path, workers: Callable[[int], Any]) -> None:
    [text] = workers(1).run(broken_off, str(tmp_path))
    assert "doing: choose prompts" in text
    assert "reason: rank 0 failed: no prompt is left" in text


def broken_off(run_dir: str) -> str:
    from lens_megatron.mcore.watch import Watch

    watcher = Watch(Path(run_dir), 2.0)
    with contextlib.suppress(RunError), watcher.reporting():
        with contextlib.suppress(RunError), watcher.doing("score"):
            raise RunError("one that is dealt with")
        with watcher.doing("begin the step"), watcher.doing("choose prompts", 60.0):
            raise RunError("no prompt is left")
    watcher.close()
    return (Path(run_dir) / "logs" / "stacks" / "rank_00000.txt").read_text()


@pytest.mark.parametrize("speaker", (0, 1))
def test_who_says_why_leaves_first(tmp_path: Path, workers: Callable[[int], Any], speaker: int) -> None:
    """Whoever started the ranks ends all of them at the first exit: it would cut the one line off."""
    [(code_0, left_0), (code_1, left_1)] = workers(2).run(left, str(tmp_path), speaker)
    assert (code_0, code_1) == ((1, 75) if speaker == 0 else (75, 1))
    assert (left_0 < left_1) is (speaker == 0)


def left(run_dir: str, speaker: int) -> tuple[int, float]:
    """The exit code and the time at which this rank would have left."""
    from unittest.mock import patch

    import torch.distributed as dist

    from lens_megatron.mcore import watch

    ended: list[tuple[int, float]] = []
    gone = threading.Event()

    def leave(code: int) -> None:
        ended.append((code, time.monotonic()))
        gone.set()

    with patch.object(watch, "_leave", leave), patch.object(watch.workers, "is_local_worker", lambda: True):
        watcher = watch.Watch(Path(run_dir), 16.0)
        with watcher.doing("sit in a lock", 0.3 if dist.get_rank() == speaker else None):
            assert gone.wait(30.0)
        watcher.close()
    return ended[0]
