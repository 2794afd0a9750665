"""Answers -> the figures of a table's row, with their errors. Numbers only; tables.py and page.py show them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lens_megatron.errors import RunError
from lens_megatron.evaluation.answering import Answer
from lens_megatron.evaluation.sets import EvalSet, fingerprint
from lens_megatron.evaluation.statistics import (
    Interval,
    average_at_k,
    bootstrap_interval,
    mean_pass_at_k,
    plain_mean,
    plain_mean_error,
    sampling_error,
    standard_error,
)

Key = tuple[str, str, int, str]
_INTERVAL_SEED = 0


@dataclass(frozen=True)
class SetResult:
    """One benchmark. Shares are 0 to 1; null where one sample or one problem does not tell."""

    name: str
    title: str
    samples: int
    problems: int
    size: int  # problems in the whole benchmark
    average: float  # share of samples that are right: Average@k; Pass@1 for one sample
    standard_error: float | None  # another draw of problems
    sampling_error: float | None  # the same problems, answered again
    interval: Interval  # bootstrap over problems
    pass_at: dict[int, float]  # unbiased pass@k
    reward: float  # mean; more than the average where there is partial credit
    response_tokens: float
    truncated: float  # share that reached the limit of tokens
    verdicts: dict[str, int]

    @property
    def measure(self) -> str:
        return "Pass@1" if self.samples == 1 else f"Average@{self.samples}"

    @property
    def whole(self) -> bool:
        return self.problems == self.size

    @property
    def graded(self) -> bool:
        """Whether its mean reward says something that its average does not."""
        return not math.isclose(self.reward, self.average, abs_tol=1e-9)


@dataclass(frozen=True)
class ModelResult:
    """One row of a table."""

    name: str
    step: int | None
    sets: tuple[SetResult, ...]

    @property
    def average(self) -> float:
        """The plain mean: every benchmark weighs the same."""
        return plain_mean([one.average for one in self.sets])

    @property
    def average_error(self) -> float | None:
        errors = [one.standard_error for one in self.sets if one.standard_error is not None]
        return plain_mean_error(errors) if len(errors) == len(self.sets) else None


def set_result(one: EvalSet, answers: Mapping[Key, Answer], level: float) -> SetResult:
    rows = [[_found(answers, (one.name, p.id, i, fingerprint(p))) for i in range(one.samples)] for p in one.prompts]
    flat = [answer for row in rows for answer in row]
    scores = [[float(answer.right) for answer in row] for row in rows]
    return SetResult(
        name=one.name,
        title=one.title,
        samples=one.samples,
        problems=len(rows),
        size=one.size,
        average=average_at_k(scores),
        standard_error=_known(standard_error(scores)),
        sampling_error=_known(sampling_error(scores)),
        interval=bootstrap_interval(scores, _INTERVAL_SEED, level),
        pass_at={k: mean_pass_at_k(scores, k) for k in _powers_of_two(one.samples)},
        reward=average_at_k([[answer.score for answer in row] for row in rows]),
        response_tokens=math.fsum(answer.tokens for answer in flat) / len(flat),
        truncated=sum(answer.finish == "length" for answer in flat) / len(flat),
        verdicts=dict(sorted(Counter(answer.verdict for answer in flat).items())),
    )


def model_result(
    name: str, step: int | None, sets: Sequence[EvalSet], answers: Mapping[Key, Answer], level: float
) -> ModelResult:
    return ModelResult(name, step, tuple(set_result(one, answers, level) for one in sets))


def results_tree(results: Sequence[ModelResult], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "settings": dict(settings),
        "models": [
            {
                "name": result.name,
                "step": result.step,
                "average": result.average,
                "average_standard_error": result.average_error,
                "benchmarks": {one.name: _set_tree(one) for one in result.sets},
            }
            for result in results
        ],
    }


def step_metrics(sets: Sequence[EvalSet], answers: Iterable[Answer]) -> dict[str, float]:
    """`eval/...` of metrics.jsonl. The average is of several benchmarks; of one it would be the same curve again."""
    by_set: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_set[answer.set].append(answer)
    metrics: dict[str, float] = {}
    errors: list[float] = []
    for one in sets:
        found = by_set[one.name]
        rows: dict[str, list[Answer]] = defaultdict(list)
        for answer in found:
            rows[answer.id].append(answer)
        scores = [[float(answer.right) for answer in row] for row in rows.values()]
        name = f"eval/{one.name}"
        metrics[name] = average_at_k(scores)
        metrics[f"{name}/reward"] = average_at_k([[answer.score for answer in row] for row in rows.values()])
        if (error := _known(standard_error(scores))) is not None:
            metrics[f"{name}/standard_error"] = error
            errors.append(error)
        metrics[f"{name}/response_tokens"] = math.fsum(answer.tokens for answer in found) / len(found)
        metrics[f"{name}/truncated_ratio"] = sum(answer.finish == "length" for answer in found) / len(found)
    if len(sets) > 1:
        metrics["eval/average"] = plain_mean([metrics[f"eval/{one.name}"] for one in sets])
        if len(errors) == len(sets):
            metrics["eval/average/standard_error"] = plain_mean_error(errors)
    return metrics


def metric_names(sets: Sequence[EvalSet]) -> list[str]:
    """That `step_metrics` always gives."""
    names = [f"eval/{one.name}{measure}" for one in sets for measure in ("", "/reward")]
    return names + (["eval/average"] if len(sets) > 1 else [])


def _set_tree(one: SetResult) -> dict[str, Any]:
    tree = asdict(one)
    tree["interval"] = [one.interval.low, one.interval.high]
    tree["pass_at"] = {str(k): value for k, value in one.pass_at.items()}
    return {"measure": one.measure, **tree}


def _found(answers: Mapping[Key, Answer], key: Key) -> Answer:
    if key not in answers:
        raise RunError(f"no answer to {key[0]} {key[1]}, sample {key[2]}: the evaluation is not complete")
    return answers[key]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return sorted({samples, *(2**power for power in range(samples.bit_length()) if 2**power <= samples)})
