"""Which experts every token goes to: given by the rollout engine, and replayed in our passes.

Engine and trainer round differently, and near a tie a router then picks another expert: the trainer's log-probs are those
of another function than the one that was sampled from. Replay takes the engine's choice of experts; their weights are
still computed from this model's router, which learns through them.

    with replay_routing(policy.chunks, sequences, routing):
        train_step(policy, sequences, ...)

Megatron-Core asks an object at each router which experts to take (moe/router_replay.py). Its own RouterReplay keeps all
routers of the process in one list, policy and reference alike, and must be told before each backward that what follows is
recomputation, which no schedule offers a place for. The objects here belong to one model, and see for themselves.

Shapes: T tokens of this rank, L layers of this chunk, K experts a token, E experts.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from lens_megatron.errors import RunError
from lens_megatron.mcore.model import innermost
from lens_megatron.mcore.packing import Pack, local_positions
from lens_megatron.mcore.runtime import device
from lens_megatron.model_spec import MoESpec
from lens_megatron.routed_experts import OWN_CHOICE, Routing


@dataclass
class _Router:
    """Stands at one router, where Megatron-Core expects a RouterReplay."""

    layer: int  # counted over the whole model
    given_TK: Tensor | None = None
    keep: bool = False  # until the backward pass recomputes this layer
    kept: deque[Tensor] = field(default_factory=deque)

    def get_replay_topk(
        self, scores_TE: Tensor, topk: int, num_groups: Any, group_topk: Any, choose: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        if torch._C._current_graph_task_id() != -1:
            # Inside a backward pass: activations are being recomputed. Schedules run backward in the order of forward.
            chosen_TK = self.kept.popleft()
        else:
            chosen_TK = choose(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)[1]
            if self.given_TK is not None:
                given_TK = self.given_TK.to(chosen_TK.dtype)  # one layer at a time
                chosen_TK = torch.where(given_TK == OWN_CHOICE, chosen_TK, given_TK)
            if self.keep:
                self.kept.append(chosen_TK)
        return scores_TE.gather(1, chosen_TK), chosen_TK


@contextlib.contextmanager
def replay_routing(
    chunks: Sequence[torch.nn.Module], sequences: Sequence[Tensor], routing: Sequence[Routing | None]
) -> Iterator[None]:
    """Passes of `sequences` inside take the experts of `routing`, which were checked where they came in
    (routed_experts.Routers). Every rank gives those of all sequences.

    What it leaves out is routed by the model: sequences without any, tokens before and behind its rows (an engine never
    reads the last token that it samples) and rows of OWN_CHOICE.
    """
    if all(reported is None for reported in routing):
        yield
        return
    layers, moe = innermost(chunks[0]).spec.layers, _experts(chunks[0])
    _check_shapes(sequences, routing, layers, moe.experts_per_token)

    def before_pack(routers: Sequence[_Router], config: Any, pack: Pack) -> None:
        given_TLK = _given(pack, routing, [router.layer for router in routers], layers, moe.experts_per_token)
        given_TLK = _of_this_rank(given_TLK, pack, config).to(device())
        for place, router in enumerate(routers):
            router.given_TK = given_TLK[:, place]

    with _at_routers(chunks, before_pack):
        yield


@contextlib.contextmanager
def _at_routers(
    chunks: Sequence[torch.nn.Module], before_pack: Callable[[Sequence[_Router], Any, Pack], None]
) -> Iterator[None]:
    """Our objects at the chunks' routers; pipeline.py calls the chunks' `before_pack` ahead of each micro-batch."""
    models: list[Any] = [innermost(chunk) for chunk in chunks]

    def attach(model: Any) -> None:
        config = model.config
        recomputes = config.recompute_granularity == "full" or "moe" in (config.recompute_modules or ())
        routers = [_Router(layer.layer_number - 1) for layer in model.decoder.layers]
        for layer, router in zip(model.decoder.layers, routers, strict=True):
            layer.mlp.router.router_replay = router

        def tell(pack: Pack) -> None:
            for router in routers:
                router.keep = model.training and recomputes
            before_pack(routers, config, pack)

        model.before_pack = tell

    before = [
        (getattr(model, "before_pack", None), [layer.mlp.router.router_replay for layer in model.decoder.layers])
        for model in models
    ]
    try:
        for model in models:
            attach(model)
        yield
        left = sum(len(layer.mlp.router.router_replay.kept) for model in models for layer in model.decoder.layers)
        if left:  # what was kept for a recomputation that never came, or came in another order
            raise RuntimeError(f"routing replay: {left} passes of routers were never recomputed")
    finally:
        for model, (hook, old) in zip(models, before, strict=True):
            model.before_pack = hook
            for layer, router in zip(model.decoder.layers, old, strict=True):
                layer.mlp.router.router_replay = router


def _given(pack: Pack, routing: Sequence[Routing | None], layers: list[int], all_layers: int, topk: int) -> Tensor:
    """The pack's rows of `routing` for these layers, OWN_CHOICE where nothing is reported."""
    given = torch.full((pack.tokens, len(layers), topk), OWN_CHOICE, dtype=torch.int16)
    start = 0
    for index, padded in zip(pack.sequences, pack.padded_lengths, strict=False):  # pure padding has no sequence
        if (reported := routing[index]) is not None:
            rows = reported.experts().reshape(-1, all_layers, topk)[:, layers].astype(np.int16)
            begin = start + reported.first
            given[begin : begin + len(rows)] = torch.from_numpy(rows)
        start += padded
    return given


def _of_this_rank(values: Tensor, pack: Pack, config: Any) -> Tensor:
    """Rows of a whole pack -> those of the tokens that this rank's routers see."""
    mine = values[
        local_positions(
            pack.padded_lengths,
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
    ]
    if not config.sequence_parallel:
        return mine
    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return mine.chunk(ranks)[rank]


def _experts(chunk: torch.nn.Module) -> MoESpec:
    moe = innermost(chunk).spec.moe
    if moe is None:
        raise ValueError("this model has no experts, so no routing to replay")
    return moe


def _check_shapes(sequences: Sequence[Tensor], routing: Sequence[Routing | None], layers: int, topk: int) -> None:
    if len(routing) != len(sequences):
        raise RunError(f"routing replay: routing of {len(routing)} sequences was given for {len(sequences)}")
    for number, (sequence, reported) in enumerate(zip(sequences, routing, strict=True)):
        if reported is None:
            continue
        rows, width = reported.experts().shape
        if width != layers * topk or reported.first + rows > len(sequence):
            raise RunError(
                f"routing replay: sequence {number} of {len(sequence)} tokens has routing of {width} experts a token for "
                f"{rows} tokens from token {reported.first} on; this model has {layers} layers x {topk} experts = "
                f"{layers * topk} a token"
            )
