"""`memory.recompute: light`: what norms and the MLP's activation give is made again in the backward pass, not kept.

A matrix product reads it, and keeps it for the gradient of its weights. What it was made from is kept anyway, and making it
again only moves memory: of a dense layer's activations it is a quarter. Same kernels, same inputs: the bits are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from lens_megatron.mcore.norm import PlainRMSNorm


def with_recipe(made: Tensor, make: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
    """`made`, which from now on knows that `make(source)` gives it again."""
    if torch.is_grad_enabled():
        made.recipe = partial(make, source.detach())  # type: ignore[attr-defined]
    return made


def recipe_kept(made: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within, autograd keeps the recipe of `made` where it would keep `made`. Without a recipe it changes nothing."""
    recipe = getattr(made, "recipe", None)
    if recipe is None:
        return contextlib.nullcontext()
    storage, size = made.untyped_storage()._cdata, made.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        same = tensor.numel() == size and tensor.untyped_storage()._cdata == storage
        return tensor.shape if same else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return recipe().view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Norm(PlainRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return with_recipe(super().forward(x), super().forward, x)


class ColumnLinear(ColumnParallelLinear):
    def forward(self, input_: Tensor, *rest: Any, **options: Any) -> Any:
        with recipe_kept(input_):
            return super().forward(input_, *rest, **options)


def gated_mlp(parts: MLPSubmodules) -> type[GatedMLP]:
    """The class with its linear layers. In a ModuleSpec Megatron-Core would take it for one that it does not know."""

    class Whole(GatedMLP):
        def __init__(self, config: Any) -> None:
            group = parallel_state.get_tensor_model_parallel_group()
            super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)

    return Whole


class GatedMLP(MLP):
    """silu(gate) x up, without biases; whatever its linear layers are."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> Any:
        with recipe_kept(hidden_states):
            gate_up, _bias = self.linear_fc1(hidden_states)
        product = with_recipe(self._product(gate_up), self._product, gate_up)
        with recipe_kept(product):
            return self.linear_fc2(product)

    def _product(self, gate_up: Tensor) -> Tensor:
        if self.config.bias_activation_fusion:
            return bias_swiglu_impl(gate_up, None)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.config.activation_func(gate) * up
