"""The tables of docs/study.md as Markdown. A dash: nothing to say; intervals are 95%, over seeds."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from examples.study import analysis, contrasts
from examples.study.analysis import BUCKETS, PHASES, PRIMARY, Run, Runs
from examples.study.contrasts import Contrast

MAIN = ("grpo", "grpo_weighted", "resample", "random", "lens", "lens_plus")
AGAINST = ("grpo", "grpo_weighted", "resample", "random")  # lens against these: the contrasts named in advance
OTHERS = (
    *(
        "oracle",
        "oracle_plus",
        "oracle_keep",
        "no_ratio",
        "gamma_1_no_ratio",
        "oracle_no_ratio",
        "gradient",
        "no_benefit_check",
        "no_importance",
        "ratio_floor",
        "keep_failures",
        "mixture",
    ),
    *("grpo_extended", "dapo", "greso", "archer", "forking", "lens_dapo", "lens_greso"),
    *("tau_0.125", "tau_0.25", "tau_0.375", "gamma_1", "gamma_2", "gamma_4", "gamma_5", "gamma_10"),
)
VARIANTS = (
    ("oracle", "lens"),
    ("lens_plus", "lens"),
    ("oracle_keep", "oracle"),
    ("oracle_plus", "oracle"),
    ("oracle_plus", "lens_plus"),
    ("no_ratio", "lens_plus"),
    ("oracle_no_ratio", "oracle_plus"),
)
SETS = ("noisy", "unseen", "clean")
ANOTHER = "grpo, another seed"
DASH = "–"
NOTHING = "No run has these values yet."
Numbers = Callable[[Run], float | None]


def blocks(runs: Runs, pilot: Runs, data: Path) -> dict[str, Callable[[], str]]:
    there = [arm for arm in (*MAIN, *OTHERS) if arm in runs]
    main = [arm for arm in MAIN if arm in runs]
    return {
        "base": lambda: base(data),
        "pilot": lambda: pilot_table(pilot),
        "seeds": lambda: seeds(data),
        "ends": lambda: ends(runs, there),
        "contrasts": lambda: contrast_table(runs),
        "others": lambda: others(runs, [arm for arm in there if arm != "grpo"]),
        "variants": lambda: differences(
            runs,
            VARIANTS,
            {
                "area, noisy": analysis.area,
                "end, noisy": analysis.end,
                "groups destroyed": lambda run: analysis.plain(run, "groups_destroyed"),
            },
        ),
        "peak": lambda: peak_table(runs, there),
        "phases": lambda: phases(runs, main),
        "deletion": lambda: deletion(runs, [arm for arm in there if _rescues(runs, arm)]),
        "signal": lambda: signal(runs, [arm for arm in there if _rescues(runs, arm)]),
        "transfer": lambda: transfer(runs, [arm for arm in there if _rescues(runs, arm)]),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NOTHING
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def with_interval(one: Contrast | None, digits: int = 3, signed: bool = False) -> str:
    if one is None:
        return DASH
    sign = "+" if signed else ""
    middle = f"{one.mean:{sign}.{digits}f}"
    if one.low is None or one.high is None:
        return middle
    return f"{middle} [{one.low:{sign}.{digits}f}, {one.high:{sign}.{digits}f}]"


def base(data: Path) -> str:
    tree = json.loads((data / "base.json").read_text(encoding="utf-8"))
    sets = tree["models"][0]["benchmarks"]
    titles = {
        "noisy": "noisy: two words of noise, p(x)",
        "purified": "the same without its noise, p(x')",
        "clean": "clean",
        "unseen": "unseen noise",
    }
    rows = []
    for name, title in titles.items():
        one = sets[name]
        all_fail = 1 - one["pass_at"][str(one["samples"])]
        interval = f"[{one['interval'][0]:.3f}, {one['interval'][1]:.3f}]"
        rows.append((title, str(one["problems"]), f"{one['average']:.3f} {interval}", f"{all_fail:.3f}"))
    return markdown(("held-out set", "prompts", "success", "zero-reward ratio at n = 8"), rows)


def pilot_table(pilot: Runs, metric: str = PRIMARY) -> str:
    rows = []
    for name in sorted(pilot, key=lambda name: float(name.removeprefix("lr "))):
        for seed, run in sorted(pilot[name].items()):
            at, level = contrasts.peak(contrasts.smoothed(run.curve(metric)))
            rows.append(
                (
                    name.removeprefix("lr "),
                    str(seed),
                    share(analysis.area(run, metric)),
                    f"{at:.0f}",
                    share(level),
                    share(analysis.end(run, metric)),
                )
            )
    return markdown(
        ("learning rate", "seed", "area", "step of the peak", "height of the peak", "mean of the last three"), rows
    )


def seeds(data: Path) -> str:
    with (data / "runs.csv").open(newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["study"] == "main"]
    arms: dict[str, list[str]] = {}
    for row in found:
        arms.setdefault(row["arm"], []).append(row["seed"])
    order = [*(arm for arm in (*MAIN, *OTHERS) if arm in arms), *(arm for arm in arms if arm not in (*MAIN, *OTHERS))]
    rows = [(arm, str(len(arms[arm])), " ".join(sorted(arms[arm], key=int))) for arm in order]
    return markdown(("arm", "runs", "seeds"), rows)


def ends(runs: Runs, arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        numbers: list[Numbers] = [analysis.area, *(partial(analysis.end, metric=f"eval/{s}") for s in SETS)]
        shown = [with_interval(analysis.over_seeds(runs[arm], number)) for number in numbers]
        rows.append((arm, str(len(runs[arm])), *shown))
    return markdown(("arm", "seeds", "area, noisy", *(f"end, {name}" for name in SETS)), rows)


def contrast_table(runs: Runs) -> str:
    """The area of `lens` minus that of each arm named in advance; Holm over these."""
    found = {arm: one for arm in AGAINST if (one := analysis.paired(runs, "lens", arm, analysis.area)) is not None}
    t_holm = contrasts.holm({arm: one.t_p for arm, one in found.items() if one.t_p is not None})
    flip_holm = contrasts.holm({arm: one.flip_p for arm, one in found.items() if one.flip_p is not None})
    rows = [
        (
            f"lens - {arm}",
            str(one.pairs),
            with_interval(one, 4, signed=True),
            share(one.t_p),
            share(t_holm.get(arm)),
            share(one.flip_p),
            share(flip_holm.get(arm)),
        )
        for arm, one in found.items()
    ]
    return markdown(("area, noisy", "pairs", "difference", "t: p", "Holm", "sign flips: p", "Holm"), rows)


def others(runs: Runs, arms: Sequence[str]) -> str:
    """Every arm minus grpo: exploratory, not corrected."""
    rows = []
    for arm in arms:
        number: Numbers = analysis.area
        area = analysis.paired(runs, arm, "grpo", number)
        ends = [analysis.paired(runs, arm, "grpo", partial(analysis.end, metric=f"eval/{s}")) for s in SETS]
        if area is not None:
            shown = [with_interval(one, 3, signed=True) for one in (area, *ends)]
            rows.append((arm, str(area.pairs), *shown))
    return markdown(("arm - grpo", "pairs", "area, noisy", *(f"end, {name}" for name in SETS)), rows)


def levels(runs: Runs, arms: Sequence[str], numbers: dict[str, Numbers]) -> str:
    rows = []
    for arm in arms:
        shown = [with_interval(analysis.over_seeds(runs[arm], number)) for number in numbers.values()]
        rows.append((arm, str(len(runs[arm])), *shown))
    return markdown(("arm", "seeds", *numbers), rows)


def differences(runs: Runs, pairs: Sequence[tuple[str, str]], numbers: dict[str, Numbers]) -> str:
    rows = []
    for arm, against in pairs:
        found = [analysis.paired(runs, arm, against, number) for number in numbers.values()]
        if found[0] is not None:
            shown = [with_interval(one, 3, signed=True) for one in found]
            rows.append((f"{arm} - {against}", str(found[0].pairs), *shown, share(found[0].t_p)))
    return markdown(("", "pairs", *numbers, "t: p of the area"), rows)


def peak_table(runs: Runs, arms: Sequence[str], metric: str = PRIMARY, part: float = 1.0) -> str:
    """The row of GRPO against itself in another seed shows what picking the peak of a noisy curve does by itself."""
    rows = []
    if len(seeds := sorted(runs.get("grpo", {}))) > 1:
        shifted = {seed: runs["grpo"][other] for seed, other in zip(seeds, seeds[1:] + seeds[:1], strict=True)}
        runs, arms = {**runs, ANOTHER: shifted}, [*arms[:1], ANOTHER, *arms[1:]]
    for arm in arms:
        reaches = analysis.reach_peak(runs, arm, metric=metric, share=part)
        speed = analysis.log_speed(reaches)
        if speed is None:
            continue
        ratio = f"{math.exp(speed.mean):.2f}"
        if speed.low is not None and speed.high is not None:
            ratio += f" [{math.exp(speed.low):.2f}, {math.exp(speed.high):.2f}]"
        costs = [analysis.cost_to_peak(runs, arm, cost, metric=metric, share=part) for cost in analysis.COSTS]
        never = sum(one.censored for one in reaches)
        rows.append((arm, str(len(reaches)), ratio, f"{never} of {len(reaches)}", *(share(cost, 2) for cost in costs)))
    head = (
        "arm",
        "seeds",
        "speed-up in steps",
        "never reached",
        *(f"{cost} to {'the peak' if part == 1.0 else 'there'}, x grpo" for cost in analysis.COSTS),
    )
    return markdown(head, rows)


def phases(runs: Runs, arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        for phase in PHASES:
            values = []
            for bucket in BUCKETS:
                metric = f"success_distribution/original/{bucket}"
                found = [analysis.by_phase(run, metric).get(phase) for run in runs[arm].values()]
                known = [value for value in found if value is not None]
                values.append(share(mean(known) if known else None, 2))
            rows.append((arm, phase, *values))
    return markdown(("arm", "third of the steps", *BUCKETS), rows)


def deletion(runs: Runs, arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        planted = [
            with_interval(
                analysis.over_seeds(runs[arm], partial(analysis.plain, metric=f"purification/planted_{n}")), 2
            )
            for n in ("precision", "recall", "chance")
        ]
        passed = analysis.over_seeds(runs[arm], lambda run: analysis.weighted(run, "improved_ratio"))
        excess = None
        if arm != "resample":
            excess = analysis.paired(runs, arm, "resample", lambda run: analysis.weighted(run, "improved_ratio"))
        gain = analysis.over_seeds(runs[arm], lambda run: analysis.weighted(run, "rescue/improvement"))
        shown = (with_interval(passed, 2), with_interval(excess, 2, signed=True), with_interval(gain, 2, signed=True))
        rows.append((arm, str(len(runs[arm])), *planted, *shown))
    head = (
        "arm",
        "seeds",
        "precision",
        "recall",
        "chance",
        "passes Eq. 2",
        "in excess of resample",
        "acc(x') - acc(x)",
    )
    return markdown(head, rows)


def signal(runs: Runs, arms: Sequence[str]) -> str:
    def tried(metric: str) -> Numbers:
        return lambda run: analysis.weighted(run, metric)

    def whole(metric: str) -> Numbers:
        return lambda run: analysis.plain(run, metric)

    columns: dict[str, Numbers] = {
        "rolled out again": whole("purified_ratio"),
        "in the signal window": tried("rescue/signal_window"),
        "destroyed": whole("groups_destroyed"),
        "revived": whole("groups_revived"),
        "mean ratio on P": whole("ratio_purified"),
        "ratio < 0.3": whole("rho_purified_below_0.3"),
        "ratio > 1.2": whole("rho_purified_above_1.2"),
        "effective share of P, sequences": whole("effective_size_rho_purified_sequences"),
    }
    rows = [
        (
            arm,
            str(len(runs[arm])),
            *(with_interval(analysis.over_seeds(runs[arm], number), 2) for number in columns.values()),
        )
        for arm in arms
    ]
    return markdown(("arm", "seeds", *columns), rows)


def transfer(runs: Runs, arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        counts = [
            sum(run.last(f"transfer/{name}_prompts") or 0.0 for run in runs[arm].values())
            for name in ("rescued", "other")
        ]
        number: Numbers = lambda run: run.last("transfer/matched_difference")  # noqa: E731
        own = analysis.over_seeds(runs[arm], number)
        excess = None if arm == "resample" else analysis.paired(runs, arm, "resample", number)
        rows.append((arm, str(own.pairs if own else 0), *(f"{count:.0f}" for count in counts),
                     with_interval(own, 3, signed=True), with_interval(excess, 3, signed=True)))  # fmt: skip
    return markdown(("arm", "seeds", "rescued prompts", "others", "matched difference", "in excess of resample"), rows)


def against_tokens(runs: Mapping[int, Run]) -> list[tuple[float, float, float, float]]:
    """Mean success at the mean number of thousand tokens sampled up to each evaluation."""
    points = []
    for step, middle, low, high in analysis.band(runs, PRIMARY):
        tokens = mean(run.cost_until(step, analysis.tokens) for run in runs.values()) / 1000
        points.append((tokens, middle, low, high))
    return points


def _rescues(runs: Runs, arm: str) -> bool:
    return any(value > 0 for run in runs[arm].values() for value in run.values("purified_ratio"))
