"""The SGLang servers that a run asks for."""

from __future__ import annotations

from launchers.shape import Servers
from lens_megatron.config import RunConfig


def servers_of(config: RunConfig) -> Servers | None:
    """None where the engine needs no server of its own."""
    assert config.rollout.engine == "embedded"
    return None
