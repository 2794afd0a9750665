from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import WorkerPool
from tests.tiny_models import save_hf


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], WorkerPool]]:
    """workers(n): n processes on gloo, kept between tests."""
    pools: dict[int, WorkerPool] = {}

    def get(world_size: int) -> WorkerPool:
        return pools.setdefault(world_size, WorkerPool(world_size))

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """hf_folder(kind): a tiny HF checkpoint of that family, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_hf(kind, tmp_path_factory.mktemp("hf") / kind)
        return made[kind]

    return get
