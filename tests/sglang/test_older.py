"""SGLang 0.5.20, the last version without weight-update sessions: the same client, engine and answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import Refused, SGLangClient
from lens_megatron.rollout.sglang_engine import SGLangEngine
from tests.rollout import tiny
from tests.rollout.engine_cases import check_response, drain, requests

from . import venv
from .conftest import save_tiny
from .engines import give_weights, sglang_engine
from .server import CPU_ENV, UNDER_WAY, cpu_config

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def older(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    path = os.pathsep.join([str(venv.build_older()), CPU_ENV["PYTHONPATH"]])
    config = cpu_config(env={**CPU_ENV, "PYTHONPATH": path})
    with sglang_engine(tiny_folder, tmp_path_factory.mktemp("older"), config) as engine:
        yield engine


def test_it_is_met_as_a_server_without_sessions(older: SGLangEngine) -> None:
    (address,) = older.servers()
    assert address.version == (0, 5, 20)
    assert not older._pool.seats[0].info.has_sessions  # type: ignore[union-attr]

    async def begin() -> None:
        server = SGLangClient(address.url, address.api_key)
        try:
            await server.begin_weight_update()
        finally:
            await server.close()

    loop = EventLoop()
    with pytest.raises(Refused, match=r"\(404\)"):
        loop.run(begin())
    loop.close()


def test_rollouts_and_new_weights(older: SGLangEngine, tiny_folder: Path, tmp_path: Any) -> None:
    save_tiny(1, tmp_path)
    for version, seed, folder in ((1, 0, tiny_folder), (2, 1, tmp_path)):
        give_weights(older, version, folder)
        wanted = requests(20)
        older.submit(wanted)
        done = drain(older, 20)
        for request in wanted:
            check_response(tiny.model(seed, tied=False), request, done[request.id])
            assert {span.version for span in done[request.id].versions} == {version}


def test_an_abort_comes_back(older: SGLangEngine, tiny_folder: Path) -> None:
    give_weights(older, 3, tiny_folder)
    wanted = requests(4, max_tokens=UNDER_WAY, stop=())
    older.submit(wanted)
    older.poll(0.3)
    older.abort([request.id for request in wanted])
    assert {finished.finish for finished in drain(older, 4).values()} == {"abort"}
