"""The driver's process: the same samples as in this process, weights through shared memory, and no way to hang."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout import driver_process
from lens_megatron.rollout.driver import RolloutDriver, _limit_standstill
from lens_megatron.rollout.embedded import EmbeddedEngine
from lens_megatron.rollout.sampler import Sampler
from lens_megatron.rollout.sampling import NO_RESCUE, RescueRules, SamplingConfig
from lens_megatron.rollout.shared_buffer import SharedBuffer, bytes_needed
from lens_megatron.types import Prompt, PurifiedPrompt, Rollout

from . import tiny

CONFIG = SamplingConfig(n=3, max_response_tokens=10)
PROMPTS = [Prompt(f"p{i}", (5, 6, i + 7), (0, 3), "1") for i in range(4)]
_SOCKET_BYTES = 1 << 18  # more than a socket's buffer holds
PURIFIED = [PurifiedPrompt(p.id, p.tokens[1:], (0,)) for p in PROMPTS]


def certain(rewards: Any, n: int) -> bool:
    return (sum(rewards) + n - len(rewards)) / n < 0.5


def moot(rewards: Any, n: int) -> bool:
    return sum(rewards) / n >= 0.5


def parity(prompt: Prompt, rollout: Rollout) -> float:
    return float(sum(rollout.response) % 3 == 0)


def slow(prompt: Prompt, rollout: Rollout) -> float:
    time.sleep(0.5)
    return 1.0


def endless(prompt: Prompt, rollout: Rollout) -> float:
    time.sleep(1e6)
    return 1.0


def wrong(prompt: Prompt, rollout: Rollout) -> float:
    raise ZeroDivisionError("in the reward")


RULES = RescueRules(certain, moot)


def make_sampler(seed: int = 0, reward: Any = parity, rules: RescueRules = RULES) -> Sampler:
    return Sampler(EmbeddedEngine(tiny.model(seed), slots=8), reward, rules, CONFIG, (tiny.STOP,), seed=1)


def make_talkative() -> Sampler:
    sampler = make_sampler()
    sampler.state_dict = lambda: {"history": b"x" * (16 * _SOCKET_BYTES)}  # type: ignore[method-assign]
    return sampler


def make_stuck() -> Sampler:
    driver_process.STUCK_LEEWAY_SECONDS = 0.5
    sampler = make_sampler(reward=endless)
    sampler.config = replace(CONFIG, stall_seconds=0.5)
    return sampler


def make_nothing() -> Sampler:
    raise UsageError("model: no such folder")


def make_no_server() -> Sampler:
    raise RunError("sglang_0 was not ready within start_timeout_s = 3")


def make_garbage() -> Sampler:
    raise ValueError("surprise")


def make_when_told(file: Path) -> Sampler:
    while not file.exists():
        time.sleep(0.01)
    return make_sampler()


@pytest.fixture(scope="module")
def driver() -> Iterator[RolloutDriver]:
    started = RolloutDriver(make_sampler)
    yield started
    started.close()


@pytest.fixture
def fresh() -> Iterator[Any]:
    made: list[RolloutDriver] = []

    def start(make: Any = make_sampler, **limits: Any) -> RolloutDriver:
        made.append(RolloutDriver(make, **limits))
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_samples_and_weights_equal_those_of_this_process(driver: RolloutDriver) -> None:
    here = make_sampler()
    for got, expected in zip(*(one.sample(PROMPTS, PURIFIED, 1).groups for one in (driver, here)), strict=True):
        assert got.prompt == expected.prompt and got.purified_prompt == expected.purified_prompt
        for a, b in zip((*got.originals, *got.purified), (*expected.originals, *expected.purified), strict=True):
            assert a.behaviour_logprobs == pytest.approx(b.behaviour_logprobs, abs=1e-5)
            assert replace(a, behaviour_logprobs=()) == replace(b, behaviour_logprobs=())
    weights = {name: tensor.clone() for name, tensor in tiny.model(1).state_dict().items()}
    names = list(weights)
    buckets = [{name: weights[name] for name in names[i : i + 4]} for i in range(0, len(names), 4)]
    buckets.append({names[0]: weights[names[0]].clone()})  # smaller than the buffer of before
    driver.load_weights(buckets, version=9)
    assert driver.health().version == 9
    there = make_sampler(1).sample(PROMPTS, PURIFIED, 2).groups
    got = driver.sample(PROMPTS, PURIFIED, 2).groups
    assert [r.response for g in got for r in g.originals] == [r.response for g in there for r in g.originals]
    assert {r.weight_version for g in got for r in (*g.originals, *g.purified)} == {9}
    assert driver.state_dict()["history"]["seen"].keys() == {"p0", "p1", "p2", "p3"}
    driver.load_state_dict({"history": {"seen": {}, "all": [0.0, 0.0]}})
    assert driver.state_dict()["history"]["seen"] == {}


def test_an_error_inside_is_raised_here_and_the_driver_goes_on(driver: RolloutDriver) -> None:
    with pytest.raises(RunError, match="engine's model has no 'nonsense'"):
        driver.load_weights([{"nonsense": torch.zeros(3)}], version=10)
    with pytest.raises(UsageError, match="256 positions"):
        driver.load_weights([dict(tiny.model(0).state_dict())], version=11)
        driver.sample([Prompt("long", (5,) * 250, (0, 1), "1")], [None], 1)
    assert len(driver.sample(PROMPTS, PURIFIED, 3).groups) == 4


def test_waiting_is_done_in_pieces(fresh: Any) -> None:
    driver = fresh(functools.partial(make_sampler, reward=slow, rules=NO_RESCUE))
    driver.start_sampling(PROMPTS, PURIFIED, 1)
    assert driver.sampled(0.3) is None
    with pytest.raises(ValueError, match="while sampling"):
        driver.health()
    driver.close()


def test_a_reward_that_raises_is_named(fresh: Any) -> None:
    driver = fresh(functools.partial(make_sampler, reward=wrong))
    with pytest.raises(RunError, match="'sample': ZeroDivisionError: in the reward"):
        driver.sample(PROMPTS, PURIFIED, 1)


def test_a_loop_that_goes_round_no_more_is_found_though_the_driver_beats(
    fresh: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    driver = fresh(make_stuck)
    driver.started()
    began = time.monotonic()
    with pytest.raises(RunError, match=r"stuck in 'sample' for 1 s; its stacks are above"):
        driver.sample(PROMPTS, PURIFIED, 1)
    assert time.monotonic() - began < 20
    assert "in endless" in capfd.readouterr().err
    with pytest.raises(RunError, match="ended with exit code 1"):
        driver.health()


def test_judgements_are_counted_while_it_samples(fresh: Any) -> None:
    driver = fresh(functools.partial(make_sampler, reward=slow))
    driver.started()
    driver.start_sampling(PROMPTS, PURIFIED, 1)
    began = time.monotonic()
    assert driver.reward_health() == {}  # of a reward that has no pool
    answered = time.monotonic() - began
    while driver.sampled(1.0) is None:
        pass
    assert answered < 3 < time.monotonic() - began, "it waited for the batch, whose rewards take half a second each"


def test_a_start_that_fails_keeps_its_kind(fresh: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        fresh(make_nothing).started()
    with pytest.raises(RunError, match=r"^sglang_0 was not ready within start_timeout_s = 3$"):
        fresh(make_no_server).started()
    assert "Traceback" not in capfd.readouterr().err  # what it says is enough
    with pytest.raises(RunError, match="could not start: ValueError: surprise"):
        fresh(make_garbage).health()


def test_the_caller_goes_on_while_it_starts(fresh: Any, tmp_path: Path) -> None:
    driver = fresh(functools.partial(make_when_told, tmp_path / "go"))
    assert not (tmp_path / "go").exists()  # the constructor did not wait for it
    (tmp_path / "go").touch()
    driver.started()
    driver.started()  # once is enough
    assert driver.health().ok


def test_a_start_has_its_time(fresh: Any, tmp_path: Path) -> None:
    driver = fresh(functools.partial(make_when_told, tmp_path / "never"), start_seconds=0.5)
    with pytest.raises(RunError, match=r"did not finish 'start' within 0.5 s"):
        driver.started()
    assert not _alive(driver.pid)


def test_a_killed_driver_is_one_clear_error(fresh: Any) -> None:
    driver = fresh(functools.partial(make_sampler, reward=slow))
    driver.start_sampling(PROMPTS, PURIFIED, 1)
    os.kill(driver.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"rollout driver \(process \d+\) was killed by SIGKILL"):
        while driver.sampled(5.0) is None:
            pass
    assert time.monotonic() - begin < 10
    with pytest.raises(RunError, match="SIGKILL"):
        driver.health()


def test_a_silent_driver_is_given_up_and_killed(fresh: Any) -> None:
    driver = fresh(silence_seconds=2.5)
    driver.started()  # importing, it cannot beat
    os.kill(driver.pid, signal.SIGSTOP)
    with pytest.raises(RunError, match=r"no sign of life for 2.5 s during 'health'"):
        driver.health()
    assert not _alive(driver.pid)


def test_a_driver_that_falls_silent_while_it_samples_is_given_up(fresh: Any) -> None:
    driver = fresh(functools.partial(make_sampler, reward=slow), silence_seconds=2.5)
    driver.start_sampling(PROMPTS, PURIFIED, 1)
    os.kill(driver.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"no sign of life for 2.5 s during 'sample'"):
        while driver.sampled(0.5) is None:  # each look is shorter than the silence
            assert time.monotonic() - begin < 20
    assert not _alive(driver.pid)


@pytest.fixture
def shot_if_waited_for() -> Iterator[Any]:
    """What this process would wait for without end dies at last, and the error is another one."""
    timers: list[threading.Timer] = []

    def watch(pid: int) -> None:
        timers.append(threading.Timer(30.0, os.kill, (pid, signal.SIGKILL)))
        timers[-1].start()

    yield watch
    for timer in timers:
        timer.cancel()


def test_a_batch_that_a_stopped_driver_does_not_take_is_given_up(fresh: Any, shot_if_waited_for: Any) -> None:
    """It is larger than the socket's buffer, so that sending it has to wait."""
    driver = fresh(silence_seconds=2.5)
    driver.started()
    many = [Prompt(f"p{i}", tuple(range(200)), (0, 3), "1") for i in range(1600)]
    assert len(pickle.dumps(many)) > 2 * _SOCKET_BYTES
    os.kill(driver.pid, signal.SIGSTOP)
    shot_if_waited_for(driver.pid)
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"no sign of life for 2.5 s during 'sample', which rank 0 waits for"):
        driver.start_sampling(many, [None] * len(many), 1)
    assert 2.4 < time.monotonic() - begin < 20
    assert not _alive(driver.pid)
    with pytest.raises(RunError, match="no sign of life"):
        driver.health()


@pytest.mark.parametrize(("number", "message"), [("STOP", "no sign of life for 2.5 s"), ("KILL", "killed by SIGKILL")])
def test_an_answer_that_ends_in_the_middle_is_given_up(
    fresh: Any, shot_if_waited_for: Any, number: str, message: str
) -> None:
    driver = fresh(make_talkative, silence_seconds=2.5)
    driver._send("state_dict")
    time.sleep(1.0)  # nobody reads: its answer fills the socket, and waits
    os.kill(driver.pid, signal.Signals[f"SIG{number}"])
    shot_if_waited_for(driver.pid)
    with pytest.raises(RunError, match=message):
        driver._reply(60.0, "state_dict")
    assert not _alive(driver.pid)


def test_a_message_that_moves_has_all_the_time_it_needs() -> None:
    ours, theirs = multiprocessing.Pipe()
    _limit_standstill(ours, 1.0)
    size = 8 * _SOCKET_BYTES

    def slowly(times: int) -> None:
        for _ in range(times):
            time.sleep(0.3)
            moved.append(os.read(theirs.fileno(), _SOCKET_BYTES // 2))

    moved: list[bytes] = []
    reader = threading.Thread(target=slowly, args=(12,), daemon=True)
    reader.start()
    begin = time.monotonic()
    with pytest.raises(BlockingIOError):
        ours.send_bytes(b"x" * size)
    assert time.monotonic() - begin > 12 * 0.3 + 0.9, "the reader stopped only then"
    reader.join()
    assert sum(map(len, moved)) < size
    theirs.close()
    ours.close()


def test_beats_of_a_long_while_are_signs_of_life(fresh: Any) -> None:
    driver = fresh(functools.partial(make_sampler, reward=slow), silence_seconds=1.5)
    driver.start_sampling(PROMPTS, PURIFIED, 1)
    time.sleep(3.0)  # the trainer trains
    while driver.sampled(0.5) is None:
        pass


def test_a_command_has_its_time(fresh: Any) -> None:
    driver = fresh(functools.partial(make_sampler, reward=slow), command_seconds=1.5)
    driver._send("sample", PROMPTS, PURIFIED, 1, None)
    with pytest.raises(RunError, match=r"did not finish 'health' within 1.5 s"):
        driver.health()


def test_the_driver_ends_with_its_caller(tmp_path: Any) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        "import time\n"
        "from rollout.test_driver import make_sampler\n"
        "from lens_megatron.rollout.driver import RolloutDriver\n"
        "if __name__ == '__main__':\n"
        "    print(RolloutDriver(make_sampler).pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])  # the package too: an installed one may be another
    caller = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert caller.stdout is not None
    pid = int(caller.stdout.readline())
    assert _alive(pid)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 15
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_buffer_keeps_every_dtype_and_shape() -> None:
    bucket = {
        "a": torch.randn(3, 5, dtype=torch.bfloat16),
        "b": torch.arange(7, dtype=torch.int32),
        "c": torch.randn(4, 6).t(),
        "d": torch.tensor(2.5, dtype=torch.float64),
    }
    buffer = SharedBuffer.create(bytes_needed(bucket))
    mapped = SharedBuffer(os.dup(buffer.descriptor), buffer.size)
    read = mapped.read(buffer.write(bucket))
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in bucket.items())
    with pytest.raises(RunError, match=r"a bucket of \d+ MiB"):
        SharedBuffer.create(2**60)


class Servers(EmbeddedEngine):
    """As an engine of servers: its weights change past the driver, also while it samples."""

    log: list[Any]

    def servers(self) -> list[str]:
        if self.log:
            raise RunError(f"told of {self.log}")
        return ["one", "two"]

    def begin_update(self, version: int) -> None:
        self.log = [version]

    def end_update(self, synced: Any = (), label: str | None = None) -> None:
        self.log.append(synced)

    def restart_servers(self, silent: Any, reason: str) -> bool:
        return (silent, reason) == (["two"], "made up")


def make_servers(reward: Any = slow) -> Sampler:
    engine = Servers(tiny.model(0), slots=8)
    engine.log = []
    return Sampler(engine, reward, NO_RESCUE, CONFIG, (tiny.STOP,), seed=1)


def test_servers_are_updated_while_sampling(fresh: Any) -> None:
    """Each command gets its own answer, and the samples come afterwards, whole."""
    driver = fresh(make_servers)
    driver.start_sampling(PROMPTS, [None] * len(PROMPTS), 1)
    assert driver.servers() == ["one", "two"]
    assert driver.begin_update(3) is None
    assert driver.restart_servers(["two"], "made up") is True
    assert driver.end_update(["one"]) is None
    with pytest.raises(RunError, match=r"told of \[3, \['one'\]\]"):  # an error aside is not the sampling's
        driver.servers()
    with pytest.raises(ValueError, match="while sampling"):
        driver.health()
    time.sleep(6.0)  # the sampling ends meanwhile: its answer comes before that of what is asked now
    with pytest.raises(RunError, match="told of"):
        driver.servers()
    result = driver.sampled(60.0)
    assert result is not None
    assert len(result.groups) == len(PROMPTS)
    assert driver.health().ok
