"""What the seed decides, the seed alone decides: not the schedule, not the time of day."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lens_megatron import checkpoints
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import decided, rollouts, run_tree, train

ALWAYS = """step reward success zero_reward_ratio purified_ratio improved_ratio deleted_tokens loss kl entropy grad_norm
response_tokens logprob_diff ratio_purified ratio_original clip_fraction tokens time/step time/score time/generate
time/reward time/logprobs time/train time/sync time/save""".split()  # noqa: SIM905
SMALL = {"parallel": {"tp": 1}}

VARIANTS: dict[str, dict[str, Any]] = {
    "again": {"steps": 3},
    "after_group": {"steps": 3, "rollout.schedule": "after_group"},
    "early": {"steps": 3, "rollout.schedule": "early"},
    "other_seed": {"steps": 1, "seed": 1},
    "grpo": {"algorithm": "grpo", **SMALL},
    "lens_greso": {"algorithm": {"preset": "lens_greso", "rescue": {"ties": "position"}}},
    "gradient": {"algorithm": "lens_gradient", "checkpoint": {"every": 1, "keep": 1, "keep_best": "reward"}},
    "resample": {"algorithm": "lens_resample", **SMALL},
    "random": {"algorithm": "lens_random", "memory": {"recompute": "full"}, **SMALL},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="module")
def variants(task: Path, runs: Path) -> dict[str, Future[list[dict[str, Any]]]]:
    """Two at a time: a run's start is a chain of imports that leaves one core idle."""
    with ThreadPoolExecutor(2) as pool:
        results = {}
        for name, changes in VARIANTS.items():
            tree = run_tree(task, runs / name / "run")
            for key, value in changes.items():
                part, _, last = key.rpartition(".")
                (tree[part] if part else tree)[last] = value
            results[name] = pool.submit(train, runs / name, tree)
    return results


def test_rollouts_keep_what_the_trainer_says_of_them(base: Path) -> None:
    """Under the prompt that each was rolled out with, before the update: the engine's own log-probs, but for rounding."""
    rows = [row for step in (1, 2) for row in rollouts(base, step)]
    scored = [row for row in rows if row.proximal_logprobs is not None]
    assert all(row.proximal_logprobs is not None for row in rows if row.origin == "purified" and row.trained)
    assert {row.purified for row in scored} >= {True} and not any(
        row.proximal_logprobs for row in rows if not row.trained
    )
    for row in scored:
        assert row.proximal_logprobs == pytest.approx(row.behaviour_logprobs, abs=1e-3)


def test_same_seed_same_metrics(base: Path, variants: Any) -> None:
    expected = RunFolder.open(base).read_metrics()
    again = variants["again"].result()
    assert [decided(tree) for tree in again] == [decided(tree) for tree in expected[:3]]
    # or nothing was shown: all of it must have happened
    assert all(tree["purified_ratio"] > 0 for tree in expected)
    assert any(tree["ratio_purified"] not in (None, 1.0) for tree in expected)
    assert any(tree["sampling/speculated_rollouts"] > 0 for tree in expected)
    assert len({tree["loss"] for tree in expected}) == len(expected)
    # 24 prompts, 4 a step: the second epoch asks the reference nothing
    assert [tree["purification/reference_known"] for tree in expected] == [0] * 6 + [1] * 2


def without_engine_noise(tree: dict[str, Any]) -> dict[str, Any]:
    """A schedule decides which rollouts share a forward pass of the engine, and so the last bits of their log-probs."""
    return {name: value for name, value in decided(tree).items() if not name.startswith("logprob_diff")}


@pytest.mark.parametrize("schedule", ["after_group", "early"])
def test_the_schedule_changes_no_sample(base: Path, variants: Any, schedule: str) -> None:
    other = variants[schedule].result()
    assert len(other) == 3
    for tree, expected in zip(other, RunFolder.open(base).read_metrics(), strict=False):
        assert without_engine_noise(tree) == without_engine_noise(expected)
        assert abs(tree["logprob_diff"] - expected["logprob_diff"]) < 1e-6
    if schedule == "after_group":
        assert all(tree["sampling/speculated_rollouts"] == 0 for tree in other)


def test_another_seed_differs(base: Path, variants: Any) -> None:
    first, other = RunFolder.open(base).read_metrics()[0], variants["other_seed"].result()[0]
    assert first["loss"] != other["loss"]
    assert first["response_tokens"] != other["response_tokens"] or first["reward"] != other["reward"]


@pytest.mark.parametrize("name", ["grpo", "lens_greso", "gradient", "resample", "random"])
def test_every_algorithm_writes_every_key_and_learns(variants: Any, runs: Path, name: str) -> None:
    lines = variants[name].result()
    assert [tree["step"] for tree in lines] == [1, 2]
    for tree in lines:
        assert set(ALWAYS) <= tree.keys()
        assert tree["grad_norm"] > 0
    assert lines[0]["loss"] != lines[1]["loss"]
    rescued = sum(tree["sampling/purified_rollouts"] for tree in lines)
    assert (rescued == 0) if name == "grpo" else (rescued > 0)
    if name == "grpo":
        assert all(tree["purified_ratio"] == 0 and tree["time/score"] < 0.1 for tree in lines)
    if name == "gradient":  # one checkpoint is kept for being the newest, one for its reward
        whole, broken = checkpoints.newest_first(runs / name / "run" / "checkpoints")
        best = max(lines, key=lambda tree: (tree["reward"], tree["step"]))["step"]
        assert broken == []
        assert {found.manifest.step for found in whole} == {2, best}
        assert all(found.manifest.metrics["reward"] == lines[found.manifest.step - 1]["reward"] for found in whole)
    if name == "resample":
        assert all(tree["deleted_tokens"] == 0 for tree in lines)


def test_every_key_at_every_step(base: Path) -> None:
    lines = RunFolder.open(base).read_metrics()
    for tree in lines:
        assert set(ALWAYS) <= tree.keys()
        # the parts are parts of the whole, and rewards are waited for while generating
        parts = [tree[f"time/{name}"] for name in ("score", "generate", "logprobs", "train", "sync", "save")]
        assert 0 < sum(parts) <= tree["time/step"]
        assert 0 <= tree["time/reward"] <= tree["time/generate"]
    assert lines[0]["time/save"] == 0  # a step is saved after its line is written
    assert all(tree["time/save"] > 0 for tree in lines[1:])
    assert any(tree["time/reward"] > 0 for tree in lines)
    assert not any(name.startswith("sampling/reward") for tree in lines for name in tree)
