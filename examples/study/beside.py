"""Tables and figures of what stands beside the main study: partial credit, the control without noise, equal tuning."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from examples.study import analysis
from examples.study.analysis import PRIMARY, Runs, load_runs
from examples.study.tables import (
    DASH,
    MAIN,
    Numbers,
    deletion,
    differences,
    levels,
    markdown,
    peak_table,
    share,
    signal,
    with_interval,
)

FOLDER = "beside"  # of the data
CREDIT, BARE = "eval/graded/reward", "eval/bare"
GRADED_ARMS = ("grpo", "resample", "lens", "lens_plus", "lens_strict")
CONTROL_ARMS = ("grpo", "resample", "random", "lens")
STEPS = 45  # of the study's runs
RATES = ("0.0001", "0.0002", "0.0004")


def blocks(data: Path, pilot: Runs) -> dict[str, Callable[[], str]]:
    graded, control, tune = (load_runs(data / FOLDER, name) for name in ("graded", "control", "tune"))
    in_graded = [arm for arm in GRADED_ARMS if arm in graded]
    in_control = [arm for arm in CONTROL_ARMS if arm in control]
    credit = {"area, credit": _area(CREDIT), "end, credit": _end(CREDIT), "end, whole answers": _end(PRIMARY)}
    without = {"area, bare": _area(BARE), "end, bare": _end(BARE), "end, clean": _end("eval/clean")}
    return {
        "tasks-base": lambda: base(data),
        "graded-pilot": lambda: task_pilot(graded, CREDIT),
        "graded": lambda: levels(graded, in_graded, credit),
        "graded-contrasts": lambda: differences(graded, _pairs(in_graded), credit),
        "graded-peak": lambda: peak_table(graded, in_graded, CREDIT),
        "graded-signal": lambda: lost_signal(graded, in_graded),
        "graded-deletion": lambda: deletion(graded, [arm for arm in in_graded if arm != "grpo"]),
        "control-pilot": lambda: task_pilot(control, BARE),
        "control": lambda: levels(control, in_control, without),
        "control-contrasts": lambda: differences(control, _pairs(in_control), without),
        "control-peak": lambda: peak_table(control, in_control, BARE),
        "control-rescues": lambda: rescues(control, [arm for arm in in_control if arm != "grpo"]),
        "control-signal": lambda: signal(control, [arm for arm in in_control if arm != "grpo"]),
        "tuning": lambda: tuning(tune, pilot),
        "tuning-best": lambda: tuned_contrasts(tune, pilot),
    }


def base(data: Path) -> str:
    tree = json.loads((data / "base_tasks.json").read_text(encoding="utf-8"))
    sets = tree["models"][0]["benchmarks"]
    rows = []
    for name, title in (("graded", "partial credit, two words of noise"), ("bare", "control: nothing distracts")):
        one = sets[name]
        if "reward" in one:  # and the average and its interval are of right answers
            reward = f"{one['reward']:.3f}"
        else:
            reward = f"{one['average']:.3f} [{one['interval'][0]:.3f}, {one['interval'][1]:.3f}]"
        right = one["pass_at"]
        none = 1 - right[str(one["samples"])]
        rows.append((title, str(one["problems"]), reward, share(right["1"]), share(none)))
    head = ("held-out set", "prompts", "mean reward", "reward 1", "prompts with no reward 1 among 8")
    return markdown(head, rows)


def task_pilot(runs: Runs, metric: str) -> str:
    rows = []
    for seed, run in sorted(runs.get("pilot", {}).items()):
        curve = run.curve(metric)
        found = [share(value, 2) for _, value in curve]
        early = analysis.by_phase(run, "zero_signal_ratio").get("early")
        failing = analysis.by_phase(run, "zero_reward_ratio").get("early")
        rows.append((str(seed), " ".join(found), share(failing, 2), share(early, 2)))
    head = ("seed", "held out, every 5 steps", "no success among 8, early", "equal rewards, early")
    return markdown(head, rows)


def lost_signal(runs: Runs, arms: Sequence[str]) -> str:
    """Where partial credit leaves groups without a signal, over the whole run."""
    columns = {
        "no success among 8": "zero_reward_ratio",
        "equal rewards in G": "zero_signal_ratio",
        "rolled out again": "purified_ratio",
        "replaced": "rescue/replaced",
        "destroyed": "groups_destroyed",
        "revived": "groups_revived",
    }
    rows = []
    for arm in arms:
        found = [analysis.over_seeds(runs[arm], partial(analysis.plain, metric=m)) for m in columns.values()]
        rows.append((arm, str(len(runs[arm])), *(with_interval(one, 2) for one in found)))
    return markdown(("arm", "seeds", *columns), rows)


def rescues(runs: Runs, arms: Sequence[str]) -> str:
    """As the main study's `deletion`, without planted noise."""
    rows = []
    for arm in arms:
        passes: Numbers = lambda run: analysis.weighted(run, "improved_ratio")  # noqa: E731
        excess = None if arm == "resample" else analysis.paired(runs, arm, "resample", passes)
        gain = analysis.over_seeds(runs[arm], lambda run: analysis.weighted(run, "rescue/improvement"))
        passed = with_interval(analysis.over_seeds(runs[arm], passes), 2)
        rows.append((arm, str(len(runs[arm])), passed, with_interval(excess, 2, True), with_interval(gain, 2, True)))
    return markdown(("arm", "seeds", "passes Eq. 2", "in excess of resample", "acc(x') - acc(x)"), rows)


def by_rate(tune: Runs, pilot: Runs) -> dict[str, dict[str, float]]:
    """arm -> rate -> area over the study's steps; on the pilot's seed."""
    found: dict[str, dict[str, float]] = {arm: {} for arm in MAIN}
    for name, seeds in {**{f"grpo {name}": run for name, run in pilot.items()}, **tune}.items():
        arm, _, rate = name.partition(" lr ")
        if arm in found and rate in RATES:
            found[arm][rate] = analysis.area(seeds[100].until(STEPS))
    return {arm: rates for arm, rates in found.items() if rates}


def tuning(tune: Runs, pilot: Runs) -> str:
    """One seed. The best rate of each arm is bold, where all have run."""
    rows = []
    for arm, rates in by_rate(tune, pilot).items():
        whole = len(rates) == len(RATES)
        shown = [share(rates.get(rate)) for rate in RATES]
        best = share(max(rates.values())) if whole else None
        rows.append((arm, *(f"**{cell}**" if cell == best else cell for cell in shown)))
    return markdown(("arm", *(f"{float(rate):.0e}".replace("e-0", "e-") for rate in RATES)), rows)


def tuned_contrasts(tune: Runs, pilot: Runs) -> str:
    """LENS minus each arm at the study's rate, at one rate for all, and each at its own best."""
    rates = by_rate(tune, pilot)
    rows = []
    for arm in (arm for arm in rates if arm != "lens" and "lens" in rates):
        both = [rate for rate in RATES if rate in rates["lens"] and rate in rates[arm]]
        at = {rate: f"{rates['lens'][rate] - rates[arm][rate]:+.3f}" for rate in both}
        whole = len(rates["lens"]) == len(rates[arm]) == len(RATES)
        own = f"{max(rates['lens'].values()) - max(rates[arm].values()):+.3f}" if whole else DASH
        rows.append((f"lens - {arm}", *(at.get(rate, DASH) for rate in RATES), own))
    return markdown(
        ("area", *(f"both at {float(r):.0e}".replace("e-0", "e-") for r in RATES), "each at its best"), rows
    )


def _pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    return [(arm, against) for against in ("grpo", "resample") for arm in arms if arm not in ("grpo", against)] + [
        ("lens", "random")
    ]


def _area(metric: str) -> Numbers:
    return lambda run: analysis.area(run, metric)


def _end(metric: str) -> Numbers:
    return lambda run: analysis.end(run, metric)
