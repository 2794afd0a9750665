"""The worker processes: limits, deaths, rewards of the user's own, and nothing that waits for ever."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lens_megatron import strict
from lens_megatron.errors import RunError, UsageError
from lens_megatron.rewards.config import FormatRule, RewardConfig, RewardRule
from lens_megatron.rewards.pool import RewardPool
from lens_megatron.rewards.worker_process import Request
from tests.rewards.hostile import GOLD, hostile_responses

PATIENCE = 120


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(workers=2)) as made:
        yield made


def test_results_come_back_for_what_was_asked(pool: RewardPool) -> None:
    judged = pool.grade_all(Request(str(n), "any", str(n % 7), rf"\boxed{{{n}}}") for n in range(40))
    assert [j.reward for j in judged] == [float(n % 7 == n) for n in range(40)]
    assert judged[3].extracted == "3"


def test_the_cache_is_by_answer_and_response(pool: RewardPool) -> None:
    before = pool.health()
    response = r"cached? \boxed{17}"
    rewards = [pool.submit("a", "", gold, response).result(PATIENCE).reward for gold in ("17", "18", "17", "18", "17")]
    assert rewards == [1, 0, 1, 0, 1]
    after = pool.health()
    assert after["cached"] - before["cached"] == 3
    assert after["judged"] - before["judged"] == 2


def test_a_response_that_was_cut_is_judged_as_one(pool: RewardPool) -> None:
    response = "The answer is 41"
    rewards = [pool.submit("a", "", "41", response, cut=cut).result(PATIENCE).reward for cut in (False, True, False)]
    assert rewards == [1, 0, 1]
    assert [one.reward for one in pool.grade_all([Request("a", "", "41", response, cut=True)])] == [0]


def test_works_from_asyncio(pool: RewardPool) -> None:
    async def gather() -> list[float]:
        futures = [asyncio.wrap_future(pool.submit(str(n), "", "2", rf"async \boxed{{{n}}}")) for n in range(4)]
        return [judged.reward for judged in await asyncio.gather(*futures)]

    assert asyncio.run(gather()) == [0, 0, 1, 0]


def test_workers_load_nothing_of_a_trainer(pool: RewardPool) -> None:
    pool.submit("a", "", "2", r"\boxed{\sqrt{4}}").result(PATIENCE)
    for pid in pool.worker_pids():
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" not in mapped and "numpy" not in mapped


def test_a_killed_worker_is_replaced_and_its_response_still_judged() -> None:
    with RewardPool(RewardConfig(workers=1, cache=0)) as pool:
        pool.submit("warm", "", "2", r"\boxed{2}").result(PATIENCE)
        (first,) = pool.worker_pids()
        os.kill(first, signal.SIGSTOP)  # it hangs with the response in hand
        future = pool.submit("a", "", "2", r"\boxed{2}")
        time.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        assert future.result(PATIENCE).verdict == "correct"
        assert pool.worker_pids() != [first]
        assert pool.health()["restarts"] == 1


def test_a_worker_that_never_answers_is_killed_at_the_wall_limit() -> None:
    with RewardPool(RewardConfig(workers=1, seconds=0.5, wall_seconds=1.5)) as pool:
        pool.submit("warm", "", "2", r"\boxed{2}").result(PATIENCE)
        os.kill(pool.worker_pids()[0], signal.SIGSTOP)  # no CPU time passes
        judged = pool.submit("a", "", "2", r"other \boxed{2}").result(PATIENCE)
        assert (judged.reward, judged.verdict, judged.note) == (0.0, "unparsable", "timeout")
        assert pool.submit("b", "", "2", r"another \boxed{2}").result(PATIENCE).verdict == "correct"
        assert pool.health()["killed"] == 1


def test_when_all_judgements_time_out_it_says_so(rewards_module: str) -> None:
    sources = {"hangs": _function("hangs"), "well": _function("length")}
    config = RewardConfig(workers=1, seconds=0.5, wall_seconds=0.8, sources=sources)
    with RewardPool(config, stall_seconds=4.0) as pool:  # a worker starts in less
        judged = [pool.submit(f"{n}", "hangs", "a", "b" * n) for n in range(40)]
        with pytest.raises(RunError, match=r"no judgement for 4 s, \d timed out and \d+ wait"):
            judged[-1].result(PATIENCE)
        assert 1 <= sum(future.exception() is None for future in judged) <= 7  # those that timed out before
    # every other one says something: no stall, however long it takes (5 s: on a busy machine a worker starts in seconds)
    with RewardPool(config, stall_seconds=5.0) as pool:
        judged = [pool.submit(f"{n}", "well" if n % 2 else "hangs", "a", "b" * (n + 1)) for n in range(14)]
        assert [future.result(PATIENCE).note for future in judged[::2]] == ["timeout"] * 7


def test_300_hostile_responses(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    responses = hostile_responses(str(marker))
    assert len(responses) >= 300
    config = RewardConfig(workers=8, seconds=1.0, wall_seconds=60, memory_mib=512)
    peak = 0
    with RewardPool(config) as pool:
        futures = [pool.submit(str(i), "", GOLD[i % len(GOLD)], text) for i, text in enumerate(responses)]
        deadline = time.monotonic() + 500
        while not all(future.done() for future in futures) and time.monotonic() < deadline:
            for pid in pool.worker_pids():
                try:
                    peak = max(peak, psutil.Process(pid).memory_info().rss)
                except psutil.Error:
                    continue
            time.sleep(0.05)
        judged = [future.result(0) for future in futures]
        believed = [
            (j, r[:80]) for j, r in zip(judged, responses, strict=True) if j.verdict not in ("wrong", "unparsable")
        ]
        assert not believed
        assert all(j.reward == 0 for j in judged)
        # the pool is alive, and judges as before
        assert pool.submit("after", "", r"\frac{1}{2}", r"\boxed{0.5}").result(PATIENCE).verdict == "correct"
        health = pool.health()
    assert 0 < peak <= 512 << 20
    assert not marker.exists()
    assert health["timeouts"] < 60, health


def test_a_response_longer_than_the_limit_is_not_read(pool: RewardPool) -> None:
    judged = pool.submit("a", "", "5", "x" * 500_000 + r"\boxed{5}").result(0)
    assert (judged.verdict, judged.note) == ("unparsable", "too long")


REWARDS = """
import asyncio, os, subprocess, time

def length(response, answer, source):
    return min(1.0, len(response) / 10)

async def slow(response, answer, source):
    await asyncio.sleep(0.01)
    return {"reward": float(response == answer), "verdict": "correct" if response == answer else "wrong"}

def broken(response, answer, source):
    raise KeyError("label")

def too_much(response, answer, source):
    return 2

def hangs(response, answer, source):
    time.sleep(600)

def dies(response, answer, source):
    os._exit(9)

def eats(response, answer, source):
    return len([0] * 10**10)

def runs(response, answer, source):  # as graders of code do
    subprocess.run(["sleep", response])

def forks(response, answer, source):
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", response])
    time.sleep(600)

def leaves(response, answer, source):
    subprocess.Popen(["sleep", response])
    return 1.0

def leaves_and_dies(response, answer, source):
    subprocess.Popen(["sleep", response])
    os._exit(9)

def waits_for_its_children(response, answer, source):
    subprocess.Popen(["true"])
    try:
        while True:
            os.wait()
    except ChildProcessError:
        return float(os.read(0, 1) == b"")
"""


@pytest.fixture
def rewards_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_rewards"


def _function(name: str) -> RewardRule:
    return RewardRule(kind="function", function=f"my_rewards:{name}")


def test_functions_of_the_users(rewards_module: str) -> None:
    names = ("length", "slow", "broken", "too_much", "hangs", "dies", "eats")
    config = RewardConfig(workers=2, seconds=1, wall_seconds=3, sources={f"my/{n}": _function(n) for n in names})
    with RewardPool(config) as pool:
        futures = {name: pool.submit(name, f"my/{name}", "abc", "abc") for name in names}
        assert futures["length"].result(PATIENCE).reward == pytest.approx(0.3)
        assert futures["length"].result(PATIENCE).verdict == "partial"
        assert futures["slow"].result(PATIENCE).verdict == "correct"
        with pytest.raises(RunError, match=r"broken.*KeyError"):
            futures["broken"].result(PATIENCE)
        with pytest.raises(RunError, match="number from 0 to 1"):
            futures["too_much"].result(PATIENCE)
        assert futures["hangs"].result(PATIENCE).note == "timeout"
        assert futures["dies"].result(PATIENCE).note == "crashed"
        assert futures["eats"].result(PATIENCE).note == "memory"
        # sources without a rule of their own are judged as mathematics meanwhile
        assert pool.submit("m", "math", "2", r"\boxed{2}").result(PATIENCE).verdict == "correct"


def _sleepers(seconds: str) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and (process.info["cmdline"] or [])[:1] == ["sleep"]
        and process.info["cmdline"][1].startswith(seconds)
    ]


def _awaited(seconds: str, count: int) -> bool:
    deadline = time.monotonic() + 20
    while len(_sleepers(seconds)) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(_sleepers(seconds)) == count


@pytest.fixture
def seconds() -> Iterator[str]:
    """How long this test's processes would sleep: others' are not counted, and none is left by a test that fails."""
    number = f"3333.{random.SystemRandom().randrange(10**9):09}"
    yield number
    for pid in _sleepers(number):
        os.kill(pid, signal.SIGKILL)


def test_what_a_function_started_ends_with_its_worker(rewards_module: str, seconds: str) -> None:
    names = ("runs", "forks", "leaves", "leaves_and_dies")
    config = RewardConfig(workers=2, seconds=0.5, wall_seconds=1, sources={name: _function(name) for name in names})
    with RewardPool(config) as pool:

        def judged(source: str, count: int) -> list[str]:
            futures = [pool.submit(f"{n}", source, "", f"{seconds}{n}") for n in range(count)]
            return [future.result(PATIENCE).note for future in futures]

        assert judged("runs", 3) == ["timeout"] * 3
        assert judged("forks", 3) == ["timeout"] * 3
        assert judged("leaves_and_dies", 1) == ["crashed"]
        assert _awaited(seconds, 0), "left by workers that were killed, or died"
        assert judged("leaves", 3) == [""] * 3
        pool.submit("last", "runs", "", seconds)
        assert _awaited(seconds, 4)  # a worker that goes on keeps what it has
    assert _awaited(seconds, 0), "left by a pool that was closed"


@pytest.mark.skipif(sys.platform != "linux", reason="workers die with their parent on Linux")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_process_that_judges(
    rewards_module: str, seconds: str, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C does not reach the workers, which are in a session of their own; a process that is killed tells nobody."""
    script = f"""
import signal
from lens_megatron.rewards.config import RewardConfig, RewardRule
from lens_megatron.rewards.pool import RewardPool
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
rule = RewardRule(kind="function", function="my_rewards:runs")
with RewardPool(RewardConfig(workers=2, default=rule, wall_seconds=600)) as pool:
    futures = [pool.submit(str(n), "", "", "{seconds}" + str(n)) for n in range(3)]
    futures[0].result()
"""
    root = str(Path(__file__).resolve().parents[2])
    caller = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, str(tmp_path)])},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert _awaited(seconds, 2)
        session = {os.getsid(pid) for pid in _sleepers(seconds)}
        caller.send_signal(number)
        caller.wait(20)
        assert _awaited(seconds, 0)
        deadline = time.monotonic() + 20
        while left := [p.pid for p in psutil.process_iter() if _session(p.pid) in session]:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def test_a_function_may_wait_for_all_its_children_and_finds_no_input(rewards_module: str) -> None:
    with RewardPool(RewardConfig(workers=1, default=_function("waits_for_its_children"))) as pool:
        assert pool.submit("a", "", "x", "y").result(PATIENCE).reward == 1.0


def test_a_function_that_is_not_there_fails_everyone_who_waits(rewards_module: str) -> None:
    config = RewardConfig(workers=1, default=_function("missing"))
    with RewardPool(config) as pool:
        futures = [pool.submit(str(i), "", "a", "b") for i in range(3)]
        for future in futures:
            with pytest.raises(RunError, match="no function missing"):
                future.result(PATIENCE)
        with pytest.raises(RunError, match="no function missing"):
            pool.submit("later", "", "a", "b")


def test_closing_fails_what_waits(rewards_module: str) -> None:
    pool = RewardPool(RewardConfig(workers=1, sources={"s": _function("hangs")}))
    future = pool.submit("a", "s", "a", "b")
    pool.close()
    with pytest.raises(RunError, match="closed"):
        future.result(PATIENCE)
    with pytest.raises(RunError, match="closed"):
        pool.submit("b", "s", "a", "b")


class _Server(http.server.BaseHTTPRequestHandler):
    failures = 1

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503)
            return
        body = json.dumps({"reward": 1.0 if asked["response"] == asked["answer"] else 0.25}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_rewards_over_http_try_again() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/grade"
    try:
        with RewardPool(RewardConfig(workers=1, default=RewardRule(kind="http", url=url))) as pool:
            assert pool.submit("a", "", "x", "x").result(PATIENCE).verdict == "correct"
            partly = pool.submit("b", "", "x", "y").result(PATIENCE)
            assert (partly.reward, partly.verdict) == (0.25, "partial")
    finally:
        server.shutdown()
        server.server_close()
    with (
        RewardPool(RewardConfig(workers=1, wall_seconds=5, default=RewardRule(kind="http", url=url))) as pool,
        pytest.raises(RunError, match="reward server"),
    ):
        pool.submit("a", "", "x", "x").result(PATIENCE)


def test_rules_are_found_by_source() -> None:
    exact, numeric = RewardRule(kind="exact"), RewardRule(kind="numeric")
    config = RewardConfig(sources={"openai/gsm8k": numeric, "openai/*": exact})
    assert config.rule("openai/gsm8k") is numeric
    assert config.rule("openai/other") is exact
    assert config.rule("math") == RewardRule()
    with (
        RewardPool(RewardConfig(sources={"a": exact}, default=None)) as pool,
        pytest.raises(RunError, match="no reward for"),
    ):
        pool.submit("x", "b", "1", "1")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"default": {"kind": "function"}}, "module:name"),
        ({"default": {"kind": "function", "function": "no_colon"}}, "module:name"),
        ({"default": {"kind": "http", "url": "ftp://x"}}, "http"),
        ({"default": {"tolerance": 2}}, "tolerance"),
        ({"default": {"format": {"pattern": "("}}}, "regular expression"),
        ({"sources": {"a": {"knd": "math"}}}, "did you mean 'sources.a.kind'"),
        ({"seconds": 5, "wall_seconds": 1}, "wall_seconds"),
    ],
)
def test_settings_that_cannot_work_are_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        strict.build(RewardConfig, tree, "rewards")


def test_what_a_format_rule_makes_of_a_reward_comes_with_the_answers_own() -> None:
    rule = RewardRule(format=FormatRule(pattern="boxed", weight=0.25))
    with RewardPool(RewardConfig(workers=1, default=rule)) as pool:
        right, wrong = (pool.submit(r, "s", "5", r).result(60) for r in ("the answer is 5", r"\boxed{6}"))
    assert (right.reward, right.answer_reward, right.verdict) == (0.75, 1.0, "correct")
    assert (wrong.reward, wrong.answer_reward, wrong.verdict) == (0.25, 0.0, "wrong")
