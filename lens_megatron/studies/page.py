"""The study as one HTML page. Simulated cells have figures of their own; plans meet measurements in one figure only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

from lens_megatron import __version__
from lens_megatron.reporting.charts import Bars, Point, Series, bar_chart, line_chart, nothing, number, stacked_bars
from lens_megatron.reporting.document import html_document
from lens_megatron.reporting.panels import COLOURS, figure, legend, run_colour, table
from lens_megatron.studies.config import Study
from lens_megatron.studies.table import PHASES, Result, cell_row

_DASH = "–"
_IDEAL = COLOURS - 1  # the last colour, which no other line has
_NOT_LINES = ("nodes", "scaling", "seed")  # axes that a line of a plot runs over or averages
Row = dict[str, Any]


def study_page(study: Study, results: Sequence[Result]) -> str:
    rows = [cell_row(study, result) for result in results]
    measured = [row for row in rows if row["source"] == "measured"]
    simulated = [row for row in rows if row["source"] == "simulated"]
    groups = {name: place for place, name in enumerate(dict.fromkeys(map(_group, rows)))}
    sections = [("summary", "Cells", _summary(study, rows))]
    if measured:
        sections.append(("measured", "Measured", grid(_scaling(measured, groups, simulated=False))))
        sections.append(("learning", "Learning and its cost", grid(_learning(study, results, rows, groups))))
    if simulated:
        note = (
            f'<p class="soft"><b>SIMULATED</b>: computed by the planner for {study.config.gpu}, not measured. '
            "Dashed here, and in no figure of measured cells.</p>"
        )
        sections.append(
            ("simulated", "Simulated by the planner", note + grid(_scaling(simulated, groups, simulated=True)))
        )
    sections.append(("plans", "Planned against measured", grid([_planned_against_measured(rows)])))
    title = study.config.name or study.folder.name
    about = f"{len(rows)} cells, {len(measured)} to be measured and {len(simulated)} simulated."
    footer = (
        "A step: mean without the first. GPUs: processes, on machines without GPUs. Values of seeds are averaged. "
        "Ideal: the smallest cell's value, times the ratio of GPUs."
    )
    key = legend([(name or "run", _colour(place), "line") for name, place in groups.items()])
    return html_document(
        f"{title}: study",
        title,
        f"Study by lens-megatron {__version__}, {{made}}. {about}",
        sections,
        ("cells", rows),
        footer,
        key,
    )


def grid(parts: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(parts)}</div>'


def _group(row: Mapping[str, Any]) -> str:
    """What a line is: the cell's labels without those that the line runs over."""
    own = list(row)[1 : list(row).index("state")]
    # null: the axis at its default, or a cell of which nothing is known yet that the axis shares its name with (`steps`)
    return " ".join(f"{row[axis]}" if isinstance(row[axis], str) else f"{axis} {row[axis]}" for axis in own
                    if axis not in _NOT_LINES and row[axis] is not None)  # fmt: skip


def _colour(place: int) -> str:
    return run_colour(place % _IDEAL)


def _summary(study: Study, rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row["state"] == "failed"]
    states = ("done", "simulated", "failed", "begun", "waiting")
    counts = {state: sum(row["state"] == state for row in rows) for state in states}
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    head = ("cell", "state", "why", "GPUs", "steps", "s a step", "tokens/s/GPU", "MFU", "success", "GPU-hours")
    body = [
        (
            row["cell"],
            row["state"],
            row["reason"] or "",
            _value(row["gpus"]),
            _value(row["steps"]),
            _value(row["step_seconds"]),
            _value(row["tokens_per_second_per_gpu"]),
            _DASH if row["mfu"] is None else f"{row['mfu']:.0%}",
            _value(row["success"]),
            _value(row["gpu_hours"]),
        )
        for row in [*failed, *(row for row in rows if row["state"] != "failed")]
    ]
    return f"<p>{words}.</p>" + table(head, body, (1, 2))


def _value(value: Any) -> str:
    return _DASH if value is None else number(float(value))


def _scaling(rows: Sequence[Row], groups: Mapping[str, int], simulated: bool) -> list[str]:
    mark = " (SIMULATED)" if simulated else ""
    parts = []
    strong = [row for row in rows if row.get("scaling") in (None, "strong")]
    weak = [row for row in rows if row.get("scaling") == "weak"]
    if _several_sizes(strong):
        parts.append(
            _over_gpus(f"Strong scaling: speed-up{mark}", strong, groups, _speed_up, "times the smallest", "linear", simulated,
                       "The same batch on more GPUs.")
        )  # fmt: skip
    if _several_sizes(weak):
        parts.append(
            _over_gpus(f"Weak scaling: efficiency{mark}", weak, groups, _efficiency, "share of the smallest", "flat", simulated,
                       "The batch grows with the GPUs: tokens/s/GPU against the smallest cell's.")
        )  # fmt: skip
    for title, name, unit in (
        ("Throughput", "tokens_per_second_per_gpu", "tokens/s/GPU"),
        ("Model FLOPs utilisation of training", "mfu", "share of the data sheet's peak"),
    ):
        values = [row for row in rows if row[name] is not None]
        if not values:
            why = (
                "Only GPUs of a named kind (`gpu:`) have a peak to compare with."
                if name == "mfu"
                else "No cell finished."
            )
            parts.append(figure(title + mark, nothing(why)))
        elif _several_sizes(values):
            parts.append(
                _over_gpus(title + mark, values, groups, partial(_plain_points, name=name), unit, "", simulated, "")
            )
        else:
            parts.append(_bars(title + mark, values, name, unit))
    parts.append(_split(f"Step time by phase{mark}", rows))
    return parts


def _several_sizes(rows: Sequence[Row]) -> bool:
    return len({row["gpus"] for row in rows if row["step_seconds"] is not None}) > 1


def _plain_points(rows: Sequence[Row], name: str) -> list[Point]:
    sizes = sorted({row["gpus"] for row in rows if row[name] is not None})
    return [
        (float(size), mean(row[name] for row in rows if row["gpus"] == size and row[name] is not None))
        for size in sizes
    ]


def _speed_up(rows: Sequence[Row]) -> list[Point]:
    points = _plain_points(rows, "step_seconds")
    return [(size, points[0][1] / seconds) for size, seconds in points]


def _efficiency(rows: Sequence[Row]) -> list[Point]:
    points = _plain_points(rows, "tokens_per_second_per_gpu")
    return [(size, rate / points[0][1]) for size, rate in points]


def _over_gpus(
    title: str,
    rows: Sequence[Row],
    groups: Mapping[str, int],
    points_of: Callable[[Sequence[Row]], list[Point]],
    unit: str,
    ideal: str,
    simulated: bool,
    note: str,
) -> str:
    series = []
    both = len({row.get("scaling") for row in rows}) > 1
    for name, scaling in dict.fromkeys((_group(row), row.get("scaling")) for row in rows):
        points = points_of([row for row in rows if (_group(row), row.get("scaling")) == (name, scaling)])
        if points:
            # weak scaling beside strong in one plot: the colour of another line, since dashes mean simulated
            colour = groups[name] + (len(groups) if both and scaling == "weak" else 0)
            label = f"{name} {scaling}".strip() if both else name or "run"
            series.append(Series(label, points, colour % _IDEAL, dashed=simulated))
    if ideal:
        sizes = sorted({x for one in series for x, _ in one.points})
        line = [(x, x / sizes[0] if ideal == "linear" else 1.0) for x in sizes]
        series.insert(0, Series("ideal", line, _IDEAL))  # first: under what it is compared with
    key = legend([(one.label, f"var(--s{one.colour})", "dash" if one.dashed else "line") for one in series])
    return figure(title, line_chart(series, unit, "GPUs", from_zero=True), note, key)


def _bars(title: str, rows: Sequence[Row], name: str, unit: str) -> str:
    return figure(
        title, bar_chart([row["cell"] for row in rows], [Bars("", [row[name] for row in rows], "var(--s0)")], unit)
    )


def _split(title: str, rows: Sequence[Row]) -> str:
    bars: dict[str, list[Row]] = {}  # seeds together
    for row in rows:
        if row["step_seconds"] is not None:
            name = f"{_group(row)} {row.get('scaling') or ''}".strip() or "run"
            bars.setdefault(f"{name} · {row['gpus']}", []).append(row)
    if not bars:
        return figure(title, nothing("No cell finished a step."))
    parts = []
    for place, phase in enumerate(PHASES):
        seconds = [[row[f"seconds/{phase}"] for row in same if row[f"seconds/{phase}"]] for same in bars.values()]
        if any(seconds):
            colour = "var(--line)" if phase == "other" else _colour(place)
            parts.append(Bars(phase, [mean(values) if values else None for values in seconds], colour))
    body = stacked_bars(list(bars), parts, "mean seconds a step")
    key = legend([(part.label, part.css, "block") for part in parts])
    return figure(title, body, "Cells, and their number of GPUs.", key, wide=True)


def _learning(study: Study, results: Sequence[Result], rows: Sequence[Row], groups: Mapping[str, int]) -> list[str]:
    by_group: dict[str, list[Result]] = {}
    for result, row in zip(results, rows, strict=True):
        if result.run is not None:
            by_group.setdefault(_group(row), []).append(result)
    metric = study.config.target.metric if study.config.target else "success"
    series = []
    for name, members in by_group.items():
        steps: dict[float, list[float]] = {}
        for member in members:
            for step, value in member.run.points(metric) if member.run else []:
                steps.setdefault(step, []).append(value)
        points = [(step, mean(values)) for step, values in sorted(steps.items()) if len(values) == len(members)]
        if points:
            series.append(Series(name or "run", points, groups[name] % _IDEAL))
    chart = line_chart(series, metric) if series else nothing(f"No cell has {metric}.")
    note = "Mean over seeds and sizes, of the steps that all of them have."
    parts = [
        figure(f"Training: {metric}", chart, note, legend([(o.label, f"var(--s{o.colour})", "line") for o in series]))
    ]
    if study.config.target is None:
        return [*parts, figure("GPU-hours to a target", nothing("STUDY.yaml names no target."))]
    target = study.config.target
    body = [
        (row["cell"], number(row["gpu_hours_to_target"]) if row["gpu_hours_to_target"] is not None else "not reached",
         _value(row["gpu_hours"]))
        for row in rows if row["source"] == "measured" and row["steps"]
    ]  # fmt: skip
    title = f"GPU-hours until {target.metric} is {target.value:g}"
    note = f"Mean of {target.window} steps. On a machine without GPUs: hours of processes."
    shown = table(("cell", "to the target", "in all"), body) if body else nothing("No cell finished a step.")
    return [*parts, figure(title, shown, note, wide=True)]


def _planned_against_measured(rows: Sequence[Row]) -> str:
    title = "Seconds a step: planned and measured"
    both = [
        row for row in rows
        if row["source"] == "measured" and row["planned_step_seconds"] is not None and row["step_seconds"] is not None
    ]  # fmt: skip
    if not both:
        return figure(
            title, nothing("No measured cell has a plan: STUDY.yaml's gpu says which kind to plan for."), wide=True
        )
    body = [
        (row["cell"], number(row["planned_step_seconds"]), number(row["step_seconds"]),
         f"{row['planned_step_seconds'] / row['step_seconds'] - 1:+.0%}", row["processors"])
        for row in both
    ]  # fmt: skip
    note = f"Planned for {both[0]['planned_on']}, with the measured mean length of responses."
    if any(row["processors"] == "cpu" for row in both):
        note += " Measured on CPU: the two are of different machines, and the comparison shows only that."
    return figure(
        title, table(("cell", "planned (s)", "measured (s)", "error", "measured on"), body, (4,)), note, wide=True
    )
