"""Answers to questions: those on disk, judged again where the rules have changed, and from the engine what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lens_megatron.data.tokenizer import stop_tokens
from lens_megatron.evaluation.answer_file import AnswerFile, Key
from lens_megatron.evaluation.answering import Answer, Limits, answer_all
from lens_megatron.evaluation.config import GenerationConfig
from lens_megatron.evaluation.engines import engine_for
from lens_megatron.evaluation.models import EvalModel
from lens_megatron.evaluation.sets import Question
from lens_megatron.evaluation.show_progress import AnswerProgress
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rewards.rules_id import rules_id
from lens_megatron.rollout.factory import TextReward, ends_of_the_model

Answers = Mapping[Key, Answer]


@dataclass(frozen=True)
class Answering:
    """Who answers, how, and who judges. `logs`: of servers that are started for it."""

    model: EvalModel
    tokenizer: Any
    config: GenerationConfig
    rewards: RewardConfig
    logs: Path

    def made_by(self) -> dict[str, Any]:
        """What a response depends on, besides its question."""
        return {
            "weights": self.model.weights_id(),
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "max_response_tokens": self.config.max_response_tokens,
            "seed": self.config.seed,
            # two engines do not draw the same from a seed
            "engine": "embedded" if self.config.engine == "embedded" else "sglang",
        }


def answers_to(wanted: Sequence[Question], file: AnswerFile, how: Answering, title: str) -> Answers:
    """The file holds all of them afterwards, each written when it was judged."""
    missing = [question for question in wanted if question.key not in file.answers]
    kept = [question for question in wanted if question.key in file.answers]
    outdated = [q for q in kept if file.answers[q.key].rules != rules_id(how.rewards, q.prompt.source)]
    if missing or outdated:
        judge = TextReward(how.tokenizer, how.rewards, how.config.stall_seconds)
        try:
            if outdated:
                _judge_again(outdated, file, how, judge, title)
            if missing:
                _generate(missing, file, how, judge, title, len(wanted))
        finally:
            judge.close()
    return file.answers


def _judge_again(outdated: Sequence[Question], file: AnswerFile, how: Answering, judge: TextReward, title: str) -> None:
    """One that no judge came to an end with keeps what was said of it, and has its turn the next time."""
    _say(f"{title}: {len(outdated):,} kept answers are judged again, by the rules of today")
    before = [file.answers[question.key] for question in outdated]
    judged = [
        judge.judge_text(q.prompt, answer.response, answer.finish) for q, answer in zip(outdated, before, strict=True)
    ]
    failed = 0
    for question, earlier, future in zip(outdated, before, judged, strict=True):
        judgement = future.result()
        if judgement.note in ("timeout", "memory", "crashed"):
            failed += 1
            continue
        rules = rules_id(how.rewards, question.prompt.source)
        file.append(replace(earlier, **asdict(judgement), rules=rules))
    if failed:
        _say(f"{title}: {failed:,} of them could not be judged within the limits (rewards), and stay as they were")


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def _generate(
    missing: Sequence[Question], file: AnswerFile, how: Answering, judge: TextReward, title: str, total: int
) -> None:
    model, config = how.model, how.config
    with (
        model.hf_folder(file.path.parent) as folder,
        engine_for(config, folder, model.spec.max_positions, how.logs) as engine,
        AnswerProgress(title, total - len(missing), total) as progress,
    ):

        def keep(question: Question, answer: Answer) -> None:
            file.append(replace(answer, rules=rules_id(how.rewards, question.prompt.source)))
            progress.add(answer)

        limits = Limits(
            config.max_response_tokens,
            model.spec.max_positions,
            tuple({*stop_tokens(how.tokenizer), *ends_of_the_model(model.tokenizer)}),
            config.temperature,
            config.top_p,
            config.stall_seconds,
        )
        answer_all(engine, judge.judge, missing, limits, keep)
