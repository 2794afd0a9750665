"""The results as Table 1 of the paper has them: Markdown, LaTeX, and the same cells for a terminal or a page.

Percent with two decimals; the columns in the paper's order, under what they measure; the best of each column in bold
and the second best underlined, when there are several rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from lens_megatron.evaluation.results import ModelResult, SetResult

# in the paper's order, with its names
_COLUMNS = {
    "math500": "MATH",
    "minerva_math": "Minerva",
    "olympiadbench": "Olympiad",
    "gaokao2023en": "GAO",
    "amc23": "AMC23",
    "aime24": "AIME24",
    "aime25": "AIME25",
}
AVERAGE = "Avg."


def ordered(result: ModelResult) -> list[SetResult]:
    """The paper's columns first, and measures next to each other."""
    places = list(_COLUMNS)
    known = sorted((one for one in result.sets if one.name in _COLUMNS), key=lambda one: places.index(one.name))
    return known + [one for one in result.sets if one.name not in _COLUMNS]


def measures(results: Sequence[ModelResult]) -> list[tuple[str, int]]:
    """The upper head: each measure and how many columns stand under it."""
    return [(name, len(list(some))) for name, some in groupby(one.measure for one in ordered(results[0]))]


def columns(results: Sequence[ModelResult]) -> list[str]:
    """The lower head. A star: only a part of the benchmark."""
    names = [_COLUMNS.get(one.name, one.title) + ("" if one.whole else "*") for one in ordered(results[0])]
    return [*names, AVERAGE] if len(names) > 1 else names


def cells(result: ModelResult) -> list[str]:
    values = [one.average for one in ordered(result)]
    return [f"{100 * value:.2f}" for value in ([*values, result.average] if len(values) > 1 else values)]


def marks(results: Sequence[ModelResult]) -> list[list[str]]:
    """For each cell `best`, `second` or nothing; by what is printed, so that equal cells are marked alike."""
    rows = [cells(result) for result in results]
    if len(rows) < 2:
        return [[""] * len(row) for row in rows]
    marked: list[list[str]] = []
    for row in rows:
        marked.append([])
        for place, cell in enumerate(row):
            better = sorted({float(other[place]) for other in rows}, reverse=True)
            rank = better.index(float(cell))
            marked[-1].append("best" if rank == 0 else "second" if rank == 1 else "")
    return marked


def markdown_table(results: Sequence[ModelResult]) -> str:
    style = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    names = columns(results)
    upper: list[str] = []
    for measure, count in measures(results):
        upper += [measure, *[""] * (count - 1)]
    upper += [""] * (len(names) - len(upper))
    lines = [
        _line(["Model", *upper]),
        _line(["---", *["---:"] * len(names)]),
        _line(["", *names]),
    ]
    for result, row in zip(results, marks(results), strict=True):
        shown = [style[mark].format(cell) for cell, mark in zip(cells(result), row, strict=True)]
        lines.append(_line([_plain(result.name), *shown]))
    return "\n".join([*lines, *(["", note] if (note := partial_note(results)) else [])]) + "\n"


def latex_table(results: Sequence[ModelResult]) -> str:
    """With booktabs, as the paper's."""
    style = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    names = columns(results)
    upper, rules, at = [r"\multirow{2}{*}{Model}"], [], 2
    for measure, count in measures(results):
        upper.append(rf"\multicolumn{{{count}}}{{c}}{{{_tex(measure)}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + count - 1}}}")
        at += count
    upper += [rf"\multirow{{2}}{{*}}{{{AVERAGE}}}"] * (names[-1] == AVERAGE)
    lower = ["", *(_tex(name) if name != AVERAGE else "" for name in names)]
    lines = [
        "% \\usepackage{booktabs,multirow}",
        rf"\begin{{tabular}}{{l{'c' * len(names)}}}",
        r"\toprule",
        " & ".join(upper) + r" \\",
        "".join(rules),
        " & ".join(lower) + r" \\",
        r"\midrule",
    ]
    for result, row in zip(results, marks(results), strict=True):
        shown = [style[mark].format(cell) for cell, mark in zip(cells(result), row, strict=True)]
        lines.append(" & ".join([_tex(result.name), *shown]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if note := partial_note(results):
        lines.append("% " + note)
    return "\n".join(lines) + "\n"


_DETAILS = ("benchmark", "problems", "k", "accuracy", "std. error", "interval", "resampled", "pass@k", "tokens", "cut")


def detail_head(result: ModelResult) -> tuple[str, ...]:
    """With the mean reward where any benchmark gives partial credit."""
    return (*_DETAILS, "reward") if _graded(result) else _DETAILS


def detail_rows(result: ModelResult) -> list[list[str]]:
    """What does not fit into Table 1, one line a benchmark. Percent, but for tokens."""
    rows = []
    for one in ordered(result):
        passes = ", ".join(f"{k}: {100 * value:.1f}" for k, value in one.pass_at.items() if k > 1)
        rows.append(
            [
                one.title,
                str(one.problems) if one.whole else f"{one.problems} of {one.size}",
                str(one.samples),
                f"{100 * one.average:.2f}",
                _percent(one.standard_error),
                f"{100 * one.interval.low:.1f} to {100 * one.interval.high:.1f}",
                _percent(one.sampling_error),
                passes or "–",
                f"{one.response_tokens:,.0f}",
                f"{100 * one.truncated:.1f}",
                *([f"{100 * one.reward:.2f}"] if _graded(result) else []),
            ]
        )
    return rows


def markdown_details(result: ModelResult) -> str:
    names = detail_head(result)
    head = [_line(names), _line(["---", *["---:"] * (len(names) - 1)])]
    return "\n".join([*head, *(_line(row) for row in detail_rows(result))]) + "\n"


def partial_note(results: Sequence[ModelResult]) -> str:
    parts = [f"{one.title}: {one.problems} of {one.size} problems" for one in ordered(results[0]) if not one.whole]
    return (
        f"Starred: only a part of the benchmark ({'; '.join(parts)}): no figure to compare with others'"
        if parts
        else ""
    )


def _graded(result: ModelResult) -> bool:
    return any(one.graded for one in result.sets)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"


def _plain(text: str) -> str:
    return text.replace("|", r"\|")


def _tex(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, "\\" + sign)
    return text
