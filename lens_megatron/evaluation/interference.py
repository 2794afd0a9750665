"""`analyze interference`: the paper's Figures 2b and 2c for any two models.

Prompts whose first draw of n responses mostly failed are answered again without their interference tokens, and, as a
control, a second time as they are: what was chosen for failing fails less often the next time, whatever is deleted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from lens_megatron.data.tokenizer import load_tokenizer, special_ids
from lens_megatron.errors import RunError
from lens_megatron.evaluation.answer_file import AnswerFile
from lens_megatron.evaluation.config import GenerationConfig
from lens_megatron.evaluation.kept_answers import Answering, Answers, answers_to
from lens_megatron.evaluation.models import find_models
from lens_megatron.evaluation.sets import Question
from lens_megatron.evaluation.statistics import Interval, bootstrap_interval
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.model_spec import find_weights, load_model_config, named_template
from lens_megatron.precision import torch_dtype
from lens_megatron.purification.config import PurificationConfig, Strategy
from lens_megatron.purification.scores import from_optional
from lens_megatron.purification.strategies import Signals, purify
from lens_megatron.reporting.figures import BINS_A_DECADE, score_histogram
from lens_megatron.rollout.engine import derive_seed
from lens_megatron.scoring import ScoreConfig, ScoreResult, score_prompts
from lens_megatron.types import Prompt, PurifiedPrompt

SUCCESS = 0.5  # least score of a success, as in training
GAMMAS = (0.01, 0.02, 0.03, 0.04, 0.05)
Purified = dict[tuple[Strategy, float], dict[str, PurifiedPrompt]]  # x' by strategy and gamma, and by prompt


@dataclass(frozen=True)
class InterferenceConfig(GenerationConfig):
    """The keys that `analyze interference` takes as key.path=value.

    samples        responses a prompt and draw: the 8 of Average@8.
    failed_below   prompts with a lower success rate in the first draw have failed (tau of the paper).
    limit          only the first so many prompts of the data.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    strategies: list[Strategy] = field(default_factory=lambda: ["interference", "random", "gradient"])
    gammas: list[float] = field(default_factory=lambda: list(GAMMAS))
    samples: int = 8
    failed_below: float = 0.5
    limit: int | None = None
    purification: PurificationConfig = field(default_factory=PurificationConfig)  # scope, ties, noise floor
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokens_per_microbatch: int = 16384
    timeout_s: float = 600.0
    level: float = 0.95  # of the intervals

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or not 0 < self.failed_below <= 1 or not 0 < self.level < 1:
            raise ValueError("samples is at least 1, failed_below above 0 and at most 1, level between 0 and 1")
        if "resample" in self.strategies:
            raise ValueError("strategies: resampling is the control, and always there")
        if not self.strategies or not self.gammas or not all(0 < gamma < 1 for gamma in self.gammas):
            raise ValueError("strategies and gammas name at least one each; gammas lie between 0 and 1")


@dataclass(frozen=True)
class Condition:
    """One strategy and gamma, over the failed prompts that it deletes something from. Rates are shares of successes."""

    strategy: Strategy
    gamma: float
    prompts: int
    deleted: float | None = None  # tokens a prompt
    before: float | None = None  # the draw that the prompts were chosen by: too low by that choice
    resampled: float | None = None  # the control: another draw of the same prompts, nothing deleted
    after: float | None = None
    gain: float | None = None  # after - resampled
    gain_interval: Interval | None = None
    improved: float | None = None  # share of prompts with more successes than before
    improved_by_resampling: float | None = None


@dataclass(frozen=True)
class Interference:
    prompts: int
    success: float  # of the first draw, all prompts
    failed: int
    before: float | None  # of the failed, in the first draw
    resampled: float | None
    conditions: list[Condition]
    scores: list[float]  # of every scored token
    deleted_scores: list[float]  # of those that the largest gamma deletes by interference
    noise_floor: float


@dataclass(frozen=True)
class Scored:
    """What the sharded models said, before anything is generated."""

    result: ScoreResult
    gradient_norms: list[torch.Tensor] | None


def score_all(model: str, reference: str, prompts: Sequence[Prompt], config: InterferenceConfig) -> Scored:
    """Every process of the layout calls this."""
    from lens_megatron.mcore import runtime

    scoring = ScoreConfig(
        config.parallel, config.purification, config.precision, config.tokens_per_microbatch, config.timeout_s
    )
    result = score_prompts(model, reference, prompts, scoring)
    norms = None
    if "gradient" in config.strategies:
        from lens_megatron.mcore.embedding_gradients import embedding_gradient_norms
        from lens_megatron.mcore.settings import OptimizerConfig
        from lens_megatron.mcore.step import build_trainable

        spec = load_model_config(model).spec
        dtype = torch_dtype(config.precision)
        policy = build_trainable(spec, config.parallel, find_weights(model), OptimizerConfig(), steps=1, dtype=dtype)
        sequences = [torch.tensor(prompt.tokens) for prompt in prompts]
        norms = embedding_gradient_norms(policy, sequences, config.tokens_per_microbatch)
        del policy
    runtime.shutdown()
    return Scored(result, norms)


def measure(
    model: str, prompts: Sequence[Prompt], scored: Scored, config: InterferenceConfig, out: Path
) -> Interference:
    """Generates and compares; one process. Answers are kept in `out`, so that a killed analysis goes on."""
    policy = find_models(model)[0]
    tokenizer = load_tokenizer(str(policy.tokenizer))
    purified = purified_prompts(prompts, scored, config, special_ids(tokenizer))
    how = Answering(policy, tokenizer, config, config.rewards, out / "logs")
    with AnswerFile(out / "answers.jsonl", how.made_by()) as file:

        def draw(wanted: Sequence[Question]) -> Answers:
            title = "first draw" if wanted[0].set == "original" else "purified and resampled"
            return answers_to(wanted, file, how, title)

        return compare(prompts, purified, draw, scored.result, config)


def purified_prompts(
    prompts: Sequence[Prompt], scored: Scored, config: InterferenceConfig, special: frozenset[int]
) -> Purified:
    """x' of every prompt that something is deleted from, for each strategy and gamma."""
    purified: Purified = {}
    for strategy in config.strategies:
        for gamma in config.gammas:
            how = replace(config.purification, strategy=strategy, gamma=gamma)
            found = purified[strategy, gamma] = {}
            for number, prompt in enumerate(prompts):
                signals = Signals(
                    from_optional(scored.result.prompts[number].scores),
                    scored.gradient_norms[number] if scored.gradient_norms is not None else None,
                    scored.result.noise_floor,
                )
                outcome = purify(prompt, how, special, signals, config.seed, 0)
                if outcome.purified_prompt is not None:
                    found[prompt.id] = outcome.purified_prompt
    return purified


Draw = Callable[[Sequence[Question]], Answers]


def compare(
    prompts: Sequence[Prompt], purified: Purified, draw: Draw, scores: ScoreResult, config: InterferenceConfig
) -> Interference:
    """`draw` answers questions. A purified prompt that two conditions share is answered once, for both."""

    def asked(name: str, some: Sequence[Prompt]) -> list[Question]:
        return [
            Question(
                name, prompt, index, derive_seed("interference", config.seed, name, prompt.id, index, prompt.tokens)
            )
            for prompt in some
            for index in range(config.samples)
        ]

    def rates(wanted: Sequence[Question]) -> dict[tuple[str, tuple[int, ...]], float]:
        """Success rate by prompt and the tokens it was rolled out under."""
        answers = draw(wanted)
        right: dict[tuple[str, tuple[int, ...]], float] = {}
        for question in wanted:
            place = question.prompt.id, question.prompt.tokens
            right[place] = right.get(place, 0.0) + (answers[question.key].score >= SUCCESS)
        return {place: count / config.samples for place, count in right.items()}

    first = rates(asked("original", prompts))
    failed = [prompt for prompt in prompts if first[prompt.id, prompt.tokens] < config.failed_below]
    again = [
        replace(prompt, tokens=tokens)
        for prompt in failed
        for tokens in dict.fromkeys(found[prompt.id].tokens for found in purified.values() if prompt.id in found)
    ]
    wanted = asked("again", failed) + asked("purified", again)
    second = rates(wanted) if wanted else {}  # a purified prompt has other tokens than its original
    conditions = [
        _condition(strategy, gamma, failed, found, first, second, config)
        for (strategy, gamma), found in purified.items()
    ]
    return Interference(
        prompts=len(prompts),
        success=_mean(list(first.values())) or 0.0,
        failed=len(failed),
        before=_mean([first[prompt.id, prompt.tokens] for prompt in failed]),
        resampled=_mean([second[prompt.id, prompt.tokens] for prompt in failed]),
        conditions=conditions,
        scores=[score for prompt in scores.prompts for score in prompt.scores if score is not None],
        deleted_scores=_deleted_scores(prompts, purified, scores),
        noise_floor=scores.noise_floor,
    )


def tree_of(found: Interference) -> dict[str, Any]:
    """What `--json` writes: scores as a histogram over logarithmic bins, since a data set has millions of tokens."""
    tree = asdict(found)
    for name in ("scores", "deleted_scores"):
        histogram = score_histogram(tree.pop(name))
        tree[name.removesuffix("s") + "_histogram"] = histogram and {
            "tokens": histogram.tokens,
            "zero_share": histogram.zero_share,
            "bins": [
                {"from": 10.0 ** (place / BINS_A_DECADE), "to": 10.0 ** ((place + 1) / BINS_A_DECADE), "share": share}
                for place, share in histogram.shares.items()
            ],
        }
    return tree


def _condition(
    strategy: Strategy,
    gamma: float,
    failed: Sequence[Prompt],
    purified: Mapping[str, PurifiedPrompt],
    first: Mapping[tuple[str, tuple[int, ...]], float],
    second: Mapping[tuple[str, tuple[int, ...]], float],
    config: InterferenceConfig,
) -> Condition:
    chosen = [prompt for prompt in failed if prompt.id in purified]
    if not chosen:
        return Condition(strategy, gamma, 0)
    before = [first[prompt.id, prompt.tokens] for prompt in chosen]
    resampled = [second[prompt.id, prompt.tokens] for prompt in chosen]
    after = [second[prompt.id, purified[prompt.id].tokens] for prompt in chosen]
    gains = [a - b for a, b in zip(after, resampled, strict=True)]
    return Condition(
        strategy,
        gamma,
        len(chosen),
        deleted=_mean([len(purified[prompt.id].deleted) for prompt in chosen]),
        before=_mean(before),
        resampled=_mean(resampled),
        after=_mean(after),
        gain=_mean(gains),
        gain_interval=bootstrap_interval([[gain] for gain in gains], config.seed, config.level),
        improved=_mean([float(a > b) for a, b in zip(after, before, strict=True)]),
        improved_by_resampling=_mean([float(a > b) for a, b in zip(resampled, before, strict=True)]),
    )


def _deleted_scores(prompts: Sequence[Prompt], purified: Purified, scores: ScoreResult) -> list[float]:
    gammas = [gamma for strategy, gamma in purified if strategy == "interference"]
    found = purified["interference", max(gammas)] if gammas else {}
    gone = [(one.scores, found[p.id].deleted) for p, one in zip(prompts, scores.prompts, strict=True) if p.id in found]
    return [score for known, places in gone for place in places if (score := known[place]) is not None]


def load_analysis_prompts(model: str, data: str, config: InterferenceConfig) -> list[Prompt]:
    """Rows with answers, through the model's template."""
    from lens_megatron.data.prompts import encode_prompts
    from lens_megatron.data.rows import read_rows
    from lens_megatron.data.template import Template
    from lens_megatron.data.tokenizer import check_tokenizer

    shape = load_model_config(model)
    tokenizer = load_tokenizer(str(find_weights(model)))
    check_tokenizer(tokenizer, shape.spec.vocab_size)
    template = Template(tokenizer, named_template(config.template, shape.template))
    return encode_prompts(read_rows(data)[: config.limit], template)


def _mean(values: Sequence[float]) -> float | None:
    if any(math.isnan(value) for value in values):
        raise RunError("a success rate is not a number")
    return math.fsum(values) / len(values) if values else None
