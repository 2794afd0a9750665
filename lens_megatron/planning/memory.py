"""One GPU's memory by part, and the moments of a step at which it is fullest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add

import numpy as np

from lens_megatron.mcore.layout import ParallelConfig, padded_vocab_size
from lens_megatron.mcore.settings import Recompute
from lens_megatron.model_spec import AdvisedLayout, ModelSpec
from lens_megatron.planning.activations import CUDA, Kernels, Pass, activation_bytes, kept_by_one_pass
from lens_megatron.planning.buffers import Buffer, Owned, chunk_buffers, default_bucket_size
from lens_megatron.planning.shards import chunks_of_stage, kinds_of_stages

GRADIENT_BYTES = 4  # fp32, whatever the weights are
_MOMENT_BYTES = 8  # Adam's two, fp32
_STEP_BYTES = 4  # torch's AdamW counts the steps of every tensor
# CUDA's context, NCCL's buffers, the allocator's slack. An allowance, stated so that it can be argued with.
OTHER_BYTES = 4 * 1024**3
ROOM = 0.95  # of the card: what the allocator cannot use


@dataclass(frozen=True)
class OptimizerState:
    main_weights: int  # fp32 copies of 16-bit weights; none when the weights are fp32 themselves
    moments: int
    step_counts: int

    @property
    def total(self) -> int:
        return self.main_weights + self.moments + self.step_counts


@dataclass(frozen=True)
class StateBytes:
    """Weights, gradients and optimizer of a rank; exact."""

    weights: int
    gradients: int
    dense: Owned
    expert: Owned | None
    element: int
    tp: int
    expert_ranks: int  # that hold different experts, or parts of them

    def of_rank(self, data_rank: int, expert_rank: int) -> OptimizerState:
        elements, pieces = int(self.dense.elements[data_rank]), int(self.dense.pieces[data_rank])
        if self.expert is not None:
            elements += int(self.expert.elements[expert_rank])
            pieces += int(self.expert.pieces[expert_rank])
        main = 4 * elements if self.element < 4 else 0
        return OptimizerState(main, _MOMENT_BYTES * elements, _STEP_BYTES * pieces)

    @property
    def fullest(self) -> OptimizerState:
        """Of the ranks of this stage, in Megatron-Core's order: tensor-parallel ranks are neighbours, then experts'."""
        places = np.arange(len(self.dense.elements) * self.tp)
        elements = self.dense.elements[places // self.tp]
        if self.expert is not None:
            elements = elements + self.expert.elements[places // self.expert_ranks]
        place = int(np.argmax(elements))
        return self.of_rank(place // self.tp, place // self.expert_ranks)


@lru_cache(maxsize=4096)
def state_bytes(
    spec: ModelSpec, layout: ParallelConfig, world: int, stage: int, *, element: int, overlap: bool = False
) -> StateBytes:
    """`overlap`: gradients are reduced during the backward pass, in buckets (CUDA, more than one rank)."""
    ranks = world // (layout.tp * layout.pp)
    expert_ranks = world // (layout.ep * layout.expert_tp * layout.pp)
    bucket = default_bucket_size(ranks // layout.cp) if overlap and ranks > 1 and stage == 0 else None
    dense: list[Buffer] = []
    expert: list[Buffer] = []
    for number, chunk in enumerate(chunks_of_stage(spec, layout, stage)):
        buffers = chunk_buffers(chunk, ranks, expert_ranks, bucket if number == 0 else None)
        dense += buffers[:1]
        expert += buffers[1:]
    elements = sum(buffer.elements for buffer in (*dense, *expert))
    return StateBytes(
        weights=element * elements,
        gradients=GRADIENT_BYTES * elements,
        dense=_sum(dense),
        expert=_sum(expert) if expert else None,
        element=element,
        tp=layout.tp,
        expert_ranks=layout.ep * layout.expert_tp,
    )


def _sum(buffers: list[Buffer]) -> Owned:
    return reduce(add, (buffer.owned() for buffer in buffers))


@dataclass(frozen=True)
class EngineBytes:
    """What the rollout engine holds on one of its GPUs."""

    weights: int
    kv_cache: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache


@dataclass(frozen=True)
class TrainerBytes:
    """One GPU of a pipeline stage: what lies there all the time, and what comes on top at the fullest moments."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    reference_stays: bool
    activations: int  # kept from forward to backward passes
    working: int  # of the layer or head that runs: gradients of activations, tiles of logits
    head: int  # of `working`, the head's
    scoring: int  # a forward pass that keeps nothing
    optimizer_working: int
    engine: int = 0  # an engine that shares the GPU and stays
    other: int = OTHER_BYTES

    @property
    def always(self) -> int:
        resting = self.reference if self.reference_stays else 0
        return self.weights + self.gradients + self.optimizer + self.engine + self.other + resting

    @property
    def moments(self) -> dict[str, int]:
        coming = 0 if self.reference_stays else self.reference
        return {
            "backward": self.always + self.activations + self.working,
            "scoring": self.always + self.scoring + coming,
            "optimizer step": self.always + self.optimizer_working,
        }

    @property
    def fullest_moment(self) -> str:
        moments = self.moments
        return max(moments, key=lambda name: moments[name])

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    def parts(self) -> dict[str, int]:
        """At the fullest moment; they add up to the peak."""
        moment = self.fullest_moment
        backward, scoring = moment == "backward", moment == "scoring"
        working = {"backward": self.working, "scoring": self.scoring, "optimizer step": self.optimizer_working}[moment]
        head = min(self.head, working) if moment != "optimizer step" else 0
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer + (working if moment == "optimizer step" else 0),
            "activations": (self.activations if backward else 0)
            + (0 if moment == "optimizer step" else working - head),
            "logits head": head,
            "reference": self.reference if scoring or self.reference_stays else 0,
            "engine": self.engine,
            "other": self.other,
        }


def trainer_bytes(
    spec: ModelSpec,
    layout: ParallelConfig,
    world: int,
    *,
    kernels: Kernels,
    recompute: Recompute,
    tokens_per_microbatch: int,
    longest: int,
    microbatches: int,
    reference: bool,
    offload_reference: bool,
    element: int = 2,
    engine: int = 0,
    offload_optimizer: float = 0.0,
) -> TrainerBytes:
    """The fullest rank. A pack is counted full, of sequences as long as can be."""
    one = Pass(tokens_per_microbatch, (longest,) * max(1, tokens_per_microbatch // longest))
    kept = kept_by_one_pass(spec, layout, one, element, kernels)
    stages = []
    for stage in kinds_of_stages(layout):
        state = state_bytes(spec, layout, world, stage, element=element, overlap=True)
        last = stage == layout.pp - 1
        tokens = -(-tokens_per_microbatch // layout.cp)
        head = head_working_bytes(spec, layout, tokens, element) if last else 0
        # gradients of a layer's activations are about as large as the activations
        working = max(kept.layer, head)
        forward = max(kept.layer, head_scoring_bytes(spec, layout, tokens, element) if last else 0)
        owned = state.fullest
        at_home = int(offload_optimizer * owned.moments)
        # AdamW's square roots are as large as one moment; a tensor at a time when moments visit
        temporary = _visiting(spec, layout, stage, owned.moments) if at_home else owned.moments // 2
        stages.append(
            TrainerBytes(
                stage=stage,
                weights=state.weights,
                gradients=state.gradients,
                optimizer=owned.total - at_home,
                reference=state.weights if reference else 0,
                reference_stays=reference and not offload_reference,
                activations=activation_bytes(
                    spec, layout, stage, one,
                    microbatches=microbatches, element=element, kernels=kernels, recompute=recompute,
                ),
                working=working,
                head=head if head == working else 0,
                scoring=forward,
                optimizer_working=temporary,
                engine=engine,
            )
        )  # fmt: skip
    return max(stages, key=lambda held: held.peak)


def _visiting(spec: ModelSpec, layout: ParallelConfig, stage: int, moments: int) -> int:
    """Moments of three tensors: one arrives, one is in use, one leaves; and the square roots of one."""
    largest = max(
        max((*chunk.dense, *chunk.expert)) for chunk in chunks_of_stage(spec, layout, stage) if chunk.elements
    )
    tensor = min(_MOMENT_BYTES * largest, moments)
    return 3 * tensor + tensor // 2


def host_bytes(
    spec: ModelSpec, layout: ParallelConfig, world: int, offload_reference: bool, offload_optimizer: float
) -> int:
    """Host memory of all nodes together: every GPU keeps its own part of the reference and of Adam's moments there."""
    total = 0
    for stage in range(layout.pp):
        state = state_bytes(spec, layout, world, stage, element=2)
        total += (state.weights if offload_reference else 0) + int(offload_optimizer * state.fullest.moments)
    return total * (world // layout.pp)


def advised_bytes(spec: ModelSpec, layout: AdvisedLayout) -> TrainerBytes:
    """Of a layout in model_configs/: packs of 16,384 tokens, sequences of 512 + 4,096, plain torch on CUDA."""
    return trainer_bytes(
        spec,
        advised_parallel(layout),
        layout.gpus,
        kernels=CUDA,
        recompute=layout.recompute,
        tokens_per_microbatch=16384,
        longest=4608,
        microbatches=layout.pp,
        reference=True,
        offload_reference=layout.offload_reference,
    )


def advised_host_bytes(spec: ModelSpec, layout: AdvisedLayout) -> int:
    return host_bytes(spec, advised_parallel(layout), layout.gpus, layout.offload_reference, 0.0)


def advised_parallel(layout: AdvisedLayout) -> ParallelConfig:
    return ParallelConfig(**layout.run_values()["parallel"])


def _tile(spec: ModelSpec, layout: ParallelConfig, tokens: int) -> int:
    """fp32 logits of one tile of the vocabulary (mcore/head.py)."""
    rows = padded_vocab_size(spec, layout.tp) // layout.tp
    return 4 * tokens * max(256, rows // 100)


def head_scoring_bytes(spec: ModelSpec, layout: ParallelConfig, tokens: int, element: int) -> int:
    """Two tiles (logits, probabilities), hidden states, a few values a token."""
    return 2 * _tile(spec, layout, tokens) + tokens * spec.hidden_size * element + 40 * tokens


def head_working_bytes(spec: ModelSpec, layout: ParallelConfig, tokens: int, element: int) -> int:
    """Two tiles and a 16-bit one, gradients of the weight and of the hidden states (fp32, then 16 bits)."""
    rows = padded_vocab_size(spec, layout.tp) // layout.tp
    gradients = rows * spec.hidden_size * element + tokens * spec.hidden_size * (4 + element)
    return 2 * _tile(spec, layout, tokens) + _tile(spec, layout, tokens) // 4 * element + gradients + 40 * tokens
