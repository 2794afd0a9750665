"""Questions through running SGLang servers, here stubs: their weights, which nobody synced, count as version 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from lens_megatron import strict
from lens_megatron.errors import UsageError
from lens_megatron.evaluation.answering import Answer, Limits, answer_all
from lens_megatron.evaluation.config import EvalConfig
from lens_megatron.evaluation.engines import engine_for
from lens_megatron.evaluation.sets import EvalSet, questions
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.types import Prompt
from tests.evaluation.scripted_engine import judged_by
from tests.rollout.test_sglang_engine import FAST, stubs

SETS = [EvalSet("s", "S", 4, 5, tuple(Prompt(f"p{i}", (5, 6, i), (0, 3), "1") for i in range(5)))]


def config_of(engine: str, *urls: str) -> EvalConfig:
    return strict.build(EvalConfig, {"engine": engine, "server": {**FAST, "urls": list(urls)}}, "eval")


@pytest.mark.parametrize("several", [False, True])
def test_running_servers_answer(tmp_path: Path, several: bool) -> None:
    with stubs([], []) as servers:
        urls = [server.url for server in servers]
        config = config_of("sglang", *urls) if several else config_of(urls[0])
        wanted = questions(SETS, 0)
        found: dict[tuple, Answer] = {}
        with engine_for(config, tmp_path, 10_000, tmp_path / "logs") as engine:
            limits = Limits(6, 10_000, (), 1.0, 1.0, 20.0)
            judge = judged_by(lambda prompt, response: float(len(response) == 6))
            answer_all(engine, judge, wanted, limits, lambda _, answer: found.update({answer.key: answer}))
        assert set(found) == {question.key for question in wanted}
        assert not (tmp_path / "logs").exists()


def test_a_response_ends_where_the_servers_cache_does(tmp_path: Path) -> None:
    """A server that cuts a response short of what was asked for is taken for a broken one."""
    with stubs(["--kv-tokens", "50"]) as (server,):
        lengths: set[int] = set()
        with engine_for(config_of(server.url), tmp_path, 10_000, tmp_path / "logs") as engine:
            limits = Limits(10_000, 10_000, (), 1.0, 1.0, 20.0)
            judge = judged_by(lambda prompt, response: 0.0)
            answer_all(engine, judge, questions(SETS, 0), limits, lambda _, answer: lengths.add(answer.tokens))
        assert lengths == {50 - 2 - 3}


def test_a_server_of_a_training_run_is_refused(tmp_path: Path) -> None:
    """Its weights may change under the evaluation, and renaming them would stop the run."""
    with stubs([]) as (server,):
        loop, client = EventLoop(), SGLangClient(server.url)
        loop.run(client.set_weight_version("17"))
        refused = pytest.raises(UsageError, match=r"version '17' of a training run")
        with refused, engine_for(config_of(server.url), tmp_path, 100, tmp_path):
            pass
        assert loop.run(client.weight_version()) == "17"
        loop.run(client.close())
        loop.close()
