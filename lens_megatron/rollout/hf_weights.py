"""Weights arriving by their checkpoint names, copied into a live Hugging Face model.

The names are those of HF checkpoints (one tensor an expert); transformers keeps a layer's experts in two fused
tensors, so an expert's tensors are copied into its slices. Shapes: E experts, I expert's inner size, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lens_megatron.errors import RunError
from lens_megatron.fingerprints import fingerprint


class HFWeights:
    def __init__(self, model: Any) -> None:
        self._targets: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():  # a tied head appears once, as the embedding
            self._targets |= _checkpoint_names(name, parameter.data)
        head = model.get_output_embeddings().weight
        self._tied = {"lm_head.weight"} if head is model.get_input_embeddings().weight else set()
        self._loaded: set[str] = set()

    def begin(self) -> None:
        self._loaded = set()

    def load(self, bucket: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in bucket.items():
            if name in self._tied:
                continue
            target = self._targets.get(name)
            if target is None:
                raise RunError(f"weight sync: the engine's model has no {name!r}")
            if target.shape != tensor.shape:
                raise RunError(
                    f"weight sync: {name} is {tuple(tensor.shape)}, the engine's model has {tuple(target.shape)}"
                )
            target.copy_(tensor)
            self._loaded.add(name)

    def end(self) -> None:
        missing = sorted(self._targets.keys() - self._loaded)
        if missing:
            raise RunError(
                f"weight sync: {len(missing)} of {len(self._targets)} weights never came, first {missing[0]}"
            )

    def checksums(self) -> dict[str, str]:
        """Of what the model holds now, by checkpoint name."""
        return {name: fingerprint(target) for name, target in self._targets.items()}


def _checkpoint_names(name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The checkpoint's names of a parameter, each with the view of the parameter that it fills."""
    if name.endswith(".experts.gate_up_proj"):  # [E, 2I, H]: gate's rows, then up's
        prefix, inner = name.removesuffix(".gate_up_proj"), parameter.shape[1] // 2
        gates = {f"{prefix}.{e}.gate_proj.weight": parameter[e, :inner] for e in range(parameter.shape[0])}
        return gates | {f"{prefix}.{e}.up_proj.weight": parameter[e, inner:] for e in range(parameter.shape[0])}
    if name.endswith(".experts.down_proj"):  # [E, H, I]
        prefix = name.removesuffix(".down_proj")
        return {f"{prefix}.{e}.down_proj.weight": parameter[e] for e in range(parameter.shape[0])}
    return {name: parameter}
