"""The `eval` command: every model, every question that has no answer yet, then tables and pages.

OUT/answers/NAME.jsonl   every answer, written as it is judged     OUT/table.md, table.tex
OUT/NAME.html            the table and every answer of a model     OUT/results.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lens_megatron.data.prompts import first_prompt
from lens_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from lens_megatron.evaluation import tables
from lens_megatron.evaluation.answer_file import AnswerFile
from lens_megatron.evaluation.config import EvalConfig
from lens_megatron.evaluation.kept_answers import Answering, Answers, answers_to
from lens_megatron.evaluation.models import EvalModel
from lens_megatron.evaluation.page import evaluation_page
from lens_megatron.evaluation.results import ModelResult, model_result, results_tree
from lens_megatron.evaluation.sets import (
    EvalSet,
    load_sets,
    questions,
    with_benchmark_rules,
)
from lens_megatron.model_spec import named_template, template_origin
from lens_megatron.output import write_json, write_page


def evaluate(models: list[EvalModel], config: EvalConfig, out: Path) -> list[ModelResult]:
    """Files are written after each model, so that an evaluation of a run's steps can be looked at while it goes on."""
    results: list[ModelResult] = []
    told = ""  # the template whose first prompt was shown: the steps of a run are asked alike
    for model in models:
        tokenizer = load_tokenizer(str(model.tokenizer))
        check_tokenizer(tokenizer, model.spec.vocab_size)
        template = named_template(config.template, model.template)
        sets = load_sets(config, tokenizer, template)
        if template != told:
            origin = template_origin("template", config.template, model.template_from)
            print(first_prompt(tokenizer, sets[0].prompts[0].tokens, origin), file=sys.stderr)
        told = template
        answers = answers_of(model, config, sets, tokenizer, out)
        results.append(model_result(model.title, model.step, sets, answers, config.level))
        write_files(out, results, config, model, sets, answers)
    return results


def answers_of(model: EvalModel, config: EvalConfig, sets: list[EvalSet], tokenizer: Any, out: Path) -> Answers:
    """From the file, and from the engine what is not there."""
    how = Answering(model, tokenizer, config, with_benchmark_rules(config.rewards), out / "logs")
    template = named_template(config.template, model.template)
    made_by = {"model": model.title, **how.made_by(), "template": template}
    with AnswerFile(out / "answers" / f"{model.name}.jsonl", made_by) as file:
        return dict(answers_to(questions(sets, config.seed), file, how, model.title))


def settings(config: EvalConfig) -> dict[str, Any]:
    """What stands under a table."""
    return {
        "temperature": config.temperature,
        "top-p": config.top_p,
        "at most": f"{config.max_response_tokens} tokens",
        "seed": config.seed,
        "interval": f"{100 * config.level:g}%",
    }


def write_files(
    out: Path, results: list[ModelResult], config: EvalConfig, model: EvalModel, sets: list[EvalSet], answers: Answers
) -> None:
    details = "".join(f"\n## {result.name}\n\n{tables.markdown_details(result)}" for result in results)
    page = evaluation_page(results, settings(config), (model.title, sets, answers))
    write_json(out / "results.json", results_tree(results, settings(config)))
    for name, text in (
        ("table.md", tables.markdown_table(results) + details),
        ("table.tex", tables.latex_table(results)),
        (f"{model.name}.html", page),
    ):
        write_page(out / name, text)
