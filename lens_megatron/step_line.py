"""A step's line in metrics.jsonl: what it always has, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

from lens_megatron.errors import UsageError

# null where nothing was measured (no purified rollouts, no KL term), 0 seconds where nothing was done. A step is saved after
# its line is written, so that a resumed run misses no line: its time/save stands in the next step's.
_MEASURED = ("step", "reward", "success", "zero_reward_ratio", "purified_ratio", "improved_ratio", "deleted_tokens",
             "loss", "kl", "entropy", "grad_norm", "response_tokens", "logprob_diff", "ratio_purified", "ratio_original",
             "clip_fraction", "tokens")  # fmt: skip
_TIMED = ("step", "score", "generate", "reward", "logprobs", "train", "sync", "save")
EVERY_STEP = {**dict.fromkeys(_MEASURED), **{f"time/{name}": 0.0 for name in _TIMED}}


def check_keep_best(metric: str | None, metrics: Collection[str], sure: bool = True) -> None:
    """`sure`: these are all metrics that there are. Before the first step they are not: only a slip of the pen is found."""
    if metric is None or metric in metrics:
        return
    near = get_close_matches(metric, metrics, n=1, cutoff=0.6 if sure else 0.9)
    if sure or near:
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"checkpoint.keep_best: there is no metric {metric!r}{hint}")
