"""Run folders as the loop would leave them, with numbers that follow simple rules."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

from lens_megatron.rollout_table import RolloutRow
from lens_megatron.run_folder import RunFolder

HOSTILE = (
    '</script><script>document.title="owned";throw 1</script><img src=x onerror="document.title=1">\u2028 &lt; \ud83d'
)
PIECES = re.findall(r"<.*?>|\s?\w+|\W", "<|user|>\nAnna has 3 apples, by the way, and buys 4. How many?")


def make_run(path: Path, algorithm: str, steps: int = 6, seed: int = 0, **differences: Any) -> RunFolder:
    """success k / 20 at step k for grpo; LENS learns twice as fast and pays 1.25 times the step."""
    lens = algorithm == "lens"
    noise = random.Random(seed)
    folder = RunFolder.create(path)
    folder.write_config({"model": "toy", "run_dir": str(path), "algorithm": {"preset": algorithm}, **differences})
    folder.write_versions()
    for step in range(1, steps + 1):
        folder.append_metrics(step_metrics(step, lens, steps, noise if steps > 6 else None))
        if step in (1, steps // 2, steps):
            folder.write_rollouts(step, rollouts(step, lens))
    folder.close()
    return folder


def step_metrics(step: int, lens: bool, steps: int, noise: random.Random | None) -> dict[str, Any]:
    def shaky(value: float) -> float:
        return value * (1 + 0.15 * noise.gauss(0, 1)) if noise else value

    if steps <= 6:
        success = step / 20 * (2 if lens else 1)
    else:
        success = min(1.0, shaky(0.2 + 0.5 * (1 - math.exp(-step / steps * (5 if lens else 3)))))
    zero = max(0.0, 0.6 - success * 0.8)
    metrics: dict[str, Any] = {
        "step": step,
        "reward": success,
        "success": success,
        "zero_reward_ratio": zero,
        "zero_signal_ratio": zero + 0.05,
        "success_trained": min(1.0, success + 0.2 * zero) if lens else success,
        "zero_reward_ratio_trained": zero * 0.4 if lens else zero,
        "loss": shaky(0.01),
        "kl": shaky(0.001 * step),
        "entropy": shaky(1.2 / (1 + step / steps)),
        "grad_norm": shaky(0.4),
        "response_tokens": shaky(300 + 200 * step / steps),
        "logprob_diff": shaky(2e-6),
        "ratio_original": shaky(1.0),
        "clip_fraction": shaky(0.01),
        "tokens": 40_000,
        "purified_ratio": 0.0,
        "improved_ratio": 0.0,
        "deleted_tokens": 0.0,
    }
    rest = (1 - zero) / 4
    for group, failed in (("original", zero), ("trained", zero * 0.4)):
        shares = (failed, rest, rest, rest, rest + zero - failed)
        for name, share in zip(("failure", "low", "mid", "high", "solved"), shares, strict=True):
            metrics[f"success_distribution/{group}/{name}"] = share
    times = {"score": 0.5, "generate": 4.0, "reward": 0.25, "logprobs": 1.0, "train": 2.0, "sync": 0.25, "save": 0.0}
    if lens:
        times["generate"] = 6.0
        metrics |= {
            "purified_ratio": zero,
            "improved_ratio": 0.4,
            "deleted_tokens": shaky(30 * zero),
            "ratio_purified": shaky(0.7),
            "kl_purified": shaky(0.002 * step),
            "clip_fraction_purified": shaky(0.05),
            "rescue/replaced": 0.1,
        }
    total = 10.0 if lens else 8.0
    metrics |= {f"time/{name}": seconds for name, seconds in times.items()}
    metrics["time/step"] = total + (30.0 if step == 1 else 0.0)  # a warm-up, which Table 5 leaves out
    if step % (2 if steps <= 6 else 20) == 0:
        metrics |= {"eval/math500": success * 0.9, "eval/average": success * 0.8}
    return metrics


def rollouts(step: int, lens: bool, prompts: int = 4, n: int = 4) -> list[RolloutRow]:
    """Prompt p has p successes of n. LENS purifies p = 0 (in vain) and p = 1 (two new successes)."""
    rows = []
    ids = list(range(len(PIECES)))
    for p in range(prompts):
        scores = [None] + [0.0 if place % 5 == 0 else 10.0 ** (-abs(place - 7) / 4) for place in ids[1:]]
        deleted = [6, 7, 8] if lens and p < 2 else []
        shared: dict[str, Any] = {
            "step": step,
            "prompt_id": f"toy-{p}",
            "source": "toy",
            "answer": "7",
            "question": "Anna has 3 apples, by the way, and buys 4. How many?",
            "prompt_tokens": ids,
            "prompt_pieces": PIECES,
            "scores": scores if lens else [],
            "deleted": deleted,
            "response": [5] * 20,
            "finish": "stop",
            "behaviour_logprobs": [-0.5] * 20,
            "proximal_logprobs": None,
            "weight_version": step,
        }
        for index in range(n):
            success = index < p
            gone = lens and p == 1 and index >= 2
            rows.append(
                RolloutRow(
                    **shared,
                    index=index,
                    purified=False,
                    origin="success" if success else "removed" if gone else "failure",
                    trained=not gone,
                    roll_tokens=ids,
                    response_text="3 + 4 = 7\nThe answer is 7." if success else f"3 + 5 = 8 {HOSTILE}",
                    reward=float(success),
                    success=success,
                    advantage=None if gone else (1.0 if success else -1.0),
                    weight=None if gone else 0.5,
                )
            )
        for index in range(n if deleted else 0):
            success = p == 1 and index < 2
            rows.append(
                RolloutRow(
                    **shared,
                    index=index,
                    purified=True,
                    origin="purified" if success else "unused",
                    trained=success,
                    roll_tokens=[place for place in ids if place not in deleted],
                    response_text="Step 1: 3 apples.\nStep 2: 4 more.\nThe answer is 7."
                    if success
                    else "The answer is 12.",
                    reward=float(success),
                    success=success,
                    advantage=1.2 if success else None,
                    weight=0.75 if success else None,
                )
            )
    return rows
