from __future__ import annotations

from tests.distributed.conftest import workers
from tests.loop.conftest import task

__all__ = ["task", "workers"]
