"""How many parameters a model has, how many the fullest rank holds, and the bytes that training them takes.

Arithmetic only. Parameter counts are exact (they equal the published ones). Bytes are a lower bound made of what is
known to be allocated, used to advise layouts: computed, never measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_megatron.model_spec import AdvisedLayout, ModelSpec

# Mixed-precision training: 18 bytes a parameter on one GPU, of which the last 12 are sharded over data parallel ranks.
WEIGHT_BYTES = 2  # bf16
GRADIENT_BYTES = 4  # fp32, accumulated
OPTIMIZER_BYTES = 12  # fp32 weight and Adam's two moments
# CUDA context, NCCL's buffers, the allocator's slack. An allowance, stated so that it can be argued with.
OVERHEAD_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class LayerParameters:
    """One transformer layer."""

    attention: int  # projections and their biases
    norms: int  # layer norms and QK-norms
    mlp: int  # dense MLP; 0 with experts
    router: int
    experts: int  # all of them

    @property
    def total(self) -> int:
        return self.attention + self.norms + self.mlp + self.router + self.experts


def layer_parameters(spec: ModelSpec) -> LayerParameters:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = spec.hidden_size * (q + 2 * kv) + q * spec.hidden_size
    if spec.qkv_bias:
        attention += q + 2 * kv
    norms = 2 * spec.hidden_size + (2 * spec.head_dim if spec.qk_norm else 0)
    if spec.moe is None:
        return LayerParameters(attention, norms, mlp=3 * spec.hidden_size * spec.ffn_size, router=0, experts=0)
    one_expert = 3 * spec.hidden_size * spec.moe.expert_ffn_size
    router = spec.hidden_size * spec.moe.experts
    return LayerParameters(attention, norms, mlp=0, router=router, experts=spec.moe.experts * one_expert)


def embedding_parameters(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size


def count_parameters(spec: ModelSpec) -> int:
    """Every weight of the HF checkpoint, a tied embedding once."""
    ends = embedding_parameters(spec) * (1 if spec.tied else 2) + spec.hidden_size
    return spec.layers * layer_parameters(spec).total + ends


def count_active_parameters(spec: ModelSpec) -> int:
    """The weights that one token meets: all of them, or with experts only the chosen ones."""
    if spec.moe is None:
        return count_parameters(spec)
    unused = spec.moe.experts - spec.moe.experts_per_token
    one_expert = layer_parameters(spec).experts // spec.moe.experts
    return count_parameters(spec) - spec.layers * unused * one_expert


@dataclass(frozen=True)
class RankParameters:
    """What one rank holds, in the two groups that are sharded over different data parallel ranks."""

    dense: int
    expert: int
    layers: int


def stage_parameters(spec: ModelSpec, layout: AdvisedLayout) -> list[RankParameters]:
    """A rank of each pipeline stage; expert tensor parallelism is 1 (RUN.yaml's default)."""
    slots = (spec.layers + (2 if layout.ends_count_as_layers else 0)) // layout.pp
    layer = layer_parameters(spec)
    split = layer.attention + layer.mlp
    repeated = layer.norms + layer.router
    stages = []
    for stage in range(layout.pp):
        first, last = stage == 0, stage == layout.pp - 1
        layers = slots - (int(first) + int(last) if layout.ends_count_as_layers else 0)
        # the last stage of a tied model holds a copy of the embedding, unless it is the first stage too
        tables = int(first) + int(last and not (spec.tied and first))
        dense = layers * (-(-split // layout.tp) + repeated) + (spec.hidden_size if last else 0)
        dense += tables * -(-embedding_parameters(spec) // layout.tp)
        stages.append(RankParameters(dense, layers * layer.experts // layout.ep, layers))
    return stages


def fullest_rank(spec: ModelSpec, layout: AdvisedLayout) -> RankParameters:
    """The stage that decides whether the layout fits: often the first, which holds the embedding."""
    return max(stage_parameters(spec, layout), key=lambda held: held.dense + held.expert)


@dataclass(frozen=True)
class TrainingBytes:
    """One GPU's memory in a step, whose two fullest moments are the backward pass and the reference's scoring."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    reference_stays: bool
    training_activations: int
    scoring_activations: int
    overhead: int = OVERHEAD_BYTES

    @property
    def peak(self) -> int:
        always = self.weights + self.gradients + self.optimizer + self.overhead
        training = self.training_activations + (self.reference if self.reference_stays else 0)
        return always + max(training, self.reference + self.scoring_activations)


def training_bytes(spec: ModelSpec, layout: AdvisedLayout, tokens_per_microbatch: int = 16384) -> TrainingBytes:
    held = fullest_rank(spec, layout)
    parameters = held.dense + held.expert
    sharded = -(-held.dense // (layout.dp * layout.cp)) + -(-held.expert // layout.expert_dp)
    boundary, attention, mlp = _activation_bytes(spec, layout, tokens_per_microbatch)
    one_layer = attention + mlp
    in_flight = layout.pp  # micro-batches that the first stage of 1F1B holds
    # full: every layer keeps its input; the layer being recomputed has gradients as large as its activations
    kept = {"full": boundary, "selective": attention + boundary, "none": one_layer}[layout.recompute]
    return TrainingBytes(
        weights=WEIGHT_BYTES * parameters,
        gradients=GRADIENT_BYTES * parameters,
        optimizer=OPTIMIZER_BYTES * sharded,
        reference=WEIGHT_BYTES * parameters,
        reference_stays=not layout.offload_reference,
        training_activations=kept * held.layers * in_flight + 2 * one_layer,
        scoring_activations=one_layer,
    )


def host_bytes(spec: ModelSpec, layout: AdvisedLayout) -> int:
    """Host memory of all nodes together, for an offloaded reference: each GPU keeps its own part there."""
    gpus_per_stage = layout.gpus // layout.pp
    held = sum(stage.dense + stage.expert for stage in stage_parameters(spec, layout)) * gpus_per_stage
    return WEIGHT_BYTES * held if layout.offload_reference else 0


def _activation_bytes(spec: ModelSpec, layout: AdvisedLayout, tokens: int) -> tuple[int, int, int]:
    """bf16 bytes of one layer: its input, its attention block, its MLP or experts.

    Neither attention scores nor logits are ever stored.
    """
    tokens = -(-tokens // layout.cp)
    hidden = spec.hidden_size / layout.tp  # sequence parallel: each rank keeps its tokens' share
    q, kv = spec.heads * spec.head_dim / layout.tp, spec.kv_heads * spec.head_dim / layout.tp
    if spec.moe is None:
        mlp = 3 * spec.ffn_size / layout.tp
    else:
        # tokens spread over the tensor ranks, and each copy carries its hidden state to its expert and back
        mlp = spec.moe.experts_per_token * (3 * spec.moe.expert_ffn_size + 2 * spec.hidden_size) / layout.tp
    inputs_and_norms = 4 * hidden
    return int(2 * tokens * hidden), int(2 * tokens * (inputs_and_norms + 2 * q + 2 * kv)), int(2 * tokens * mlp)
