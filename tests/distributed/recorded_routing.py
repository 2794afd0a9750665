"""The experts that every token of a pass went to, noted at the routers where replay stands too, on every rank.

    with record_routing(model.chunks, sequences) as seen:
        model.score(sequences, ...)
    routing = [Routing.of(experts.numpy()) for experts in seen.result()]

Shapes: T tokens of this rank, L layers, K experts a token, E experts, F places of the flat vector (mcore/batch.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lens_megatron.mcore import routing
from lens_megatron.mcore.batch import flat_offsets
from lens_megatron.mcore.model import innermost
from lens_megatron.mcore.packing import Pack
from lens_megatron.mcore.runtime import device
from lens_megatron.model_spec import MoESpec


class Recording:
    """The experts that the passes inside `record_routing` used."""

    def __init__(self, sequences: Sequence[Tensor], layers: int, moe: MoESpec) -> None:
        self._lengths = [len(sequence) for sequence in sequences]
        self._offsets = flat_offsets(sequences)
        # expert + 1, so that the sum over ranks (one of which saw the token) is what that one saw
        self._seen_LFK = torch.zeros(layers, self._offsets[-1], moe.experts_per_token, dtype=torch.int32)

    def result(self) -> list[Tensor]:
        """[tokens, layers, K] a sequence, on the host of every rank. Every rank must call. OWN_CHOICE: not seen."""
        everywhere_LFK = self._seen_LFK.clone().to(device())
        dist.all_reduce(everywhere_LFK)
        parts = everywhere_LFK.cpu().split(self._lengths, dim=1)
        return [part.transpose(0, 1).to(torch.int16) - 1 for part in parts]

    def before_pack(self, routers: Sequence[Any], config: Any, pack: Pack) -> None:
        places = torch.full((pack.tokens,), -1)
        start = 0
        for index, padded in zip(pack.sequences, pack.padded_lengths, strict=False):  # pure padding has no sequence
            length = self._lengths[index]
            places[start : start + length] = torch.arange(length) + self._offsets[index]
            start += padded
        places_T = routing._of_this_rank(places, pack, config)
        for router in routers:
            router.get_replay_topk = self._noting(router, self._seen_LFK[router.layer], places_T)

    @staticmethod
    def _noting(router: Any, seen_FK: Tensor, places_T: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        there_T = places_T >= 0

        def get_replay_topk(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            scores_TK, chosen_TK = type(router).get_replay_topk(router, *args, **kwargs)
            seen_FK[places_T[there_T]] = (chosen_TK.cpu()[there_T] + 1).to(seen_FK.dtype)
            return scores_TK, chosen_TK

        return get_replay_topk


@contextlib.contextmanager
def record_routing(chunks: Sequence[torch.nn.Module], sequences: Sequence[Tensor]) -> Iterator[Recording]:
    """Notes the experts that passes of `sequences` inside use; ask `result()` afterwards, on every rank."""
    recording = Recording(sequences, innermost(chunks[0]).spec.layers, routing._experts(chunks[0]))
    with routing._at_routers(chunks, recording.before_pack):
        yield recording
