"""The page of an evaluation: Table 1, its errors, a run's curves, and every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lens_megatron import __version__
from lens_megatron.evaluation import tables
from lens_megatron.evaluation.answering import Answer
from lens_megatron.evaluation.results import ModelResult
from lens_megatron.evaluation.sets import EvalSet, fingerprint
from lens_megatron.reporting.charts import Series, line_chart
from lens_megatron.reporting.document import html_document
from lens_megatron.reporting.panels import figure, table

Key = tuple[str, str, int, str]


def evaluation_page(
    results: Sequence[ModelResult],
    settings: Mapping[str, Any],
    answered: tuple[str, Sequence[EvalSet], Mapping[Key, Answer]],
) -> str:
    """`answered`: the model whose answers the page carries, all of them: its name, sets and answers."""
    name, sets, answers = answered
    sections = [("table", "Table 1", _table(results) + _settings(settings))]
    if sum(result.step is not None for result in results) > 1:
        sections.append(("curves", "Figure 4: learning curves", _curves(results)))
    shown = next(result for result in results if result.name == name)
    sections.append(("details", f"Errors and lengths: {escape(name)}", _details(shown)))
    sections.append(("answers-of", f"Every answer: {escape(name)}", _browser()))
    return html_document(
        f"{name}: evaluation",
        name if len(results) == 1 else f"{name}, of {len(results)} evaluated models",
        f"Evaluation by lens-megatron {__version__}, {{made}}.",
        sections,
        ("evaluation", {"sets": [_set_data(one, answers) for one in sets]}),
        "Table and figure numbers are those of arXiv 2601.21244.",
        scripts=("page.js", "answers.js"),
    )


def _table(results: Sequence[ModelResult]) -> str:
    names = tables.columns(results)
    upper = "".join(f'<th class="measure" colspan="{count}">{escape(m)}</th>' for m, count in tables.measures(results))
    upper += "<th></th>" * (names[-1] == tables.AVERAGE)
    lower = "".join(f"<th>{escape(name)}</th>" for name in names)
    style = {"best": "<b>{}</b>", "second": "<u>{}</u>", "": "{}"}
    body = ""
    for result, marked in zip(results, tables.marks(results), strict=True):
        cells = (style[mark].format(cell) for cell, mark in zip(tables.cells(result), marked, strict=True))
        body += f"<tr><td>{escape(result.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    note = f'<p class="soft">{escape(tables.partial_note(results))}</p>' if tables.partial_note(results) else ""
    head = f"<tr><th></th>{upper}</tr><tr><th>model</th>{lower}</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}'


def _settings(settings: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f'<p class="soft">Percent. {escape(shown)}.</p>'


def _curves(results: Sequence[ModelResult]) -> str:
    by_step = [result for result in results if result.step is not None]
    plots = []
    for place, one in enumerate(tables.ordered(by_step[0])):
        points = [(float(result.step or 0), tables.ordered(result)[place].average) for result in by_step]
        plots.append(figure(one.title, line_chart([Series(one.title, points, 0)], one.measure)))
    if len(by_step[0].sets) > 1:
        points = [(float(result.step or 0), result.average) for result in by_step]
        plots.append(figure("Average", line_chart([Series("average", points, 1)], "plain mean")))
    return f'<div class="figures">{"".join(plots)}</div>'


def _details(result: ModelResult) -> str:
    about = (
        "Percent. Standard error and interval (bootstrap): over another draw of problems. Resampled: the standard error "
        "of answering the same problems again. pass@k: unbiased. Tokens: mean of a response; cut: at the limit of tokens."
    )
    if any(one.graded for one in result.sets):
        about += " Reward: the mean, with partial credit, which is in no other column."
    verdicts = [
        [one.title, *(str(one.verdicts.get(kind, 0)) for kind in ("correct", "partial", "wrong", "unparsable"))]
        for one in tables.ordered(result)
    ]
    return (
        table(tables.detail_head(result), tables.detail_rows(result))
        + f'<p class="soft">{about}</p>'
        + table(("answers", "correct", "partial", "wrong", "unparsable"), verdicts)
    )


def _browser() -> str:
    return """<div class="browser" id="answers">
<div class="choose"><label>benchmark<select name="set"></select></label><label>problems<select name="kind"></select></label>
<label>with the text<input name="text" type="search"></label></div>
<p class="soft"><span class="count"></span></p>
<div class="shown"></div><button type="button">more</button></div>"""


def _set_data(one: EvalSet, answers: Mapping[Key, Answer]) -> dict[str, Any]:
    problems = []
    for prompt in one.prompts:
        keys = [(one.name, prompt.id, index, fingerprint(prompt)) for index in range(one.samples)]
        problems.append(
            {
                "id": prompt.id,
                "question": prompt.text,
                "answer": prompt.answer,
                "answers": [_answer_data(answers[key]) for key in keys],
            }
        )
    return {"title": one.title, "problems": problems}


def _answer_data(answer: Answer) -> dict[str, Any]:
    kept = ("score", "verdict", "note", "extracted", "tokens", "finish")
    return {**{name: getattr(answer, name) for name in kept}, "text": answer.response}
