"""The figures' numbers against ones worked out by hand from the synthetic runs' rules."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens_megatron import strict
from lens_megatron.algorithms import group_metrics
from lens_megatron.config import RunConfig
from lens_megatron.errors import RunError, UsageError
from lens_megatron.reporting import figures, panels
from lens_megatron.reporting.runs import Run, baseline, config_changes, config_differences, load_runs, short_names
from lens_megatron.run_folder import RunFolder
from tests.reporting.synthetic import make_run


def run_of(*values: float, name: str = "r", seconds: float | None = None, metric: str = "success") -> Run:
    times = {} if seconds is None else {"time/step": seconds}
    return Run(name, {}, {}, [{"step": step, metric: value, **times} for step, value in enumerate(values, 1)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "lens", "lens")
    make_run(folder / "grpo", "grpo")
    return load_runs([folder / "lens", folder / "grpo"])


def test_buckets_are_those_of_the_metrics() -> None:
    assert figures.BUCKETS == group_metrics.BUCKETS


def test_step_time_leaves_out_the_warm_up(runs: list[Run]) -> None:
    lens, grpo = (figures.step_time(run) for run in runs)
    assert lens is not None and grpo is not None
    assert (lens.mean, grpo.mean, lens.median) == (10.0, 8.0, 10.0)  # the first took 40 and 38 s
    assert lens.phases == {
        "score": 0.5,
        "generate": 5.75,  # without the part of it that waited for rewards
        "reward": 0.25,
        "logprobs": 1.0,
        "train": 2.0,
        "sync": 0.25,
        "save": 0.0,
        "other": 0.25,
    }
    assert sum(lens.phases.values()) == lens.mean


def test_time_in_no_phase_is_shown_as_other() -> None:
    line = {"step": 1, "time/step": 10.0, "time/train": 4.0, "time/evaluation": 3.0, "time/train/forward": 2.0}
    time = figures.step_time(Run("r", {}, {}, [line]))
    assert time is not None and time.phases == {"train": 4.0, "evaluation": 3.0, "other": 3.0}


def test_evaluations_are_no_part_of_the_time_of_a_step() -> None:
    lines = [
        {"step": 0, "time/step": 50.0, "time/eval": 50.0},
        {"step": 1, "time/step": 4.0},
        {"step": 2, "time/step": 9.0, "time/eval": 6.0},
        {"step": 3, "time/step": None},
    ]
    assert figures.step_seconds(Run("r", {}, {}, lines)) == [(1.0, 4.0), (2.0, 3.0)]


def test_rewards_of_a_batch_made_ahead_are_nobodys_wait() -> None:
    line = {"step": 1, "time/step": 10.0, "time/generate": 2.0, "time/reward": 5.0, "time/train": 8.0}
    time = figures.step_time(Run("r", {}, {}, [line]))
    assert time is not None and time.phases == {"generate": 0.0, "reward": 2.0, "train": 8.0}


def test_a_phase_missing_from_some_steps_counts_as_nothing_there() -> None:
    lines = [{"step": step, "time/step": 4.0} for step in (1, 2, 3)]
    time = figures.step_time(Run("r", {}, {}, [lines[0], lines[1] | {"time/save": 1.0}, lines[2]]))
    assert time is not None and time.phases == {"save": 0.5, "other": 3.5}


def test_speedup_on_evaluations(runs: list[Run]) -> None:
    # eval/average = 0.8 success at steps 2, 4, 6: grpo's peak 0.24 at 6, which lens (0.16, 0.32, 0.48) passes at 4
    assert figures.speedup_metric(runs) == "eval/average"
    found = figures.speedup(runs[1], runs[0], "eval/average")
    assert found is not None
    assert (found.peak, found.baseline_steps, found.steps) == (pytest.approx(0.24), 6, 4)
    assert found.in_steps == 1.5
    assert found.in_time == pytest.approx((38 + 5 * 8) / (40 + 3 * 10))


def test_a_mean_reward_is_drawn_where_it_is_not_the_accuracy() -> None:
    def evaluated(reward: float) -> Run:
        return Run("r", {}, {}, [{"step": 1, "eval/held": 0.25, "eval/held/reward": reward}])

    (graded,), (binary,) = (panels.evaluation_figures([evaluated(reward)]) for reward in (0.5, 0.25))
    assert 'data-label="r mean reward" data-points="1,0.5"' in graded and 'data-label="r accuracy"' in graded
    assert "mean reward" not in binary and 'data-label="r" data-points="1,0.25"' in binary


def test_a_speedup_says_whether_the_lead_is_more_than_noise() -> None:
    def evaluated(*values: float, error: float | None = 0.02, name: str = "r") -> Run:
        errors = {} if error is None else {"eval/held/standard_error": error}
        return Run(name, {}, {}, [{"step": 2 * k, "eval/held": v, **errors} for k, v in enumerate(values, 1)])

    base = evaluated(0.1, 0.2, 0.3, name="grpo")
    near, far = evaluated(0.1, 0.3, 0.3, error=0.05), evaluated(0.1, 0.4, 0.4)
    found = figures.speedup(base, near, "eval/held")
    assert found is not None and found.lead is not None and found.in_steps == 1.5
    # at step 4, where it reached 0.3 and GRPO had 0.2
    assert (found.lead.difference, found.lead.error) == pytest.approx((0.1, math.hypot(0.02, 0.05)))
    assert found.lead.within_noise
    found = figures.speedup(base, far, "eval/held")
    assert found is not None and found.lead is not None and not found.lead.within_noise
    behind = figures.speedup(base, evaluated(0.1, 0.1, 0.1), "eval/held")
    assert behind is not None and behind.lead is not None and behind.lead.difference == pytest.approx(-0.2)
    for other in (evaluated(0.3, 0.3, 0.3, error=None), run_of(0.3, metric="eval/held")):
        found = figures.speedup(base, other, "eval/held")
        assert found is not None and found.lead is None
    drawn = panels.speedup_figure([base, near, far])
    assert re.search(r">\+0.100 ± 0.108<[^±]*>within noise<", drawn)
    assert re.search(r">\+0.200 ± 0.057<[^±]*>beyond noise<", drawn)
    assert "lead" not in panels.speedup_figure([base, evaluated(0.3, 0.3, 0.3, error=None)]).lower()


def test_speedup_needs_more_than_one_lucky_batch() -> None:
    base = run_of(*[0.1] * 18, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1)
    lucky = run_of(1.0, *[0.0] * 24)
    assert figures.speedup_window("success", 25) == 5
    found = figures.speedup(base, lucky, "success")
    assert found is not None and found.peak == pytest.approx(0.42) and found.baseline_steps == 22
    assert found.steps is None and found.in_steps is None and found.in_time is None


def test_speedup_of_a_slower_run_is_below_one() -> None:
    found = figures.speedup(run_of(0.1, 0.5, 0.4, seconds=1), run_of(0.1, 0.2, 0.3, 0.5, seconds=3), "success")
    assert found is not None and (found.in_steps, found.in_time) == (0.5, 2 / 12)


def test_thirds_of_the_run(runs: list[Run]) -> None:
    # failure = 0.6 - 0.8 * success for grpo: steps (1, 2), (3, 4), (5, 6)
    shares = figures.success_distribution(runs[1], "original")
    assert shares is not None
    assert [shares[window][0] for window in figures.WINDOWS] == pytest.approx([0.54, 0.46, 0.38])
    for window in figures.WINDOWS:
        assert sum(shares[window]) == pytest.approx(1)
    assert figures.success_distribution(run_of(1, 1, 1), "original") is None


@given(st.integers(0, 400))
def test_thirds_take_every_step_once(length: int) -> None:
    parts = [list(range(length))[part] for part in figures.thirds(length)]
    assert [step for part in parts for step in part] == (list(range(length)) if length >= 3 else [])
    assert length < 3 or len(parts[0]) == len(parts[2]) >= 1


@given(st.lists(st.floats(0, 50), min_size=1, max_size=60))
def test_every_score_is_in_one_bin(scores: list[float]) -> None:
    histogram = figures.score_histogram(scores)
    assert histogram is not None and histogram.tokens == len(scores)
    assert sum(histogram.shares.values()) + histogram.zero_share == pytest.approx(1)
    first, edges = figures.bin_range([histogram])
    for place, share in histogram.shares.items():
        low, high = edges[place - first], edges[place - first + 1]
        inside = sum(low * (1 - 1e-5) <= max(score, 1e-8) < high * (1 + 1e-5) for score in scores if score > 0)
        assert inside >= round(share * len(scores))


def test_bins_of_whole_powers() -> None:
    histogram = figures.score_histogram([0, 0.001, 0.01, 0.012, 1.0, 0.0])
    assert histogram is not None and histogram.zero_share == pytest.approx(1 / 3)
    assert histogram.shares == {-12: 1 / 6, -8: 2 / 6, 0: 1 / 6}
    assert figures.bin_range([histogram])[1][0] == pytest.approx(0.001)


def test_scores_count_each_prompt_once_a_step(runs: list[Run]) -> None:
    scores, deleted = panels.saved_scores(runs[0])
    assert len(scores) == 3 * 4 * (17 - 1)  # steps x prompts x tokens with a score, not x rollouts
    # two purified prompts, tokens 6, 7 and 8 of each
    assert sorted(deleted) == pytest.approx(sorted([10**-0.25, 1.0, 10**-0.25] * 2 * 3))
    assert panels.saved_scores(runs[1]) == ([], [])


def test_first_and_last() -> None:
    assert figures.first_and_last([float(k) for k in range(30)]) == (1.0, 28.0)
    assert figures.first_and_last([0.5]) == (0.5, 0.5)
    assert figures.first_and_last([]) is None


def test_over_time() -> None:
    assert figures.over_time(run_of(0.1, 0.2, seconds=90), "success", 60) == [(1.5, 0.1), (3.0, 0.2)]
    assert figures.over_time(run_of(0.1, 0.2), "success", 60) == []


def test_values_that_are_no_numbers_are_left_out() -> None:
    lines = [{"step": 1, "kl": None}, {"step": 2}, {"step": 3, "kl": math.nan}, {"step": 4, "kl": 0.5}]
    assert Run("r", {}, {}, lines).points("kl") == [(4.0, 0.5)]


def test_who_is_compared_with() -> None:
    def named(name: str, algorithm: object = None) -> Run:
        return Run(name, {"algorithm": algorithm}, {}, [])

    assert baseline([named("a", "lens"), named("b", {"preset": "grpo", "loss": {}})]) == 1
    assert baseline([named("x/lens"), named("x/my-grpo")]) == 1
    assert baseline([named("grpo/lens"), named("dapo")]) == 0


def test_config_differences(tmp_path: Path) -> None:
    def configured(**config: object) -> Run:
        return Run("r", config, {}, [])

    first = configured(run_dir="a", seed=0, parallel={"tp": 2, "pp": 1}, reference=None)
    second = configured(run_dir="b", seed=0, parallel={"tp": 1, "pp": 1}, reference="x", extra={})
    assert config_differences([first, second]) == [
        ("parallel.tp", ["2", "1"]),
        ("reference", ["null", "x"]),
        ("extra", ["not set", "{}"]),
    ]


def test_what_was_changed_on_the_way() -> None:
    def resumed(*earlier: tuple[int | None, float], now: float) -> list[tuple[str, str, str]]:
        kept = [(until, {"run_dir": f"{until}", "optimizer": {"lr": lr}}) for until, lr in earlier]
        return config_changes(Run("r", {"optimizer": {"lr": now}, "seed": 0}, {}, [], None, kept))

    assert resumed(now=0.1) == []
    assert ("optimizer.lr", "0.1 until step 8", "0.2") in resumed((8, 0.1), now=0.2)
    assert ("seed", "not set until step 8", "0") in resumed((8, 0.1), now=0.2)
    assert resumed((8, 0.1), (12, 0.2), now=0.1)[0] == ("optimizer.lr", "0.1 until step 8, 0.2 until step 12", "0.1")
    assert resumed((None, 0.1), now=0.2)[0] == ("optimizer.lr", "0.1", "0.2")  # an older version's run
    # no step is left of: what ran before the first checkpoint, what was resumed from where it began, or from before
    assert resumed((0, 0.1), now=0.2) == []
    assert resumed((8, 0.1), (8, 0.2), now=0.3)[0] == ("optimizer.lr", "0.1 until step 8", "0.3")
    assert resumed((4, 0.1), (8, 0.2), (2, 0.3), now=0.4)[0] == ("optimizer.lr", "0.1 until step 2", "0.4")


def test_what_an_older_configuration_did_not_say_was_not_changed() -> None:
    said = {"model": "m", "run_dir": "r", "algorithm": {}, "data": {"train": "t"}}
    tree = strict.to_tree(RunConfig, strict.build(RunConfig, said, "c"))
    older = {key: value for key, value in tree.items() if key != "guards"}
    run = Run("r", {**tree, "steps": 9}, {}, [], None, [(8, older)])
    assert config_changes(run) == [("steps", f"{tree['steps']} until step 8", "9")]


def test_names_as_short_as_can_be() -> None:
    assert short_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert short_names([Path("/r/1/a"), Path("/r/2/a"), Path("/r/2/b")]) == ["1/a", "2/a", "2/b"]
    with pytest.raises(UsageError, match="named twice"):
        short_names([Path("/r/a"), Path("/r/x/../a")])


def test_runs_without_steps_are_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.metrics_path.touch()
    with pytest.raises(UsageError, match="no step has finished"):
        load_runs([folder.path])
    folder.metrics_path.write_text("[]\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1"):
        load_runs([folder.path])
