from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoints_tools.hf_to_megatron import hf_to_megatron
from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="session")
def hf(hf_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """hf(kind): a tiny HF folder of that family, made once."""
    return hf_folder


@pytest.fixture(scope="session")
def converted(hf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """converted(kind): the Megatron checkpoint of hf(kind), made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("megatron") / kind
            hf_to_megatron(hf(kind), made[kind], None, workers=2)
        return made[kind]

    return get


@pytest.fixture(scope="package")
def four_workers() -> Iterator[WorkerPool]:
    pool = WorkerPool(4)
    yield pool
    pool.close()
