"""One policy update from samples: what each policy says of them, denominators counted once, mini-batches, epochs.

Every rank calls with the same samples and gets the same metrics.

    behaviour   what the engine said when it sampled, under x_roll
    proximal    pi_old: the trainer's weights before this update, under x_roll (x' for purified rollouts: Eq. 5)
    current     pi_theta, under x, for all
    reference   under x, for all

The engine's choice of experts, where it is known (rollout.routing_replay), is proximal's and current's as well: of prompt
and response under x_roll, of the response under another prompt. The reference's routers choose for themselves.

Shapes: R response tokens of one sample, F tokens of all sequences end to end (mcore/batch.py), T of one pack, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lens_megatron.algorithms.loss_config import LossConfig, required_inputs
from lens_megatron.algorithms.loss_inputs import Denominators, LossInputs, count_denominators
from lens_megatron.algorithms.loss_metrics import finish_metrics
from lens_megatron.algorithms.policy_loss import policy_loss
from lens_megatron.algorithms.token_masks import high_entropy_masks
from lens_megatron.mcore.batch import PackedBatch
from lens_megatron.mcore.context import sum_over_sequences
from lens_megatron.mcore.logprobs import TokenScores
from lens_megatron.mcore.routing import replay_routing
from lens_megatron.mcore.runtime import device
from lens_megatron.mcore.step import LossFunction, ShardedModel, Trainable, train_step
from lens_megatron.routed_experts import Routing
from lens_megatron.samples import number_tensor, split_groups, token_tensor
from lens_megatron.types import Sample
from lens_megatron.update_config import UpdateConfig


@dataclass(frozen=True)
class Evaluated:
    """A sample and what the policies that do not change during the update say of its response."""

    sample: Sample
    proximal_R: Tensor | None  # None: the current policy's, detached (only `current_is_proximal` says so)
    reference_R: Tensor | None
    proximal_original_R: Tensor | None  # under x
    proximal_purified_R: Tensor | None  # under x', or x where there is none
    trusted_R: Tensor | None = None  # False: no policy gradient (guards.on_logprob_diff); None: all are trusted


class _Text(NamedTuple):
    """A response under some prompt, as it is scored: once, however often it is asked for."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    routing: Routing | None


def _under(sample: Sample, prompt: tuple[int, ...]) -> _Text:
    return _Text(prompt, sample.response, _routing_under(sample, prompt))


def _routing_under(sample: Sample, prompt: tuple[int, ...]) -> Routing | None:
    if sample.routing is None or prompt == sample.roll_tokens:
        return sample.routing
    return sample.routing.under(len(prompt), len(sample.roll_tokens))


def replayed(
    policy: ShardedModel, samples: Sequence[Sample], sequences: Sequence[Tensor]
) -> AbstractContextManager[None]:
    """Around passes of `sequences`, which are the samples under x."""
    return replay_routing(policy.chunks, sequences, [_routing_under(s, s.prompt_tokens) for s in samples])


def current_is_proximal(
    sample: Sample, first_minibatch: bool, loss: LossConfig, update: UpdateConfig, staleness: int
) -> bool:
    """Whether pi_old of this sample is pi_theta of the pass that trains on it, so that no pass of its own is needed.

    The weights must not have moved (first mini-batch, the batch visited once, nothing stale), and the prompt must be the
    one trained under: a purified rollout's pi_old is under x', and its ratio is what LENS is about.
    """
    same_weights = first_minibatch and update.epochs == 1 and staleness == 0
    same_prompt = not sample.purified and sample.roll_tokens == sample.prompt_tokens
    # an entropy split makes a pass over the whole mini-batch first, and these losses ask for pi_old under x as well
    needed = required_inputs(loss)
    own_pass = {"high_entropy_T", "proximal_original_logprobs_T", "proximal_purified_logprobs_T"} & needed
    return update.reuse_logprobs and update.old_logprobs == "megatron" and same_weights and same_prompt and not own_pass


def evaluate_samples(
    groups: Sequence[list[Sample]],
    policy: ShardedModel,
    reference: ShardedModel | None,
    loss: LossConfig,
    update: UpdateConfig,
    temperature: float,
    staleness: int = 0,
) -> list[list[Evaluated]]:
    """The proximal and the reference policy's log-probs that this loss needs; each sequence is scored once, if at all.

    The groups must be those of a whole step, in the order that `update_policy` gets them.
    """
    needed = required_inputs(loss)
    samples = [sample for group in groups for sample in group]
    first = sum(len(group) for group in split_groups(groups, update.minibatches)[0]) if groups else 0
    reused = [current_is_proximal(s, place < first, loss, update, staleness) for place, s in enumerate(samples)]
    scored = [] if update.old_logprobs == "engine" else samples
    under_roll = [_under(s, s.roll_tokens) for s, reuse in zip(scored, reused, strict=False) if not reuse]
    asks_for_x = "proximal_original_logprobs_T" in needed
    under_x = [_under(s, s.prompt_tokens) for s in samples if asks_for_x and s.roll_tokens != s.prompt_tokens]
    under_x_prime = (
        [_under(s, s.purified_tokens or s.prompt_tokens) for s in samples]
        if "proximal_purified_logprobs_T" in needed
        else []
    )
    proximal = _score_responses(policy, [*under_roll, *under_x, *under_x_prime], update, temperature)
    of_reference: Mapping[_Text, Tensor] = {}
    if "reference_logprobs_T" in needed:
        if reference is None:
            raise ValueError("this loss has a KL term, and no reference was built")
        texts = [_Text(s.prompt_tokens, s.response, None) for s in samples]
        of_reference = _score_responses(reference, texts, update, temperature)

    def proximal_of(s: Sample, reuse: bool) -> Tensor | None:
        if update.old_logprobs == "engine":
            return number_tensor(s.behaviour_logprobs)
        return None if reuse else proximal[_under(s, s.roll_tokens)]

    def evaluated(s: Sample, reuse: bool) -> Evaluated:
        under_roll_R = proximal_of(s, reuse)
        under_x_R = under_roll_R if s.roll_tokens == s.prompt_tokens else proximal.get(_under(s, s.prompt_tokens))
        return Evaluated(
            sample=s,
            proximal_R=under_roll_R,
            reference_R=of_reference[_Text(s.prompt_tokens, s.response, None)] if of_reference else None,
            proximal_original_R=under_x_R if asks_for_x else None,  # the engine's, where pi_old is the engine's
            proximal_purified_R=proximal[_under(s, s.purified_tokens or s.prompt_tokens)] if under_x_prime else None,
        )

    places = iter(reused)
    return [[evaluated(sample, next(places)) for sample in group] for group in groups]


def update_policy(
    policy: Trainable,
    groups: Sequence[list[Evaluated]],
    loss: LossConfig,
    update: UpdateConfig,
    temperature: float,
) -> dict[str, float]:
    """Trains on the groups; metrics are means over the updates made (maxima: the largest)."""
    history: list[dict[str, float]] = []
    for _ in range(update.epochs):
        for part in split_groups(groups, update.minibatches):
            batch = [evaluated for group in part for evaluated in group]
            sequences = [token_tensor(e.sample.prompt_tokens, e.sample.response) for e in batch]
            loss_function = minibatch_loss(policy, batch, len(part), sequences, loss, update, temperature)
            with replayed(policy, [e.sample for e in batch], sequences):
                result = train_step(
                    policy,
                    sequences,
                    loss_function,
                    tokens_per_microbatch=update.tokens_per_microbatch,
                    temperature=temperature,
                    advance_schedule=not any(metrics["skipped"] == 0.0 for metrics in history),
                )
            metrics = finish_metrics(result.metrics)
            metrics.update(grad_norm=result.grad_norm, lr=result.learning_rate, skipped=float(not result.updated))
            if update.old_logprobs == "engine":  # compared with itself the engine always agrees
                metrics = {name: value for name, value in metrics.items() if not name.startswith("logprob_diff")}
            history.append(metrics)
    return _mean_over_updates(history)


def minibatch_loss(
    policy: ShardedModel,
    batch: Sequence[Evaluated],
    groups: int,
    sequences: Sequence[Tensor],
    loss: LossConfig,
    update: UpdateConfig,
    temperature: float,
) -> LossFunction:
    """The loss of any pack of this mini-batch, as a share of the mini-batch's."""
    masks = None
    if loss.entropy_split is not None:  # decided before the batch is cut, by the current weights, under x
        with replayed(policy, [e.sample for e in batch], sequences):
            scores = policy.score(sequences, update.tokens_per_microbatch, temperature)
        entropies = [_response_part(e, entropy) for e, entropy in zip(batch, scores.entropies, strict=True)]
        masks = high_entropy_masks(entropies, loss.entropy_split)
    purified = [e.sample.purified for e in batch]
    lengths = [len(e.sample.response) for e in batch]
    denominators = count_denominators(loss, lengths, purified, groups, masks)
    behaviour = [number_tensor(e.sample.behaviour_logprobs) for e in batch]
    return loss_of_pack(batch, behaviour, masks, denominators, loss)


def loss_of_pack(
    batch: Sequence[Evaluated],
    behaviour: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    denominators: Denominators,
    config: LossConfig,
) -> LossFunction:
    where = device()
    is_response_F = _flat(batch, [torch.ones(len(e.sample.response), dtype=torch.bool) for e in batch])
    flat: dict[str, Tensor | None] = {
        "behaviour_logprobs_T": _flat(batch, behaviour),
        "reference_logprobs_T": _flat(batch, [e.reference_R for e in batch]),
        "proximal_original_logprobs_T": _flat(batch, [e.proximal_original_R for e in batch]),
        "proximal_purified_logprobs_T": _flat(batch, [e.proximal_purified_R for e in batch]),
        "high_entropy_T": _flat(batch, list(masks)) if masks is not None else None,
        "trusted_T": _trusted(batch),
    }
    advantages_S = torch.tensor([e.sample.advantage for e in batch], device=where)
    weights_S = torch.tensor([e.sample.weight for e in batch], device=where)
    purified_S = torch.tensor([e.sample.purified for e in batch], device=where)
    lengths_S = torch.tensor([len(e.sample.response) for e in batch], device=where)
    proximal = [torch.zeros(len(e.sample.response)) if e.proximal_R is None else e.proximal_R for e in batch]
    proximal_F = _flat(batch, proximal)
    reused_S = torch.tensor([e.proximal_R is None for e in batch], device=where)
    assert is_response_F is not None and proximal_F is not None

    def loss(logprobs_T: Tensor, entropy_T: Tensor, pack: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        place_T = pack.target_T.clamp(min=0)
        response_mask_T = (pack.target_T >= 0) & is_response_F[place_T]
        reused_T = response_mask_T & reused_S[pack.sequence_T]
        here = {name: None if values_F is None else values_F[place_T] for name, values_F in flat.items()}
        inputs = LossInputs(
            current_logprobs_T=logprobs_T,
            entropy_T=entropy_T,
            proximal_logprobs_T=torch.where(reused_T, logprobs_T.detach(), proximal_F[place_T]),
            response_mask_T=response_mask_T,
            sample_T=pack.sequence_T,
            advantages_S=advantages_S,
            weights_S=weights_S,
            purified_S=purified_S,
            response_lengths_S=lengths_S,
            sum_over_sample=lambda values_T: sum_over_sequences(values_T, pack.sequence_T, len(batch)),
            **here,
        )
        return policy_loss(inputs, config, denominators)

    return loss


def _flat(batch: Sequence[Evaluated], values: Sequence[Tensor | None]) -> Tensor | None:
    """Response values in their places among all tokens of the batch; 0 (False) at prompt tokens."""
    if any(value is None for value in values):
        return None
    parts: list[Tensor] = []
    for evaluated, value in zip(batch, values, strict=True):
        assert value is not None
        parts += [value.new_zeros(len(evaluated.sample.prompt_tokens)), value]
    return torch.cat(parts).to(device())


def _trusted(batch: Sequence[Evaluated]) -> Tensor | None:
    if all(e.trusted_R is None for e in batch):
        return None
    return _flat(
        batch, [torch.ones(len(e.sample.response)).bool() if e.trusted_R is None else e.trusted_R for e in batch]
    )


def _response_part(evaluated: Evaluated, values: Tensor) -> Tensor:
    return values[len(evaluated.sample.prompt_tokens) :]


def _score_responses(
    model: ShardedModel,
    texts: Sequence[_Text],
    update: UpdateConfig,
    temperature: float,
) -> dict[_Text, Tensor]:
    """Log-probs of the response tokens of each text; equal ones are scored once."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    sequences = [token_tensor(text.prompt, text.response) for text in unique]
    with replay_routing(model.chunks, sequences, [text.routing for text in unique]):
        scores: TokenScores = model.score(sequences, update.tokens_per_microbatch, temperature, entropy=False)
    return {text: logprobs[len(text.prompt) :] for text, logprobs in zip(unique, scores.logprobs, strict=True)}


def _mean_over_updates(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for metrics in history for name in metrics)
    result = {}
    for name in names:
        # a mean over nothing (no purified rollout) is left out; a loss that is not a number must stay seen
        always = name in ("loss", "policy_loss", "grad_norm")
        values = [m[name] for m in history if name in m and (always or m[name] == m[name])]
        if values:
            result[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return result
