"""The code that only GPUs take, run on a device that computes nothing: shapes, devices, memory, and where the host waits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if torch.version.cuda is not None:
    pytest.skip("this torch's CUDA device is a real one", allow_module_level=True)
if shutil.which(os.environ.get("CXX", "g++")) is None:
    pytest.skip("the fake device is built with a C++ compiler", allow_module_level=True)

METRICS = "lens_megatron/mcore/step.py"
NORM = "megatron/core/optimizer/clip_grads.py"
SCORES = "lens_megatron/mcore/logprobs.py"


def run(case: str, arguments: Any) -> Any:
    command = [sys.executable, "-m", "tests.mcore.fake_cuda_cases", case, json.dumps(arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def files(waits: dict[str, int]) -> dict[str, int]:
    """Waits by file: none for each pack, layer or parameter, which would be many more than these."""
    counts: dict[str, int] = {}
    for place, count in waits.items():
        name = place.split(":")[0]
        counts[name] = counts.get(name, 0) + count
    return counts


def test_updates_and_scores_wait_for_the_gpu_once_a_pass() -> None:
    """Four packs a mini-batch, two mini-batches; once for the norm, once for sums and once for maxima of metrics."""
    for name, done in run("update", ["lens", "lens_forking", "gspo", "archer2"]).items():
        waits = files(done["waits"])
        assert waits.pop(SCORES, 0) == (
            2 if name in ("lens_forking", "archer2") else 0
        )  # an entropy split scores first
        assert waits.pop(NORM) == 2
        assert waits.pop(METRICS) <= 4
        assert not waits, f"{name}: {waits}"
        assert {"loss", "grad_norm", "policy_loss"} <= set(done["metrics"])
    done = run("score_and_export", None)
    assert done["score"] == {
        "lengths": [7, 20, 3, 40],
        "devices": ["cpu"],
        "waits": {f"{SCORES}: return values.cpu()": 1},
    }
    assert done["export"]["tensors"] > 40 and done["export"]["devices"] == ["cpu"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_moments_on_the_host_visit_the_gpu(share: float) -> None:
    done = run("moments_on_the_host", share)
    total = sum(done["held"].values())
    assert share * total <= done["held"]["cpu"] <= (0.75 if share == 0.5 else share) * total
    assert done["counts"] == ["cuda"]  # the update is the GPU's fused kernel, one tensor at a time
    # the way back is asynchronous (pinned, a stream of its own); the fake device calls every copy to the host a wait
    assert set(done["waits"]) <= {place for place in done["waits"] if NORM in place or "non_blocking=True" in place}


SMALL = {"model": "qwen3-4b-base", "layers": 4, "tokens": 8192}


@pytest.mark.parametrize(
    ("requests", "within"),
    [
        ([{**SMALL, "packs": 1, "recompute": kind} for kind in ("none", "light")], 0.04),
        ([{**SMALL, "packs": 1, "recompute": kind} for kind in ("selective", "full")], 0.1),
        ([{**SMALL, "packs": 1, "world": 4, "rank": 1, "tp": 2, "cp": 2}], 0.03),
        ([{**SMALL, "packs": 1, "world": 2, "rank": 1}], 0.03),  # data parallel: gradients are summed in buckets
        ([{**SMALL, "world": 2, "rank": 0, "pp": 2}], 0.12),  # an embedding's gradient stands beside the activations
        ([{**SMALL, "world": 2, "rank": 1, "pp": 2}], 0.04),
        ([{"model": "qwen3-30b-a3b", "layers": 2, "tokens": 4096, "packs": 1, "world": 16, "ep": 16}], 0.03),
    ],
    ids=["one GPU", "recomputed", "tp2+sp+cp2", "dp2", "pp2 first", "pp2 last", "moe ep16"],
)
def test_the_planner_knows_what_a_step_keeps_on_cuda(requests: list[dict[str, Any]], within: float) -> None:
    for found in run("steps", requests):
        assert set(files(found["waits"])) <= {METRICS, NORM}
        assert found["planned_gib"] == pytest.approx(found["activations_gib"], rel=within), found
