"""The embedded engine's KV cache, and how the model's attention sees it while prompts enter and while rows decode.

Shapes: B rows running, U different prompts in a prefill, R rows entering, P padded prompt length, S slots,
C cache capacity, Q query heads, K key-value heads, G query heads a key-value head, D head size, T tokens of a row,
W longest running row.
"""

from __future__ import annotations

from typing import Any

import torch

CAPACITY_STEP = 64
ATTENTION = "sdpa_by_group"


class SlotCache:
    """Keys and values of the running rows, layer by layer."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.capacity = 0
        self.keys_SKCD: list[torch.Tensor] = []
        self.values_SKCD: list[torch.Tensor] = []

    def reserve(self, capacity: int) -> None:
        """Room for rows of that length; grows by doubling, keeping what is there."""
        if capacity <= self.capacity:
            return
        new = -(-max(capacity, 2 * self.capacity if self.capacity else 0) // CAPACITY_STEP) * CAPACITY_STEP
        for tensors in (self.keys_SKCD, self.values_SKCD):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(*old.shape[:2], new, old.shape[3])
                tensors[layer][:, :, : self.capacity] = old
        self.capacity = new

    def layer(self, index: int, like_BKTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.keys_SKCD) <= index:
            shape = (self.slots, like_BKTD.shape[1], self.capacity, like_BKTD.shape[3])
            self.keys_SKCD.append(like_BKTD.new_zeros(shape))
            self.values_SKCD.append(like_BKTD.new_zeros(shape))
        return self.keys_SKCD[index], self.values_SKCD[index]

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in (*self.keys_SKCD, *self.values_SKCD):
            tensor[target, :, :length] = tensor[source, :, :length]


class Prefill:
    """The cache as the model sees it while prompts enter: attention over the prompt itself, kept in the rows' slots."""

    def __init__(self, cache: SlotCache, slots_R: torch.Tensor, unique_R: torch.Tensor) -> None:
        self.cache, self.slots_R, self.unique_R = cache, slots_R, unique_R

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, keys_UKPD: torch.Tensor, values_UKPD: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.cache.layer(layer_idx, keys_UKPD)
        length = keys_UKPD.shape[2]
        keys[self.slots_R, :, :length] = keys_UKPD[self.unique_R]
        values[self.slots_R, :, :length] = values_UKPD[self.unique_R]
        return keys_UKPD, values_UKPD


class Decode:
    """The cache as the model sees it when every running row gets one more token."""

    def __init__(self, cache: SlotCache, positions_B: torch.Tensor, width: int) -> None:
        self.cache, self.positions_B, self.width = cache, positions_B, width
        self.rows_B = torch.arange(len(positions_B), device=positions_B.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width - 1

    def update(
        self, keys_BK1D: torch.Tensor, values_BK1D: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.cache.layer(layer_idx, keys_BK1D)
        keys[self.rows_B, :, self.positions_B] = keys_BK1D[:, :, 0]
        values[self.rows_B, :, self.positions_B] = values_BK1D[:, :, 0]
        rows = len(self.rows_B)
        return keys[:rows, :, : self.width], values[:rows, :, : self.width]


def _attention_by_group(
    module: Any,
    query_BQTD: torch.Tensor,
    keys_BKWD: torch.Tensor,
    values_BKWD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """A decoding step's query heads that share a key head become its queries: nothing of the cache is copied, where
    transformers' own function copies all of it once a query head, in every step."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, tokens, size = query_BQTD.shape
    if tokens > 1:
        return sdpa_attention_forward(
            module, query_BQTD, keys_BKWD, values_BKWD, attention_mask, scaling=scaling, **more
        )
    out_BKGD = torch.nn.functional.scaled_dot_product_attention(
        query_BQTD.reshape(rows, keys_BKWD.shape[1], -1, size),
        keys_BKWD,
        values_BKWD,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return out_BKGD.reshape(rows, 1, heads, size), None


def attend_by_group(model: Any) -> None:
    """In models that use transformers' sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, _attention_by_group)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
