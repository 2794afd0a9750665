"""Sets of problems as prompts of a model: the paper's benchmarks, and files of data rows that were held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens_megatron.data.files import FILE_KINDS
from lens_megatron.data.prompts import encode_prompts
from lens_megatron.data.rows import Message, Row, read_rows
from lens_megatron.data.template import Template
from lens_megatron.errors import UsageError
from lens_megatron.evaluation.benchmarks import BENCHMARKS, RULE, Benchmark, load_benchmark, select_benchmarks
from lens_megatron.evaluation.config import BenchmarkConfig
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rollout.engine import derive_seed
from lens_megatron.types import Prompt

_SOURCE = "benchmark/"  # a training set may be called math500 and be judged otherwise


@dataclass(frozen=True)
class EvalSet:
    name: str
    title: str  # in tables
    samples: int  # k
    size: int  # problems in the whole set, of which a limit may have left a part
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Question:
    """One response that is wanted."""

    set: str
    prompt: Prompt
    index: int  # of k
    seed: int

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What makes it the same question as one that was answered earlier."""
        return self.set, self.prompt.id, self.index, fingerprint(self.prompt)


def fingerprint(prompt: Prompt) -> str:
    """Of what is asked and what counts as right."""
    return hashlib.blake2b(repr((prompt.tokens, prompt.answer)).encode(), digest_size=8).hexdigest()


def load_sets(config: BenchmarkConfig, tokenizer: Any, template: str) -> list[EvalSet]:
    """In the order given; `all` stands for the seven. Files are read whole before anything else is done."""
    shown = Template(tokenizer, template)
    sets: list[EvalSet] = []
    for name in config.benchmarks:
        if name.endswith(FILE_KINDS):
            sets.append(_from_file(config, name, shown))
        else:
            sets += [_from_benchmark(config, benchmark, shown) for benchmark in select_benchmarks(name)]
    names = [one.name for one in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"benchmarks: {twice!r} twice; results are told apart by name")
    return sets


def with_benchmark_rules(rewards: RewardConfig) -> RewardConfig:
    """Benchmarks are judged as the table says, whatever rules there are for other sources."""
    return replace(rewards, sources={**{_SOURCE + name: RULE for name in BENCHMARKS}, **rewards.sources})


def questions(sets: Sequence[EvalSet], *seeds: int) -> list[Question]:
    """Every response of every set. `seeds`: of the run, and the step where there is one."""
    return [
        Question(one.name, prompt, index, derive_seed("evaluation", *seeds, one.name, prompt.id, index))
        for one in sets
        for prompt in one.prompts
        for index in range(one.samples)
    ]


def _from_benchmark(config: BenchmarkConfig, benchmark: Benchmark, template: Template) -> EvalSet:
    problems = load_benchmark(benchmark, Path(config.data) if config.data is not None else None)
    source = _SOURCE + benchmark.name
    rows = [
        Row(problem.id, (Message("user", problem.problem),), problem.answer, source, f"{benchmark.name} {problem.id}")
        for problem in problems[: config.limit]
    ]
    samples = config.samples or benchmark.samples
    return EvalSet(benchmark.name, benchmark.title, samples, len(problems), tuple(encode_prompts(rows, template)))


def _from_file(config: BenchmarkConfig, name: str, template: Template) -> EvalSet:
    rows = read_rows(name)
    prompts = encode_prompts(rows[: config.limit], template)
    return EvalSet(Path(name).stem, Path(name).stem, config.samples or 1, len(rows), tuple(prompts))
