"""The SGLang servers that a run asks for."""

from __future__ import annotations

from launchers.shape import Servers
from lens_megatron.config import RunConfig


def servers_of(config: RunConfig) -> Servers | None:
    """None where the engine needs no server of its own: the embedded one, or servers given by URL."""
    rollout = config.rollout
    if rollout.engine != "sglang" or rollout.server.urls:
        return None
    return Servers(rollout.servers, rollout.server.gpus, config.placement == "colocated")
