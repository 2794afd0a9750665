"""The `eval` command: every model, every question that has no answer yet, then tables and pages.

OUT/answers/NAME.jsonl   every answer, written as it is judged     OUT/table.md, table.tex
OUT/NAME.html            the table and every answer of a model     OUT/results.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_megatron.data.tokenizer import check_tokenizer, load_tokenizer, stop_tokens
from lens_megatron.errors import UsageError
from lens_megatron.evaluation import tables
from lens_megatron.evaluation.answer_file import AnswerFile
from lens_megatron.evaluation.answering import Answer, Limits, answer_all
from lens_megatron.evaluation.config import EvalConfig
from lens_megatron.evaluation.engines import engine_for
from lens_megatron.evaluation.models import EvalModel
from lens_megatron.evaluation.page import evaluation_page
from lens_megatron.evaluation.results import ModelResult, model_result, results_tree
from lens_megatron.evaluation.sets import (
    EvalSet,
    Question,
    load_sets,
    named_template,
    questions,
    with_benchmark_rules,
)
from lens_megatron.evaluation.show_progress import AnswerProgress
from lens_megatron.output import write_json
from lens_megatron.rollout.factory import TextReward, ends_of_the_model

Answers = Mapping[tuple[str, str, int, str], Answer]


def evaluate(models: list[EvalModel], config: EvalConfig, out: Path) -> list[ModelResult]:
    """Files are written after each model, so that an evaluation of a run's steps can be looked at while it goes on."""
    results: list[ModelResult] = []
    for model in models:
        tokenizer = load_tokenizer(str(model.tokenizer))
        check_tokenizer(tokenizer, model.spec.vocab_size)
        sets = load_sets(config, tokenizer, named_template(config.template, model.template))
        answers = answers_of(model, config, sets, tokenizer, out)
        results.append(model_result(model.title, model.step, sets, answers, config.level))
        write_files(out, results, config, model, sets, answers)
    return results


def answers_of(model: EvalModel, config: EvalConfig, sets: list[EvalSet], tokenizer: Any, out: Path) -> Answers:
    """From the file, and from the engine what is not there."""
    wanted = questions(sets, config.seed)
    with AnswerFile(out / "answers" / f"{model.name}.jsonl", made_by(model, config)) as file:
        missing = [question for question in wanted if question.key not in file.answers]
        if missing:
            _generate(model, config, missing, tokenizer, file, len(wanted))
        return dict(file.answers)


def made_by(model: EvalModel, config: EvalConfig) -> dict[str, Any]:
    """What an answer depends on, besides its question."""
    return {
        "model": model.title,
        "weights": model.weights_id(),
        "template": named_template(config.template, model.template),
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_response_tokens": config.max_response_tokens,
        "seed": config.seed,
        "engine": "embedded" if config.engine == "embedded" else "sglang",  # they do not draw the same from a seed
    }


def _generate(
    model: EvalModel, config: EvalConfig, missing: list[Question], tokenizer: Any, file: AnswerFile, total: int
) -> None:
    judge = TextReward(tokenizer, with_benchmark_rules(config.rewards), config.stall_seconds)
    try:
        with (
            model.hf_folder(file.path.parent) as folder,
            engine_for(config, folder, model.spec.max_positions, file.path.parent.parent / "logs") as engine,
            AnswerProgress(model.title, total - len(missing), total) as progress,
        ):

            def keep(question: Question, answer: Answer) -> None:
                file.append(answer)
                progress.add(answer)

            limits = Limits(
                config.max_response_tokens,
                model.spec.max_positions,
                tuple({*stop_tokens(tokenizer), *ends_of_the_model(model.tokenizer)}),
                config.temperature,
                config.top_p,
                config.stall_seconds,
            )
            answer_all(engine, judge.judge, missing, limits, keep)
    finally:
        judge.close()


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
        try:
            (out / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{out / name}: {error.strerror}") from None
