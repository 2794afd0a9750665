"""Supervised training through the same sharded step: rows of prompt and response, mean loss over response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lens_megatron import stacks, strict
from lens_megatron.config import SftConfig
from lens_megatron.data.order import PromptOrder
from lens_megatron.data.prompts import first_prompt
from lens_megatron.data.supervised import SupervisedExample, load_supervised
from lens_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from lens_megatron.errors import UsageError
from lens_megatron.guards.run_guards import ModelGuards
from lens_megatron.mcore import runtime
from lens_megatron.mcore.batch import PackedBatch
from lens_megatron.mcore.hf_files import write_hf_folder
from lens_megatron.mcore.layout import check_budget
from lens_megatron.mcore.step import LossFunction, Trainable, build_trainable, train_step
from lens_megatron.mcore.watch import MARGIN_S, Watch
from lens_megatron.model_spec import find_weights, load_model_config, named_template, template_origin
from lens_megatron.precision import torch_dtype
from lens_megatron.progress import Progress
from lens_megatron.run_folder import RunFolder


def train_supervised(config: SftConfig, folder: RunFolder | None) -> Path:
    """Every rank runs it; rank 0 has the run folder. Returns the HF folder with the trained weights."""
    model = load_model_config(config.model)
    weights = find_weights(config.model)
    run_dir = Path(config.run_dir)
    template = named_template(config.data.template, model.template)
    origin = template_origin("data.template", config.data.template, model.template_from)
    with stacks.of_errors(run_dir, "read the data, meet the other ranks"):
        tokenizer = load_tokenizer(str(weights))
        check_tokenizer(tokenizer, model.spec.vocab_size)
        examples, too_long = load_supervised(config.data, tokenizer, template)
        check_lengths(examples, config, model.spec.max_positions)
        order = PromptOrder([example.id for example in examples], config.seed, config.data.shuffle)
        runtime.initialize(model.spec, config.parallel, config.seed, config.timeout_s + MARGIN_S)
    watch = Watch(run_dir, config.timeout_s)
    progress = Progress(config.steps, shown=folder is not None)
    try:
        with watch.reporting():
            with watch.doing("load the policy"), progress.starting("load the policy"):
                policy = build_trainable(
                    model.spec,
                    config.parallel,
                    weights,
                    config.optimizer,
                    steps=config.steps,
                    memory=config.memory,
                    dtype=torch_dtype(config.precision),
                )
            if folder is not None:  # only now: a start that failed for bad input leaves no run behind
                folder.begin(strict.to_tree(SftConfig, config))
            guards = ModelGuards(config.guards, config.tokens_per_microbatch, config.timeout_s)
            guards.after_loading(policy, "policy", weights)
            with progress:
                progress.note(first_prompt(tokenizer, examples[0].prompt, origin))
                progress.note(f"{len(examples)} examples; left out as longer than data.max_prompt_tokens: {too_long}")
                for step in range(config.steps):
                    batch = [examples[index] for index in order.take(config.data.prompts_per_step)]
                    guards.compare_replicas(step, {"policy": policy})
                    with watch.doing("train"), progress.phase("train"):
                        metrics = _step(policy, batch, config)
                    guards.count_skipped(metrics["skipped"] > 0, metrics["loss"], metrics["grad_norm"])
                    metrics = {"step": step + 1, **metrics, **progress.times(), **guards.times()}
                    if folder is not None:
                        with watch.doing("write the step's metrics", config.timeout_s):
                            folder.append_metrics(metrics)
                    progress.finish_step(metrics)
            policy.export_hf_to(
                lambda tensors: write_hf_folder(run_dir / "hf", tensors, weights, template=template),
                "write the trained model",
                config.timeout_s,
            )
            return run_dir / "hf"
    finally:
        watch.close()


def check_lengths(examples: Sequence[SupervisedExample], config: SftConfig, positions: int) -> None:
    longest = max(examples, key=lambda example: len(example.prompt) + len(example.response))
    tokens = len(longest.prompt) + len(longest.response)
    if tokens > positions:
        where = f"{config.data.train}: row {longest.id}"
        raise UsageError(f"{where} has {tokens} tokens, more than the model's {positions} positions")
    check_budget("tokens_per_microbatch", config.tokens_per_microbatch, tokens, config.parallel)


def _step(policy: Trainable, batch: Sequence[SupervisedExample], config: SftConfig) -> dict[str, float]:
    sequences = [torch.tensor((*example.prompt, *example.response)) for example in batch]
    loss = supervised_loss(batch, config.prompt_loss_weight)
    result = train_step(policy, sequences, loss, tokens_per_microbatch=config.tokens_per_microbatch)
    return {
        **result.metrics,
        "grad_norm": result.grad_norm,
        "lr": result.learning_rate,
        "skipped": float(not result.updated),
        "tokens": sum(len(sequence) for sequence in sequences),
    }


def supervised_loss(batch: Sequence[SupervisedExample], prompt_weight: float) -> LossFunction:
    """Mean of -log p over response tokens, prompt tokens weighing `prompt_weight`."""
    weights: list[Tensor] = []
    for example in batch:
        weights += [torch.full((len(example.prompt),), prompt_weight), torch.ones(len(example.response))]
        weights[-2][0] = 0.0  # nothing predicts the first token
    weight_F = torch.cat(weights).to(runtime.device())
    total = float(weight_F.sum())
    if total == 0:
        raise UsageError("no token to learn from: every response of the batch is empty")

    def loss(logprobs_T: Tensor, entropy_T: Tensor, pack: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        weight_T = torch.where(pack.target_T >= 0, weight_F[pack.target_T.clamp(min=0)], 0.0)
        value = -(logprobs_T * weight_T).sum() / total
        return value, {"entropy": (entropy_T.detach() * weight_T).sum() / total}

    return loss
