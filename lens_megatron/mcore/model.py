"""Megatron-Core GPT models whose last stage yields token log-probs and entropies instead of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from lens_megatron.mcore import rotary
from lens_megatron.mcore.head import token_logprobs_and_entropy
from lens_megatron.mcore.layer_spec import block_spec, runs_on_engine
from lens_megatron.mcore.layout import ParallelConfig, padded_vocab_size
from lens_megatron.mcore.runtime import cuda_literals
from lens_megatron.mcore.settings import MemoryConfig
from lens_megatron.model_spec import ModelSpec


@dataclass(frozen=True)
class HeadRequest:
    """What the last stage is asked for. Travels as GPTModel.forward's `labels`."""

    labels_T: Tensor
    temperature: float
    entropy: bool = True  # or NaN stands in its place


class TokenModel(GPTModel):
    """A GPT model chunk. On the last stage forward gives [2, T]: log p(label) and entropy of every token of this rank."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig, vp_stage: int | None, memory: MemoryConfig) -> None:
        scaling = spec.rope_scaling
        if not config.apply_rope_fusion:
            rotary.install()
        super().__init__(
            config,
            block_spec(config, vp_stage, memory.recompute),
            vocab_size=padded_vocab_size(spec, config.tensor_model_parallel_size),
            max_sequence_length=spec.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            rope_scaling=scaling is not None,
            rope_scaling_factor=scaling.factor if scaling else 1.0,
            vp_stage=vp_stage,
        )
        self.spec = spec
        self.head = memory.head

    def head_weight(self) -> Tensor:
        return self.shared_embedding_or_output_weight() if self.spec.tied else self.output_layer.weight

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *rest: Any, **options: Any) -> tuple[Any, ...]:
        """Megatron-Core's, with the angles of each token's own position."""
        decoder_input, angles, *others = super()._preprocess(input_ids, position_ids, *rest, **options)
        if not self.config.apply_rope_fusion:
            angles = rotary.gathered(angles, position_ids, self.config.params_dtype)
        return decoder_input, angles, *others

    def _postprocess(self, hidden_states: Tensor, input_ids: Any, position_ids: Any, labels: Any, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        request: HeadRequest = labels
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
        weight_VH = self.head_weight()
        rank = parallel_state.get_tensor_model_parallel_rank()
        logprobs_T, entropy_T = token_logprobs_and_entropy(
            hidden.squeeze(1),
            weight_VH,
            request.labels_T,
            temperature=request.temperature,
            vocab_start=rank * weight_VH.size(0),
            vocab_size=self.spec.vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
            entropy=request.entropy,
            kind=self.head,
        )
        return torch.stack([logprobs_T, entropy_T])


def transformer_config(
    spec: ModelSpec,
    layout: ParallelConfig,
    dtype: torch.dtype,
    memory: MemoryConfig | None = None,
) -> TransformerConfig:
    """Megatron-Core's configuration of this model in this layout."""
    memory = memory or MemoryConfig()
    engine = runs_on_engine(dtype)
    options: dict[str, Any] = {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_size,
        "num_attention_heads": spec.heads,
        "num_query_groups": spec.kv_heads,
        "kv_channels": spec.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "sequence_parallel": layout.sequence_parallel,
        "account_for_embedding_in_pipeline_split": layout.ends_count_as_layers,
        "account_for_loss_in_pipeline_split": layout.ends_count_as_layers,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # The loss arrives already divided by the global counts, and gradients are summed over micro-batches and ranks.
        "calculate_per_token_loss": True,
        # Packs differ in length from one micro-batch to the next; Megatron-Core checks the dispatcher even without experts.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The weights come from a checkpoint: nothing is initialised twice.
        "perform_initialization": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "attention_softmax_in_fp32": True,
        "bias_activation_fusion": torch.cuda.is_available(),
        "bias_dropout_fusion": torch.cuda.is_available(),
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": engine,
        "persist_layer_norm": engine,
    }
    if layout.vpp > 1:
        # With the default exchange and two pipeline ranks both neighbours are the same peer, and messages cross silently.
        options.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if memory.recompute == "full":
        options.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif memory.recompute == "light" and engine and spec.moe is not None:
        options.update(recompute_granularity="selective", recompute_modules=["layernorm", "moe_act"])
    elif memory.recompute == "selective":
        # Flash attention never stores its scores, so what is left to save is the MLP's (or the experts') inner activations.
        options.update(recompute_granularity="selective", recompute_modules=["moe" if spec.moe else "mlp"])
    if spec.moe is not None:
        options.update(
            num_moe_experts=spec.moe.experts,
            moe_router_topk=spec.moe.experts_per_token,
            moe_ffn_hidden_size=spec.moe.expert_ffn_size,
            moe_router_load_balancing_type="none",
            moe_router_pre_softmax=False,  # softmax over the chosen experts equals HF's norm_topk_prob
            moe_router_dtype="fp32",
            moe_grouped_gemm=engine,
            moe_permute_fusion=False,
        )
    with cuda_literals():
        return TransformerConfig(**options)


def build_chunks(spec: ModelSpec, config: TransformerConfig, memory: MemoryConfig) -> list[torch.nn.Module]:
    """This rank's part of the model, one chunk per virtual stage. The weights are not set."""
    stages = config.virtual_pipeline_model_parallel_size
    chunks: list[torch.nn.Module] = []
    for stage in range(stages or 1):
        with cuda_literals():
            chunk = TokenModel(spec, config, stage if stages else None, memory)
        _mark_parallel_tensors(chunk)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def _mark_parallel_tensors(chunk: torch.nn.Module) -> None:
    """Megatron-Core marks a tensor as cut over ranks only while it initialises it, which we leave out.

    Without the mark every rank but the first takes its part for a copy, and the gradient norm that clipping divides by
    silently leaves it out.
    """
    cut = (
        (tensor_parallel.ColumnParallelLinear, 0),
        (tensor_parallel.RowParallelLinear, 1),
        (tensor_parallel.VocabParallelEmbedding, 0),
    )
    for module in chunk.modules():
        for kind, dim in cut:
            if isinstance(module, kind) and module.weight is not None:
                _mark(module.weight, dim)
                if kind is tensor_parallel.ColumnParallelLinear and module.bias is not None:
                    _mark(module.bias, 0)


def _mark(parameter: Tensor, dim: int) -> None:
    if not hasattr(parameter, "tensor_model_parallel"):
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def innermost(chunk: torch.nn.Module) -> TokenModel:
    """The TokenModel inside whatever wraps it (bf16 casts, DDP)."""
    while not isinstance(chunk, TokenModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
