"""The checksums that an SGLang server must report for weights that it was sent (`/weights_checker`, since 0.5.21).

The server holds tensors of its own names: q, k and v (gate and up) one after the other in one, experts stacked, each cut
over its tensor-parallel ranks. On CPU its checksum is the first 8 bytes of SHA-256, so the tensors can be hashed as they
are exported, without holding any. On CUDA it is a hash of SGLang's own, which is not computed here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lens_megatron.model_spec import ModelSpec
from lens_megatron.rollout.sglang_schema import ServerInfo

_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
          "up_proj": "gate_up_proj"}  # fmt: skip
_VOCABULARY_PADDING = 64
_FFN_PADDING = 32  # of SGLang on CPU
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def can_be_compared(spec: ModelSpec, server: ServerInfo) -> bool:
    """Whether the server's tensors are the exported ones and nothing else. On CPU it pads what does not divide by 32."""
    sizes = [spec.ffn_size, *([spec.moe.expert_ffn_size] if spec.moe else [])]
    return server.device == "cpu" and server.tp == 1 and all(size % _FFN_PADDING == 0 for size in sizes)


class ExpectedChecksums:
    """Fed with every tensor in the order of export: layer by layer, q before k before v, expert by expert."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}
        self._elsewhere: dict[str, str] = {}

    def feed(self, name: str, tensor: Tensor) -> None:
        whole = self._hashes.setdefault(_engine_name(name), hashlib.sha256())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # rows up to a multiple of 64 are zeros
            whole.update(bytes(-tensor.shape[0] % _VOCABULARY_PADDING * tensor[0].numel() * tensor.element_size()))

    def expected(self) -> dict[str, str]:
        return {**self._elsewhere, **{name: hash_.digest()[:8].hex() for name, hash_ in self._hashes.items()}}

    def add(self, expected: Mapping[str, str]) -> None:
        """What another rank was fed with."""
        self._elsewhere.update(expected)

    def differences(self, reported: Mapping[str, str], tied: bool) -> list[str]:
        """Engine tensors whose reported checksum is not that of the exported weights; also those that are missing."""
        expected = self.expected()
        if tied and "lm_head.weight" in reported:
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        return sorted(name for name in expected if reported.get(name) != expected[name])


def _engine_name(name: str) -> str:
    if match := _EXPERT.fullmatch(name):
        return f"{match[1]}.{'w2_weight' if match[2] == 'down' else 'w13_weight'}"
    head, _, last = name.rpartition(".")
    parent, _, module = head.rpartition(".")
    return f"{parent}.{_FUSED[module]}.{last}" if module in _FUSED else name


def reported_by_rank(answer: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """The checksums of each of the server's ranks."""
    return [rank["checksums"] for rank in answer.get("ranks", [])]
