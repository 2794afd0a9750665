"""A made-up batch of groups, and the gradient of every preset's loss on it, in a given layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_megatron.algorithms.algorithm import AlgorithmConfig
from lens_megatron.algorithms.rescue import rebuild_group
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.presets import load_algorithm
from lens_megatron.purification.select import delete
from lens_megatron.samples import samples_of_group
from lens_megatron.types import Group, Prompt, Rollout, Sample
from tests.distributed.cases import named_gradients, start

PROMPTS, N = 5, 4


def groups_for(algorithm: AlgorithmConfig) -> list[list[Sample]]:
    """Groups of every kind: no success, some, all; rescued and not; ragged."""
    rng = random.Random(11)
    groups = []
    for number in range(PROMPTS):
        tokens = tuple(rng.randrange(125) for _ in range(rng.randint(6, 13)))
        prompt = Prompt(f"p{number}", tokens, (1, len(tokens)), "")
        resample = algorithm.rescue.strategy == "resample"
        purified = delete(prompt, []) if resample else delete(prompt, [rng.randrange(1, len(tokens))])

        def rollout(index: int, success: bool, rescue: bool, x: tuple[int, ...], name: str = prompt.id) -> Rollout:
            length = rng.randint(2, 17)
            return Rollout(
                prompt_id=name,
                roll_tokens=x,
                response=tuple(rng.randrange(125) for _ in range(length)),
                behaviour_logprobs=tuple(rng.uniform(-6, -3) for _ in range(length)),
                finish="stop",
                index=index,
                purified=rescue,
                reward=float(success),
            )

        successes = number % (N + 1)
        originals = tuple(rollout(i, i < successes, False, prompt.tokens) for i in range(N))
        rescued = algorithm.rescue.mode != "none" and successes < 2
        prime = tuple(rollout(i, i < successes + 2, True, purified.tokens) for i in range(N)) if rescued else ()
        group = Group(prompt, originals, purified if rescued else None, prime)
        rebuilt = rebuild_group(group, algorithm.rescue, seed=0, step=0)
        groups.append(samples_of_group(rebuilt, algorithm.advantage, 32))
    return groups


def preset_gradients(
    folder: Path, reference_folder: Path, layout: ParallelConfig, budget: int, presets: list[str]
) -> dict[str, tuple[dict[str, float], dict[str, Tensor]]]:
    """For each preset the metrics and the HF-named gradient of one mini-batch with all its groups, on rank 0."""
    from lens_megatron.algorithms.loss_metrics import finish_metrics
    from lens_megatron.mcore.settings import OptimizerConfig
    from lens_megatron.mcore.step import accumulate_gradients, build_frozen, build_trainable
    from lens_megatron.update import evaluate_samples, minibatch_loss
    from lens_megatron.update_config import UpdateConfig

    spec = start(folder, layout)
    policy = build_trainable(spec, layout, folder, OptimizerConfig(), steps=1)
    reference = build_frozen(spec, layout, reference_folder)
    update = UpdateConfig(tokens_per_microbatch=budget)
    result: dict[str, Any] = {}
    for preset in presets:
        algorithm = load_algorithm(preset)
        groups = groups_for(algorithm)
        evaluated = evaluate_samples(groups, policy, reference, algorithm.loss, update, 0.9)
        batch = [e for group in evaluated for e in group]
        sequences = [torch.tensor((*e.sample.prompt_tokens, *e.sample.response)) for e in batch]
        loss = minibatch_loss(policy, batch, len(groups), sequences, algorithm.loss, update, 0.9)
        metrics, gradients, _ = named_gradients(
            policy, lambda sequences=sequences, loss=loss: accumulate_gradients(policy, sequences, loss, budget, 0.9)
        )
        result[preset] = (finish_metrics(metrics), gradients)
    return result


def trap_of_equation_5(folder: Path, layout: ParallelConfig) -> dict[str, float]:
    """Metrics of the first update of LENS: pi_theta is pi_old, so only the prompt can move a ratio from 1."""
    from lens_megatron.mcore.settings import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable
    from lens_megatron.update import evaluate_samples, update_policy
    from lens_megatron.update_config import UpdateConfig

    spec = start(folder, layout)
    policy = build_trainable(spec, layout, folder, OptimizerConfig(), steps=1)
    algorithm = load_algorithm({"preset": "lens", "loss": {"kl_coef": 0.0}})
    update = UpdateConfig(tokens_per_microbatch=64)
    evaluated = evaluate_samples(groups_for(algorithm), policy, None, algorithm.loss, update, 1.0)
    return update_policy(policy, evaluated, algorithm.loss, update, 1.0)


def embedding_norms(folder: Path, layout: ParallelConfig, sequences: list[Tensor], budget: int) -> list[Tensor]:
    from lens_megatron.mcore.embedding_gradients import embedding_gradient_norms
    from lens_megatron.mcore.settings import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable

    spec = start(folder, layout)
    policy = build_trainable(spec, layout, folder, OptimizerConfig(), steps=1)
    return embedding_gradient_norms(policy, sequences, budget)


def diagnostics(folder: Path, layout: ParallelConfig) -> dict[str, float]:
    from lens_megatron.diagnostics import after_update, before_update
    from lens_megatron.mcore.settings import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable
    from lens_megatron.update import evaluate_samples, update_policy
    from lens_megatron.update_config import UpdateConfig

    spec = start(folder, layout)
    policy = build_trainable(spec, layout, folder, OptimizerConfig(lr=1e-3), steps=1)
    algorithm = load_algorithm({"preset": "lens", "loss": {"kl_coef": 0.0}})
    update = UpdateConfig(tokens_per_microbatch=64)
    evaluated = evaluate_samples(groups_for(algorithm), policy, None, algorithm.loss, update, 1.0)
    metrics = before_update(policy, evaluated, algorithm.loss, update, 1.0)
    metrics |= update_policy(policy, evaluated, algorithm.loss, update, 1.0)
    return metrics | after_update(policy, evaluated, update, 1.0)


def learning_rates(folder: Path, minibatches: int, steps: int) -> list[float]:
    from lens_megatron.mcore.settings import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable
    from lens_megatron.update import evaluate_samples, update_policy
    from lens_megatron.update_config import UpdateConfig

    spec = start(folder, ParallelConfig())
    policy = build_trainable(spec, ParallelConfig(), folder, OptimizerConfig(lr=1e-4, schedule="linear"), steps=steps)
    algorithm = load_algorithm({"preset": "grpo", "loss": {"kl_coef": 0.0}})
    update = UpdateConfig(minibatches=minibatches, tokens_per_microbatch=64)
    rates = []
    for _ in range(steps):
        evaluated = evaluate_samples(groups_for(algorithm), policy, None, algorithm.loss, update, 1.0)
        rates.append(update_policy(policy, evaluated, algorithm.loss, update, 1.0)["lr"])
    return rates


def with_and_without_reuse(
    folder: Path, reference_folder: Path, preset: str
) -> list[tuple[dict[str, float], Any, int]]:
    """Metrics and gradients of the first mini-batch, pi_old scored and pi_old read off the pass; and how many were."""
    from lens_megatron.algorithms.loss_metrics import finish_metrics
    from lens_megatron.mcore.optimizer import OptimizerConfig
    from lens_megatron.mcore.step import accumulate_gradients, build_frozen, build_trainable
    from lens_megatron.update import UpdateConfig, evaluate_samples, minibatch_loss

    layout = ParallelConfig()
    spec = start(folder, layout)
    policy = build_trainable(spec, layout, folder, OptimizerConfig(), steps=1)
    reference = build_frozen(spec, layout, reference_folder)
    algorithm = load_algorithm(preset)
    groups = groups_for(algorithm)
    results = []
    for reuse in (False, True):
        update = UpdateConfig(tokens_per_microbatch=64, reuse_logprobs=reuse)
        evaluated = evaluate_samples(groups, policy, reference, algorithm.loss, update, 0.9)
        batch = [e for group in evaluated for e in group]
        sequences = [torch.tensor((*e.sample.prompt_tokens, *e.sample.response)) for e in batch]
        loss = minibatch_loss(policy, batch, len(groups), sequences, algorithm.loss, update, 0.9)
        metrics, gradients, _ = named_gradients(
            policy, lambda sequences=sequences, loss=loss: accumulate_gradients(policy, sequences, loss, 64, 0.9)
        )
        results.append((finish_metrics(metrics), gradients, sum(e.proximal_R is None for e in batch)))
    return results


def updated_weights(folder: Path, fused: bool | None) -> tuple[list[bool | None], dict[str, Tensor]]:
    """Two updates by torch's AdamW as one kernel or as many: what its groups say, and the weights."""
    from lens_megatron.mcore.optimizer import OptimizerConfig, optimizer_parts
    from lens_megatron.mcore.step import build_trainable
    from lens_megatron.update import UpdateConfig, evaluate_samples, update_policy

    spec = start(folder, ParallelConfig())
    policy = build_trainable(spec, ParallelConfig(), folder, OptimizerConfig(lr=1e-3, fused=fused), steps=2)
    algorithm = load_algorithm({"preset": "lens", "loss": {"kl_coef": 0.0}})
    update = UpdateConfig(tokens_per_microbatch=64, minibatches=2)
    evaluated = evaluate_samples(groups_for(algorithm), policy, None, algorithm.loss, update, 1.0)
    update_policy(policy, evaluated, algorithm.loss, update, 1.0)
    groups = [group for part in optimizer_parts(policy.optimizer.inner) for group in part.optimizer.param_groups]
    return [group["fused"] for group in groups], {n: t.clone() for n, t in policy.export_hf()}
