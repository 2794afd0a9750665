"""The report's figures and tables as HTML: what is drawn where, in which words. Numbers: figures.py, SVG: charts.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from statistics import mean

from lens_megatron.progress import duration
from lens_megatron.reporting import figures
from lens_megatron.reporting.charts import (
    Bars,
    Series,
    bar_chart,
    line_chart,
    nothing,
    number,
    stacked_bars,
    step_chart,
)
from lens_megatron.reporting.runs import Point, Run, baseline, config_changes, config_differences

COLOURS = 8
SCORE_STEPS = 12  # saved steps that Figure 2b reads
_DASH = "–"


def run_colour(place: int) -> str:
    return f"var(--s{place % COLOURS})"


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """(label, css colour, kind): kind is line, block or dash."""
    items = "".join(
        f'<span><i class="{kind}" style="{"border-color" if kind == "dash" else "background"}:{css}"></i>{escape(label)}</span>'
        for label, css, kind in entries
    )
    return f'<div class="legend">{items}</div>'


def run_legend(runs: Sequence[Run], kind: str = "line") -> list[tuple[str, str, str]]:
    return [(run.name, run_colour(place), kind) for place, run in enumerate(runs)]


def figure(title: str, body: str, note: str = "", key: str = "", wide: bool = False) -> str:
    caption = f"<h3>{escape(title)}</h3>" + (f"<p>{escape(note)}</p>" if note else "")
    return f"<figure{' class=wide' if wide else ''}><figcaption>{caption}</figcaption>{key}{body}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    def cell(tag: str, place: int, text: str) -> str:
        return f"<{tag}{' class=text' if place in text_columns else ''}>{escape(text)}</{tag}>"

    top = "".join(cell("th", place, text) for place, text in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', place, text) for place, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def curves(
    runs: Sequence[Run],
    title: str,
    metrics: Sequence[tuple[str, str]],
    unit: str,
    note: str = "",
    missing: str = "",
    source: Callable[[Run, str], list[Point]] = Run.points,
    x_label: str = "step",
    log_y: bool = False,
) -> str:
    """One plot, every run: `metrics` are (name in metrics.jsonl, its label), the second one dashed."""
    series, without = [], []
    for place, run in enumerate(runs):
        found = [(metric, label, source(run, metric)) for metric, label in metrics]
        series += [
            Series(f"{run.name} {label}".strip(), points, place % COLOURS, dashed=metric != metrics[0][0])
            for metric, label, points in found
            if points
        ]
        if not any(points for _, _, points in found):
            without.append(run.name)
    if not series:
        names = " or ".join(metric for metric, _ in metrics)
        return figure(title, nothing(f"No run has {names}{': ' + missing if missing else '.'}"), note)
    key = [entry for entry in run_legend(runs) if entry[0] not in without]
    drawn = [metric for metric, _ in metrics if any(source(run, metric) for run in runs)]
    if len(metrics) > 1:
        key += [
            (label, "var(--soft)", "dash" if k else "line") for k, (name, label) in enumerate(metrics) if name in drawn
        ]
        absent = [label for name, label in metrics if name not in drawn]
        note += f" No data: {', '.join(absent)}." if absent else ""
    if without:
        note = f"{note} No data: {', '.join(without)}{' (' + missing.rstrip('.') + ')' if missing else ''}."
    return figure(title, line_chart(series, unit, x_label, log_y), note.strip(), legend(key))


def key_numbers(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        time = figures.step_time(run)
        total = figures.seconds_until(run, float("inf"))
        rows.append(
            [
                run.name,
                run.algorithm or _DASH,
                str(run.config.get("model", _DASH)),
                number(float(run.metrics[-1]["step"])),
                _from_to(run, "success"),
                _from_to(run, "reward"),
                _from_to(run, "zero_reward_ratio"),
                _DASH if time is None else f"{number(time.mean)} s",
                _DASH if total is None else duration(total),
                machine(run),
            ]
        )
    head = (
        "run",
        "algorithm",
        "model",
        "steps",
        "success",
        "reward",
        "zero-reward prompts",
        "a step",
        "in all",
        "machine",
    )
    return table(head, rows, (1, 2, 9))


def machine(run: Run) -> str:
    found = run.versions.get("machine")
    if not isinstance(found, dict):
        return _DASH
    gpus, cpus = found.get("gpus") or [], found.get("cpus")
    if gpus:
        kinds = {name: gpus.count(name) for name in gpus}
        return ", ".join(f"{count} x {name}" for name, count in kinds.items())
    return f"CPU only, {cpus} cores" if cpus else "CPU only"


def _from_to(run: Run, metric: str) -> str:
    ends = figures.first_and_last(run.values(metric))
    return _DASH if ends is None else f"{ends[0]:.3f} → {ends[1]:.3f}"


def differences(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    rows = config_differences(runs)
    if not rows:
        return '<p class="soft">The configurations of these runs are the same.</p>'
    body = table(
        ("key", *(run.name for run in runs)), [(key, *values) for key, values in rows], range(1, len(runs) + 1)
    )
    opened = " open" if len(rows) <= 12 else ""
    return f"<details{opened}><summary>Differences in configuration ({len(rows)})</summary>{body}</details>"


def changes_on_the_way(runs: Sequence[Run]) -> str:
    """Of runs that were resumed with other values: one of these did not make all of their steps."""
    rows = [(run.name, *row) for run in runs for row in config_changes(run)]
    if not rows:
        return ""
    body = table(("run", "key", "before", "now"), rows, (1, 2, 3))
    opened = " open" if len(rows) <= 12 else ""
    return f"<details{opened}><summary>Changed when a run was resumed ({len(rows)})</summary>{body}</details>"


def zero_reward_bars(runs: Sequence[Run]) -> str:
    values = [mean(found) if (found := run.values("zero_reward_ratio")) else None for run in runs]
    bars = [
        Bars(run.name, [value], run_colour(place)) for place, (run, value) in enumerate(zip(runs, values, strict=True))
    ]
    return figure(
        "Figure 2a: zero-reward prompts, overall",
        bar_chart(["mean over all steps"], bars, "share of prompts"),
        "Prompts none of whose rollouts (under the original prompt) is correct.",
        legend(run_legend(runs, "block")),
    )


def score_figure(runs: Sequence[Run]) -> str:
    title = "Figure 2b: interference scores of prompt tokens"
    found: list[tuple[int, str, figures.ScoreHistogram]] = []  # of a run's tokens, then of its deleted tokens
    for place, run in enumerate(runs):
        for label, scores in zip(("", "deleted tokens"), saved_scores(run), strict=True):
            histogram = figures.score_histogram(scores)
            if histogram is not None:
                found.append((place, label, histogram))
    if not found:
        return figure(title, nothing("No saved rollouts with scores: these runs do not purify prompts."))
    first, edges = figures.bin_range([histogram for _, _, histogram in found])
    if not edges:
        return figure(title, nothing("Every score is 0: policy and reference are still the same."))
    series = [
        Series(
            f"{runs[place].name} {label}".strip(),
            [(k - first, share) for k, share in histogram.shares.items()],
            place % COLOURS,
            dashed=bool(label),
        )
        for place, label, histogram in found
    ]
    zeros = [
        f"{runs[place].name} {one.zero_share:.1%} of {one.tokens:,} tokens" for place, label, one in found if not label
    ]
    note = (
        f"|log π − log π_ref| of each scored token, {figures.BINS_A_DECADE} bins a decade, both axes logarithmic. "
        f"Exactly 0: {'; '.join(zeros)}."
    )
    without = [run.name for place, run in enumerate(runs) if place not in {at for at, _, _ in found}]
    if without:
        note += f" No scores: {', '.join(without)}."
    key = [entry for entry in run_legend(runs) if entry[0] not in without]
    key += [("all tokens", "var(--soft)", "line"), ("deleted tokens", "var(--soft)", "dash")]
    return figure(title, step_chart(series, edges, "score (nats)", "share of tokens"), note, legend(key))


def saved_scores(run: Run) -> tuple[list[float], list[float]]:
    """Of all scored tokens, and of the deleted ones, each prompt once a step, in steps spread over the run."""
    scores: list[float] = []
    deleted: list[float] = []
    steps = run.folder.rollout_steps() if run.folder else []
    for step in steps[:: max(1, -(-len(steps) // SCORE_STEPS))]:
        assert run.folder is not None
        prompts: dict[str, dict[str, list]] = {}
        for row in run.folder.read_rollout_columns(step, ("prompt_id", "scores", "deleted")):
            if row["prompt_id"] not in prompts or row["deleted"]:
                prompts[row["prompt_id"]] = row
        for row in prompts.values():
            known = row["scores"] or []
            scores += [score for score in known if score is not None]
            deleted += [known[place] for place in row["deleted"] or [] if known and known[place] is not None]
    return scores, deleted


def distribution_figure(runs: Sequence[Run]) -> str:
    title = "Figure 5: sampling accuracy of prompts, early, middle, late"
    note = (
        "Each third of the run. Buckets by share of correct rollouts: failure 0; low below 1/3; mid from 1/3 to 2/3; "
        "high above 2/3, below 1; solved 1. Y: the rollouts of the original prompt. G: the group that trains, after "
        "failures were replaced by successes under the purified prompt."
    )
    colours = [f"var(--w{place})" for place in range(3)]
    found = []
    for run in runs:
        found.append((f"{run.name}: Y", figures.success_distribution(run, "original")))
        if any(value > 0 for value in run.values("rescue/replaced") or run.values("purified_ratio")):
            found.append((f"{run.name}: G", figures.success_distribution(run, "trained")))
    highest = max((max(map(max, shares.values())) for _, shares in found if shares), default=0.0)
    panels = []
    for name, shares in found:
        if shares is None:
            chart = nothing("No success_distribution for three steps or more in metrics.jsonl.")
        else:
            bars = [Bars(window, shares[window], css) for window, css in zip(figures.WINDOWS, colours, strict=True)]
            chart = bar_chart(figures.BUCKETS, bars, "share of prompts", highest)
        panels.append(f'<div class="panel"><h4>{escape(name)}</h4>{chart}</div>')
    key = legend([(window, css, "block") for window, css in zip(figures.WINDOWS, colours, strict=True)])
    return figure(title, f'<div class="row">{"".join(panels)}</div>', note, key, wide=True)


def evaluation_figures(runs: Sequence[Run]) -> list[str]:
    names = figures.evaluation_names(runs)
    if not names:
        return [
            figure("Figure 4: evaluation", nothing("No run was evaluated on benchmarks (no eval/… in its metrics)."))
        ]
    return [_evaluation_figure(runs, name) for name in names]


def _evaluation_figure(runs: Sequence[Run], name: str) -> str:
    title, reward = f"Figure 4: evaluation, {name[5:]}", f"{name}/reward"
    if not any(_differ(run.points(reward), run.points(name)) for run in runs):
        return curves(runs, title, [(name, "")], "accuracy")
    note = "Accuracy: the share of samples that are right; the mean reward has partial credit besides."
    return curves(runs, title, [(name, "accuracy"), (reward, "mean reward")], "share of samples", note)


def _differ(one: Sequence[Point], other: Sequence[Point]) -> bool:
    known = dict(other)
    return any(abs(value - known.get(step, value)) > 1e-9 for step, value in one)


def speedup_figure(runs: Sequence[Run]) -> str:
    title = "Figure 6: speed-up to the same success"
    if len(runs) < 2:
        return figure(title, nothing("One run alone: name a second one to compare with."))
    base = baseline(runs)
    metric = figures.speedup_metric(runs)
    found = {place: figures.speedup(runs[base], run, metric) for place, run in enumerate(runs) if place != base}
    known = {place: one for place, one in found.items() if one is not None}
    if not known:
        return figure(title, nothing(f"{metric} is not known for {runs[base].name} and another run."))
    first = next(iter(known.values()))
    window = figures.speedup_window(metric, len(runs[base].points(metric)))
    averaged = f", each point the mean of {window} steps" if window > 1 else ""
    note = (
        f"When each run first reaches the peak of {runs[base].name} ({metric} {first.peak:.3f} at step "
        f"{number(first.baseline_steps)}{averaged}). Above 1 is faster. The paper: 1.67x and 1.64x in steps."
    )
    leads = [(runs[place].name, *_lead(one.lead)) for place, one in known.items() if one.lead is not None]
    if leads:
        note += f" Lead: over {runs[base].name} when the first of the two was there, and two standard errors of it."
    rows = []
    for place, one in known.items():
        rows.append(
            [
                runs[place].name,
                "not reached" if one.steps is None else number(one.steps),
                _times(one.in_steps),
                _DASH if one.seconds is None else duration(one.seconds),
                _times(one.in_time),
            ]
        )
    bars = [Bars(runs[base].name, [1.0, 1.0], run_colour(base))]
    bars += [Bars(runs[place].name, [one.in_steps, one.in_time], run_colour(place)) for place, one in known.items()]
    key = legend([(one.label, one.css, "block") for one in bars])
    body = bar_chart(["in steps", "in time"], bars, "speed-up (times)")
    body += table(("run", "at step", "in steps", "after", "in time"), rows)
    if leads:  # a table of its own: one with all columns is wider than a figure
        body += table(("run", "lead", ""), leads, (2,))
    return figure(title, body, note, key)


def _lead(lead: figures.Lead) -> tuple[str, str]:
    return f"{lead.difference:+.3f} ± {2 * lead.error:.3f}", "within noise" if lead.within_noise else "beyond noise"


def _times(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f}x"


def step_time_table(runs: Sequence[Run]) -> str:
    title = "Table 5: time of a step"
    base = baseline(runs)
    times = [figures.step_time(run) for run in runs]
    reference = times[base]
    rows = [
        [run.name, number(time.mean), number(time.median), _times(time.mean / reference.mean) if reference else _DASH]
        for run, time in zip(runs, times, strict=True)
        if time is not None
    ]
    if not rows:
        return figure(title, nothing("No run recorded time/step."))
    note = f"Relative to {runs[base].name}; the first step, which warms up, is left out. The paper: 1.27x to 1.56x for LENS."
    return figure(title, table(("run", "mean (s)", "median (s)", "relative cost"), rows), note)


def step_time_figure(runs: Sequence[Run]) -> str:
    times = [(run, time) for run in runs if (time := figures.step_time(run)) is not None]
    title = "Step time by phase"
    if not times:
        return figure(title, nothing("No run recorded time/step."))
    phases = list(dict.fromkeys(phase for _, time in times for phase in time.phases))
    phases = [phase for phase in phases if phase != "other"] + ["other"] * ("other" in phases)
    parts = [
        Bars(
            phase,
            [time.phases.get(phase) for _, time in times],
            "var(--line)" if phase == "other" else run_colour(place),
        )
        for place, phase in enumerate(phases)
    ]
    body = stacked_bars([run.name for run, _ in times], parts, "mean seconds a step")
    note = "Mean over the steps after the first. Other: in no phase. Phases that overlap add up to more than the step."
    return figure(title, body, note, legend([(part.label, part.css, "block") for part in parts]))
