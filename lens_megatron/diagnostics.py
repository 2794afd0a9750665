"""Early signals of a rescue that teaches: more passes over the same batch, every `diagnostics.every` steps.

Before the update: the gradients of purified rollouts (P) and of the others (Y) apart, their norms and their cosine, and
rho_t of P as a whole distribution. After it: whether log pi(P | x) rose. The gradients come from Y alone, P alone and
both, of which only norms are kept, so that no second gradient buffer is needed:

    cosine = (|g_P + g_Y|^2 - |g_P|^2 - |g_Y|^2) / (2 |g_P| |g_Y|)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lens_megatron.algorithms.loss_config import LossConfig
from lens_megatron.mcore.step import Trainable, accumulate_gradients
from lens_megatron.update import Evaluated, minibatch_loss, replayed
from lens_megatron.update_config import UpdateConfig


def before_update(
    policy: Trainable, groups: Sequence[list[Evaluated]], loss: LossConfig, update: UpdateConfig, temperature: float
) -> dict[str, float]:
    """Nothing is changed but the gradient buffers, which the update clears."""
    purified = _purified(groups)
    if not purified:
        return {}
    whole = _norm(policy, groups, (True, True), loss, update, temperature)
    of_p = _norm(policy, groups, (True, False), loss, update, temperature)
    of_y = _norm(policy, groups, (False, True), loss, update, temperature)
    logprobs = response_logprobs(policy, purified, update, temperature)
    # a purified rollout's pi_old is under x', and always scored
    old = [e.proximal_R for e in purified if e.proximal_R is not None]
    rho_T = torch.cat([(now - proximal_R).exp() for now, proximal_R in zip(logprobs, old, strict=True)])
    metrics = {
        "diagnostics/grad_norm_purified": of_p,
        "diagnostics/grad_norm_original": of_y,
        "diagnostics/rho_purified_median": float(rho_T.median()),
        "diagnostics/logprob_purified_before": _mean_logprob(logprobs),
    }
    if of_p > 0 and of_y > 0:
        cosine = (whole**2 - of_p**2 - of_y**2) / (2 * of_p * of_y)
        metrics["diagnostics/grad_cosine"] = max(-1.0, min(1.0, cosine))
    return metrics


def after_update(
    policy: Trainable, groups: Sequence[list[Evaluated]], update: UpdateConfig, temperature: float
) -> dict[str, float]:
    purified = _purified(groups)
    if not purified:
        return {}
    return {
        "diagnostics/logprob_purified_after": _mean_logprob(response_logprobs(policy, purified, update, temperature))
    }


def response_logprobs(
    policy: Trainable, samples: Sequence[Evaluated], update: UpdateConfig, temperature: float
) -> list[torch.Tensor]:
    """log pi(y_t | x, y_<t) of each response, under the original prompt."""
    sequences = [torch.tensor((*e.sample.prompt_tokens, *e.sample.response)) for e in samples]
    with replayed(policy, [e.sample for e in samples], sequences):
        scores = policy.score(sequences, update.tokens_per_microbatch, temperature, entropy=False)
    return [row[len(e.sample.prompt_tokens) :] for row, e in zip(scores.logprobs, samples, strict=True)]


def _purified(groups: Sequence[list[Evaluated]]) -> list[Evaluated]:
    return [e for group in groups for e in group if e.sample.purified]


def _mean_logprob(logprobs: Sequence[torch.Tensor]) -> float:
    return float(torch.cat(list(logprobs)).mean())


def _norm(
    policy: Trainable,
    groups: Sequence[list[Evaluated]],
    keep: tuple[bool, bool],  # purified rollouts, the others
    loss: LossConfig,
    update: UpdateConfig,
    temperature: float,
) -> float:
    """Norm of the policy term's gradient with the other kind's advantages at 0; denominators stay the batch's."""
    batch = [
        e if keep[0 if e.sample.purified else 1] else replace(e, sample=replace(e.sample, advantage=0.0))
        for group in groups
        for e in group
    ]
    sequences = [torch.tensor((*e.sample.prompt_tokens, *e.sample.response)) for e in batch]
    # the policy term alone: KL, entropy bonus and imitation belong to neither kind's advantages
    term = replace(loss, kl_coef=0.0, entropy_coef=0.0, imitation_coef=0.0)
    if term.entropy_split is not None:
        term = replace(term, entropy_split=replace(term.entropy_split, high_kl_coef=0.0))
    function = minibatch_loss(policy, batch, len(groups), sequences, term, update, temperature)
    with replayed(policy, [e.sample for e in batch], sequences):
        accumulate_gradients(policy, sequences, function, update.tokens_per_microbatch, temperature)
    return policy.optimizer.norm()
