"""Each guard meets the fault it is for, in bf16 at lr 1e-6, on its way through training with the thresholds of production.

`docs/trust.md` has the table: fault, guard, message, time to notice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.data import toy
from tests.distributed.pool import WorkerPool
from tests.faults import stage
from tests.loop.runs import run_tree

SPLIT = {
    "preset": "lens",
    "rescue": {"ties": "position", "gamma": 0.1},
    "loss": {"entropy_split": {"high_share": 0.2, "train_on": "high"}},
}
PURIFIED = {"preset": "lens", "rescue": {"ties": "position", "gamma": 0.3}}
SPINNING = {
    "workers": 1,
    "wall_seconds": 1.0,
    "seconds": 0.3,
    "default": {"kind": "function", "function": "fault_rewards:spins"},
}

# fault -> the guard or word that names it, finished steps when it came, what the run needs besides
FAULTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "transposed_on_load": ("guard hf_parity", 0, {}),
    "transposed_on_export": ("guard export_parity", 0, {}),
    "transposed_both_ways": ("guard hf_parity", 0, {}),
    "gate_and_up_swapped": ("guard hf_parity", 0, {}),
    "wrong_rope_base": ("guard hf_parity", 0, {}),
    "reference_of_other_weights": ("guard first_step", 0, {}),
    "stale_engine_weights": ("guard engine_weights", 0, {}),
    "engine_at_another_version": ("guard engine_weights", 1, {"steps": 3}),
    "bucket_dropped": ("weights never came", 0, {}),
    "masks_inverted": ("guard entropy_masks", 0, {"algorithm": SPLIT}),
    "temperature_forgotten": ("guard logprob_diff", 0, {"rollout.temperature": 0.8}),
    "proximal_under_the_wrong_prompt": ("purified rollouts", 0, {"algorithm": PURIFIED}),
    "loss_not_a_number": ("guard skipped_in_row", 2, {"steps": 4}),
    "nothing": ("guard reward_failures", 0, {"rewards": SPINNING, "data.prompts_per_step": 1, "rollout.n": 2}),
}


def tree_of(task: Path, run_dir: Path, changes: dict[str, Any]) -> dict[str, Any]:
    tree = run_tree(task, run_dir, precision="bf16", parallel={"tp": 1}, optimizer={"lr": 1e-6})
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
    return tree


@pytest.mark.parametrize("fault", FAULTS)
def test_named_in_time(task: Path, tmp_path: Path, workers: Callable[[int], WorkerPool], fault: str) -> None:
    words, steps, changes = FAULTS[fault]
    [end] = workers(1).run(stage.run, fault, tree_of(task, tmp_path / "run", changes))
    assert words in end["message"], end
    assert (end["kind"] != "", end["steps"]) == (True, steps), end


@pytest.mark.parametrize("supervised", [False, True])
def test_of_another_shape_in_a_layout(
    task: Path, tmp_path: Path, workers: Callable[[int], WorkerPool], supervised: bool
) -> None:
    """Transposed, a square weight is not the right shape once it is cut: one line, and what every rank was doing."""
    tree = tree_of(task, tmp_path / "run", {"parallel": {"tp": 2}})
    if supervised:
        toy.write_jsonl(tmp_path / "sft.jsonl", toy.supervised_rows(16, seed=0))
        tree = {name: tree[name] for name in ("model", "run_dir", "steps", "parallel")}
        tree["data"] = {"train": str(tmp_path / "sft.jsonl"), "prompts_per_step": 4}
    case = stage.run_sft if supervised else stage.run
    for rank, end in enumerate(workers(2).run(case, "transposed_on_load", tree)):
        assert (end["kind"], end["steps"]) == ("RunError", 0), end
        for word in ("model.layers.0.self_attn.o_proj.weight", "(16, 32) for rank", "its parameter (32, 16)"):
            assert word in end["message"]
        stacks = (tmp_path / "run" / "logs" / "stacks" / f"rank_{rank:05}.txt").read_text()
        assert "o_proj.weight is (16, 32)" in stacks
        assert "load_hf" in stacks


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_nothing_is_said_without_a_fault(
    task: Path, tmp_path: Path, workers: Callable[[int], WorkerPool], precision: str
) -> None:
    """All guards on, and twice as far from their bounds as they ask for."""
    changes = {"precision": precision, "algorithm": SPLIT, "rollout.temperature": 0.8, "guards": tight(precision)}
    [end] = workers(1).run(stage.run, "nothing", tree_of(task, tmp_path / "run", changes))
    assert (end["message"], end["steps"]) == ("", 2)
    assert all(line["time/guards"] > 0 for line in end["lines"])
    assert end["lines"][0]["entropy_high"] > end["lines"][0]["entropy_low"]


def tight(precision: str) -> dict[str, float]:
    from lens_megatron.guards.config import GuardConfig

    bounds = GuardConfig()
    return {
        "logprob_tolerance": bounds.within_trainer(precision) / 2,
        "logprob_diff": bounds.to_engine(precision) / 2,
        "replicas_every": 1,
    }


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("optimizer_zeroed_at_resume", "guard resume_parity"),
        ("other_data_order", "not those of the checkpoint"),
        ("nothing", ""),
    ],
)
def test_at_resume(task: Path, tmp_path: Path, workers: Callable[[int], WorkerPool], fault: str, words: str) -> None:
    tree = tree_of(task, tmp_path / "run", {"steps": 1, "checkpoint.every": 1})
    [first] = workers(1).run(stage.run, "nothing", tree)
    assert first["message"] == ""
    [end] = workers(1).run(stage.run, fault, {**tree, "steps": 2}, resume=True)
    assert words in end["message"]
    assert bool(end["message"]) is bool(words)
    assert end["steps"] == (1 if words else 2), end


def test_one_bit_of_one_replica(task: Path, tmp_path: Path, workers: Callable[[int], WorkerPool]) -> None:
    for end in workers(2).run(
        stage.run, "bit_flipped", tree_of(task, tmp_path / "run", {"parallel": {"tp": 1, "dp": 2}})
    ):
        assert "guard replicas_every" in end["message"], end
    assert end["steps"] == 0


@pytest.mark.parametrize(
    ("fault", "words", "steps"),
    [
        ("gate_and_up_swapped", "guard hf_parity", 0),
        ("bit_flipped_in_sft", "step 2: 1 weights of the policy differ", 1),
        ("loss_not_a_number_in_sft", "guard skipped_in_row", 2),
        ("nothing", "", 4),
    ],
)
def test_supervised_training(
    task: Path, tmp_path: Path, workers: Callable[[int], WorkerPool], fault: str, words: str, steps: int
) -> None:
    toy.write_jsonl(tmp_path / "sft.jsonl", toy.supervised_rows(16, seed=0))
    tree = {
        "model": str(task / "model"),
        "run_dir": str(tmp_path / "run"),
        "steps": 4,
        "precision": "bf16",
        "parallel": {"dp": 2},
        "data": {"train": str(tmp_path / "sft.jsonl"), "prompts_per_step": 4},
        "optimizer": {"lr": 1e-6},
        "guards": {"replicas_every": 1},
    }
    for end in workers(2).run(stage.run_sft, fault, tree):
        assert words in end["message"], end
        assert bool(end["message"]) is bool(words)
    assert end["steps"] == steps


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 1, "pp": 2}])
def test_checksums_do_not_depend_on_the_layout(
    task: Path, tmp_path: Path, workers: Callable[[int], WorkerPool], layout: dict[str, int]
) -> None:
    """Saved by one process, resumed by two in another layout: the guard holds, and would not had it compared nothing."""
    tree = tree_of(task, tmp_path / "run", {"steps": 1, "checkpoint.every": 1})
    workers(1).run(stage.run, "nothing", tree)
    [manifest] = (tmp_path / "run" / "checkpoints").glob("*/extra.json")
    assert '"optimizer.exp_avg": 0' not in manifest.read_text()
    assert '"optimizer.exp_avg": ' in manifest.read_text()
    for end in workers(2).run(stage.run, "nothing", {**tree, "steps": 2, "parallel": layout}, resume=True):
        assert end["message"] == "", end
    for end in workers(2).run(
        stage.run, "optimizer_zeroed_at_resume", {**tree, "parallel": layout, "steps": 3}, resume=True
    ):
        assert "guard resume_parity" in end["message"], end


@pytest.mark.parametrize(("how", "guards"), [("drop_sequences", {}), ("mask_tokens", {"token_diff": 0.05})])
def test_what_is_over_the_bound_is_left_out(
    task: Path, tmp_path: Path, workers: Callable[[int], WorkerPool], how: str, guards: dict[str, Any]
) -> None:
    changes = {"rollout.temperature": 0.8, "guards": {"on_logprob_diff": how, "most_left_out": 1.0, **guards}}
    [end] = workers(1).run(stage.run, "temperature_forgotten", tree_of(task, tmp_path / "run", changes))
    assert end["message"] == ""
    assert all(0 < line["guards/left_out"] <= 1 for line in end["lines"])
    trained = [line["policy_token_share"] for line in end["lines"]]
    assert trained == pytest.approx([1 - line["guards/left_out"] for line in end["lines"]], abs=1e-4)
    changes["guards"]["most_left_out"] = 1e-6
    [end] = workers(1).run(stage.run, "temperature_forgotten", tree_of(task, tmp_path / "again", changes))
    assert "guard most_left_out" in end["message"]
