"""A model in numbers, for `lens-megatron models` and for reports."""

from __future__ import annotations

import dataclasses
from typing import Any

from lens_megatron.model_spec import ModelConfig
from lens_megatron.planning.memory import advised_bytes, advised_host_bytes
from lens_megatron.planning.parameters import count_active_parameters, count_parameters


def describe(config: ModelConfig) -> dict[str, Any]:
    spec = config.spec
    return {
        "name": config.name,
        "family": spec.family,
        "hub_id": config.hub_id,
        "parameters": count_parameters(spec),
        "active_parameters": count_active_parameters(spec),
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "tied": spec.tied,
        "experts": spec.moe.experts if spec.moe else None,
        "experts_per_token": spec.moe.experts_per_token if spec.moe else None,
        "layouts": [
            {
                **dataclasses.asdict(layout),
                "dp": layout.dp,
                "computed_peak_gib": round(advised_bytes(spec, layout).peak / 1024**3, 1),
                "computed_host_gib": round(advised_host_bytes(spec, layout) / 1024**3, 1),
            }
            for layout in config.layouts
        ],
    }
