"""What each guard compares and says. Pure: numbers in, GuardFailed out. `docs/trust.md` has one row a guard.

Shapes: R response tokens of one sample, T tokens of the probe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lens_megatron.errors import RunError


class GuardFailed(RunError):
    """A guard that does not hold. Its name is the key of `guards:` that turns it off or moves its bound."""

    def __init__(self, guard: str, message: str) -> None:
        super().__init__(f"guard {guard}: {message}")
        self.guard = guard


def mean_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Mean |difference| over all tokens; 0 over none. NaN stays NaN."""
    count = sum(part.numel() for part in first)
    total = sum(float((a.double() - b.double()).abs().sum()) for a, b in zip(first, second, strict=True))
    return total / count if count else 0.0


def over(value: float, bound: float) -> bool:
    """NaN is over every bound."""
    return not value <= bound


def hf_parity(who: str, folder: str, logprobs_T: Tensor, expected_T: Tensor, bound: float) -> float:
    difference = mean_difference([logprobs_T], [expected_T])
    if over(difference, bound):
        gap_T = (logprobs_T - expected_T).abs().nan_to_num(math.inf)
        worst = int(gap_T.argmax())
        raise GuardFailed(
            "hf_parity",
            f"the {who} in this layout does not compute what {folder} says: log-probs of {len(expected_T)} probe tokens "
            f"differ by {difference:.3g} on average (bound {bound:g}), most at token {worst + 1}: {logprobs_T[worst]:.3f} "
            f"for {expected_T[worst]:.3f}; a weight is misplaced on loading, or config.json (rope_theta, norm, heads) is "
            "not what the model was trained with (if rounding explains it: guards.logprob_tolerance)",
        )
    return difference


def export_parity(folder: str, different: Sequence[tuple[str, str]], total: int) -> None:
    if different:
        name, how = different[0]
        raise GuardFailed(
            "export_parity",
            f"{len(different)} of {total} tensors leave for the engine other than {folder} has them, first {name} ({how}); "
            "the mapping from Megatron to HF names and layouts is wrong: do not train with it",
        )


def first_step(policy: Sequence[Tensor], reference: Sequence[Tensor], bound: float) -> float:
    difference = mean_difference(policy, reference)
    if over(difference, bound):
        gaps = [(r - p).double() for p, r in zip(policy, reference, strict=True)]
        kl = sum(float((gap.exp() - 1 - gap).sum()) for gap in gaps)
        count = max(1, sum(part.numel() for part in policy))
        raise GuardFailed(
            "first_step",
            f"policy and reference were loaded from the same weights, and before the first update their log-probs of the "
            f"responses differ by {difference:.3g} on average (bound {bound:g}), KL {kl / count:.3g} for 0; one of them was "
            "loaded or moved wrongly, or is scored at another temperature",
        )
    return difference


def first_kl(kl: float, bound: float) -> None:
    if over(abs(kl), bound):
        raise GuardFailed(
            "first_step",
            f"policy and reference were loaded from the same weights, and in the first update the KL between them is {kl:.3g} "
            f"for 0 (bound {bound:g}); one of them was loaded or moved wrongly, or is scored at another temperature",
        )


def engine_difference(originals: float, purified: float | None, bound: float, temperature: float) -> None:
    worst = max(originals, purified if purified is not None else -math.inf)
    if math.isnan(originals) or (purified is not None and math.isnan(purified)):
        worst = math.nan
    if not over(worst, bound):
        return
    if purified is not None and not over(originals, bound):
        raise GuardFailed(
            "logprob_diff",
            f"log-probs of purified rollouts differ by {purified:.3g} on average between trainer and engine (bound "
            f"{bound:g}), of the others by {originals:.3g}: pi_old was scored under another prompt than the engine sampled "
            "under (x' for purified rollouts)",
        )
    raise GuardFailed(
        "logprob_diff",
        f"log-probs differ by {worst:.3g} on average between trainer and engine (bound {bound:g}): the engine has other "
        f"weights, one side does not apply rollout.temperature {temperature:g}, or their routers took other experts (then "
        "rollout.routing_replay helps); guards.on_logprob_diff can mask tokens or drop sequences instead, "
        "guards.logprob_diff move the bound",
    )


def left_out(share: float, most: float, what: str) -> None:
    if over(share, most):
        raise GuardFailed(
            "most_left_out",
            f"{share:.0%} of the response tokens are left out of the update as {what} (at most {most:.0%}): this is no "
            "rounding; see logprob_diff in metrics.jsonl, and whether trainer and engine have the same model and temperature",
        )


def weight_version(versions: Sequence[int], oldest: int, newest: int) -> None:
    wrong = [version for version in versions if not oldest <= version <= newest]
    if wrong:
        expected = f"{newest}" if oldest == newest else f"{oldest} to {newest}"
        raise GuardFailed(
            "engine_weights",
            f"{len(wrong)} of {len(versions)} rollouts were sampled with weights of version {min(wrong)}, for {expected}: "
            "the engine did not take the last sync",
        )


def engine_checksums(sent: Mapping[str, str], held: Mapping[str, str], version: int) -> None:
    different = [name for name, value in held.items() if sent.get(name) != value]
    if different:
        missing = [name for name in different if name not in sent]
        how = "never left the trainer" if missing else "differs from what was sent"
        raise GuardFailed(
            "engine_weights",
            f"after the sync of version {version}, {len(different)} of {len(held)} weights of the engine are not the "
            f"trainer's, first {(missing or different)[0]} ({how}): the sync did not take effect",
        )


def replicas(who: str, names: Sequence[str], ranks: str, step: int) -> None:
    if names:
        raise GuardFailed(
            "replicas_every",
            f"step {step}: {len(names)} weights of the {who} differ between ranks that hold the same part ({ranks}), first "
            f"{names[0]}: a replica was damaged (memory, a missed gather); resume from the last checkpoint, and look at this "
            "rank's GPU with `dcgmi diag`",
        )


def resume_parity(folder: str, saved: Mapping[str, int], loaded: Mapping[str, int]) -> None:
    different = [name for name in saved if loaded.get(name) != saved[name]]
    if different:
        zero = [name for name in different if loaded.get(name) == 0]
        how = f"{zero[0]} is all zeros now" if zero else f"{different[0]} is not what was saved"
        raise GuardFailed(
            "resume_parity",
            f"{folder}: what was loaded differs from what was saved in {', '.join(different)} ({how}): training would go on "
            "from another state without a word; load an earlier checkpoint",
        )


def skipped(in_row: int, most: int, loss: float, grad_norm: float) -> None:
    if most and in_row >= most:
        raise GuardFailed(
            "skipped_in_row",
            f"no finite update for {in_row} steps in a row (loss {loss:g}, gradient norm {grad_norm:g}): the weights are as "
            "they were before; lower optimizer.lr, or look for NaN in the data's rewards and in logprob_diff",
        )


def entropy_masks(high: float, low: float) -> None:
    if high < low:
        raise GuardFailed(
            "entropy_masks",
            f"tokens masked as of high entropy have {high:.4g} on average, the others {low:.4g}: the masks are the wrong way "
            "round, or belong to other tokens",
        )


def reward_failures(failed: float, judged: float, most: float) -> None:
    if judged and over(failed / judged, most):
        raise GuardFailed(
            "reward_failures",
            f"{failed:.0f} of {judged:.0f} judgements of this step timed out or died (at most {most:.0%}) and count as 0: "
            "raise rewards.seconds, wall_seconds or memory_mib, or look at the reward function",
        )


def token_outliers(proximal_R: Tensor, behaviour_R: Tensor, bound: float) -> Tensor:
    """True where trainer and engine agree well enough to train on the token; NaN does not agree."""
    return (proximal_R - behaviour_R).abs() <= bound


def probe_text(vocab_size: int, count: int) -> list[int]:
    """Token ids spread over the vocabulary, the same on every machine."""
    generator = torch.Generator().manual_seed(20260121)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()
