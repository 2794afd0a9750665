"""Random mini-batches, and three ways to hand them to the loss: whole, cut into micro-batches, spread over CP ranks."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lens_megatron.algorithms.advantages import AdvantageConfig, group_advantages
from lens_megatron.algorithms.loss_config import LossConfig, required_inputs
from lens_megatron.algorithms.loss_inputs import Denominators, LossInputs, count_denominators
from lens_megatron.algorithms.policy_loss import policy_loss
from lens_megatron.algorithms.token_masks import high_entropy_masks

from .slow_loss import SlowSample

Logprobs = list[Tensor]  # log pi_theta of each sample's response, requiring grad


def random_minibatch(
    seed: int, loss: LossConfig, advantage: AdvantageConfig | None = None, rescued: bool = True
) -> tuple[list[SlowSample], list[list[float]]]:
    """Three groups (one rescued, one mixed, one all failures unless rescued) and log pi_theta of their rollouts."""
    rng = random.Random(seed)
    advantage = advantage or AdvantageConfig()
    noise = 3 * max(loss.clip_high, 1e-4) if loss.ratio != "token" else 0.4
    members = [
        ([1.0, 1.0, 0.0, 0.0, 1.0], [False, False, False, rescued, rescued], 0.25),
        ([1.0, 0.0, 1.0, 1.0], [False] * 4, 0.75),
        ([1.0, 0.0, 0.0], [rescued, False, False], 0.0 if rescued else 1 / 3),
    ]
    batch, current = [], []
    for group, (rewards, purified, a) in enumerate(members):
        rewards = [1.0 if is_purified else reward for reward, is_purified in zip(rewards, purified, strict=True)]
        result = group_advantages(
            torch.tensor(rewards, dtype=torch.float64),
            torch.tensor(rewards) > 0.5,
            torch.tensor(purified),
            a,
            advantage,
        )
        for place, is_purified in enumerate(purified):
            now = [-rng.expovariate(1.0) - 0.01 for _ in range(rng.randint(1, 9))]

            def near(scale: float, now: list[float] = now) -> list[float]:
                return [value + rng.gauss(0, scale) for value in now]

            under_x = near(noise)
            under_x_prime = near(2 * noise) if any(purified) else under_x
            proximal = under_x_prime if is_purified else under_x
            batch.append(
                SlowSample(
                    group=group,
                    advantage=float(result.advantages_M[place]),
                    weight=float(result.weights_M[place]),
                    purified=is_purified,
                    proximal=proximal,
                    behaviour=[value + rng.gauss(0, 0.5) for value in proximal],
                    reference=near(0.5),
                    under_x=under_x,
                    under_x_prime=under_x_prime,
                    entropy=[rng.expovariate(1.0) for _ in now],
                )
            )
            current.append(now)
    order = list(range(len(batch)))
    rng.shuffle(order)
    batch, current = [batch[i] for i in order], [current[i] for i in order]
    if loss.entropy_split is not None:
        masks = high_entropy_masks([torch.tensor(s.entropy, dtype=torch.float64) for s in batch], loss.entropy_split)
        for sample, mask in zip(batch, masks, strict=True):
            sample.high = mask.tolist()
    return batch, current


def as_parameters(current: Sequence[Sequence[float]]) -> Logprobs:
    return [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in current]


def denominators_of(batch: Sequence[SlowSample], config: LossConfig) -> Denominators:
    return count_denominators(
        config,
        [len(sample) for sample in batch],
        [sample.purified for sample in batch],
        len({sample.group for sample in batch}),
        None if config.entropy_split is None else [torch.tensor(sample.high) for sample in batch],
    )


def pack(
    samples: Sequence[SlowSample],
    logprobs: Sequence[Tensor],
    config: LossConfig,
    keep: Sequence[Sequence[int]] | None = None,
    **extra: object,
) -> LossInputs:
    """Samples as one packed micro-batch, with prompt tokens before and padding after each, all of them NaN.

    `keep`: the token positions of each sample that this rank holds.
    """
    keep = [range(len(sample)) for sample in samples] if keep is None else keep
    gap = torch.full((2,), torch.nan, dtype=torch.float64)

    def tokens(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [torch.cat((gap, value[list(held)], gap[:1])) for value, held in zip(values, keep, strict=True)]
        )

    def column(name: str) -> Tensor:
        return tokens([torch.tensor(getattr(sample, name), dtype=torch.float64) for sample in samples])

    optional = {
        "behaviour_logprobs_T": "behaviour",
        "reference_logprobs_T": "reference",
        "proximal_original_logprobs_T": "under_x",
        "proximal_purified_logprobs_T": "under_x_prime",
    }
    needed = required_inputs(config)
    fields: dict[str, object] = {field: column(name) for field, name in optional.items() if field in needed}
    if "high_entropy_T" in needed:
        fields["high_entropy_T"] = column("high") > 0.5
    inputs = LossInputs(
        current_logprobs_T=tokens(logprobs),
        entropy_T=column("entropy"),
        proximal_logprobs_T=column("proximal"),
        response_mask_T=~column("proximal").isnan(),
        sample_T=torch.cat([torch.full((len(held) + 3,), index) for index, held in enumerate(keep)]),
        advantages_S=torch.tensor([sample.advantage for sample in samples], dtype=torch.float64),
        weights_S=torch.tensor([sample.weight for sample in samples], dtype=torch.float64),
        purified_S=torch.tensor([sample.purified for sample in samples]),
        response_lengths_S=torch.tensor([len(sample) for sample in samples]),
        **fields,
    )
    return dataclasses.replace(inputs, **extra)


def whole(batch: list[SlowSample], logprobs: Logprobs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    return policy_loss(pack(batch, logprobs, config), config, denominators_of(batch, config))


def cut(
    batch: list[SlowSample], logprobs: Logprobs, config: LossConfig, pieces: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each piece, a list of sample indices, as a micro-batch of its own."""
    denominators = denominators_of(batch, config)
    loss, sums = torch.zeros((), dtype=torch.float64), {}
    for piece in pieces:
        inputs = pack([batch[i] for i in piece], [logprobs[i] for i in piece], config)
        share, more = policy_loss(inputs, config, denominators)
        loss, sums = loss + share, merge_sums(sums, more)
    return loss, sums


def spread_over_ranks(
    batch: list[SlowSample], logprobs: Logprobs, config: LossConfig, ranks: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens of every sample dealt out to `ranks` threads, which meet in sum_over_sample as in an all-reduce."""
    rng = random.Random(seed)
    owner = [[rng.randrange(ranks) for _ in range(len(sample))] for sample in batch]
    denominators = denominators_of(batch, config)
    barrier = threading.Barrier(ranks, timeout=30)
    slots: list[Tensor] = [torch.empty(0)] * ranks
    results: list[tuple[Tensor, dict[str, Tensor]]] = [(torch.empty(0), {})] * ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        keep = [[t for t, who in enumerate(owners) if who == rank] for owners in owner]
        sample_T = torch.cat([torch.full((len(held) + 3,), index) for index, held in enumerate(keep)])

        def all_reduced_sum(value_T: Tensor) -> Tensor:
            slots[rank] = value_T.new_zeros(len(batch)).index_add(0, sample_T, value_T)
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        try:
            inputs = pack(batch, logprobs, config, keep, sum_over_sample=all_reduced_sum)
            results[rank] = policy_loss(inputs, config, denominators)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    sums: dict[str, Tensor] = {}
    for _, more in results:
        sums = merge_sums(sums, more)
    return torch.stack([loss for loss, _ in results]).sum(), sums


def gradient(loss: Tensor, logprobs: Logprobs) -> Tensor:
    grads = torch.autograd.grad(loss, logprobs, allow_unused=True)
    return torch.cat([torch.zeros_like(p) if g is None else g for p, g in zip(logprobs, grads, strict=True)])


def merge_sums(total: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two micro-batches' sums as one."""
    merged = dict(total)
    for name, value in more.items():
        if name not in merged:
            merged[name] = value
        else:
            merged[name] = torch.maximum(merged[name], value) if name.endswith("/max") else merged[name] + value
    return merged
