from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="package")
def workers() -> Iterator[Callable[[int], WorkerPool]]:
    """workers(n): n processes on gloo, kept between the tests of a folder."""
    pools: dict[int, WorkerPool] = {}

    def get(world_size: int) -> WorkerPool:
        return pools.setdefault(world_size, WorkerPool(world_size))

    yield get
    for pool in pools.values():
        pool.close()
