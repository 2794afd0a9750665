"""What is evaluated and how answers are sampled: the `evaluation` section of a run, and the keys of `eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lens_megatron.precision import Precision
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rollout.sglang_config import ServerConfig

PAPER_TOKENS = 4096


@dataclass(frozen=True)
class BenchmarkConfig:
    """The paper's choices are the defaults.

    benchmarks   names (math500, ..., or all), and .jsonl or .parquet files of data rows, held out from training.
    data         folder with the benchmarks' NAME.jsonl; null: the Hugging Face hub, or its cache.
    samples      k of every one; null: 16 for AMC23 and the AIMEs, 1 for the others and for files.
    limit        only the first so many problems of each: for a trial, the figures are not the benchmark's.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    benchmarks: list[str] = field(default_factory=list)
    data: str | None = None
    samples: int | None = None
    limit: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("samples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1 (got {value})")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature is at least 0, and top_p above 0 and at most 1")


@dataclass(frozen=True)
class EvaluationConfig(BenchmarkConfig):
    """`evaluation:` of RUN.yaml, by the run's own engine. Nothing is evaluated unless `benchmarks` names something.

    every   steps between evaluations; before the first step and after the last one always. 0: only these two.
    """

    every: int = 20
    max_response_tokens: int | None = None  # null: rollout.max_response_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 0:
            raise ValueError(f"every is at least 0 (got {self.every})")
        if self.max_response_tokens is not None and self.max_response_tokens < 1:
            raise ValueError(f"max_response_tokens is at least 1 (got {self.max_response_tokens})")

    def due(self, step: int, last: int) -> bool:
        return bool(self.benchmarks) and (step in (0, last) or (self.every > 0 and step % self.every == 0))


@dataclass(frozen=True)
class GenerationConfig:
    """What answers outside of a run: the engine and its limits.

    engine        embedded (the HF model in this process), sglang (servers started for it), or the address of a
                  running SGLang server.
    servers       how many are started, each as `server` says; or server.urls names running ones.
    slots         responses that the embedded engine works on at once.
    threads       of the embedded engine on CPU.
    template      chat, a text with {problem}, or the name of a shipped model; null: the model's own (a run's: the run's).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    engine: str = "embedded"
    servers: int = 1
    server: ServerConfig = field(default_factory=ServerConfig)
    slots: int = 128
    threads: int = 1
    precision: Precision = "auto"  # of engines that are started here
    template: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int = PAPER_TOKENS
    stall_seconds: float = 600.0  # without a token or a judgement, then the evaluation ends with a message
    seed: int = 0
    # of files (of a run: the run's, unless any is given); benchmarks have rules of their own
    rewards: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        if self.engine not in ("embedded", "sglang") and not self.engine.startswith(("http://", "https://")):
            raise ValueError(f"engine is embedded, sglang or http://HOST:PORT of a server (got {self.engine!r})")
        for name in ("servers", "slots", "threads", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1 (got {getattr(self, name)})")
        if self.stall_seconds <= 0:
            raise ValueError("stall_seconds is above 0")


@dataclass(frozen=True)
class EvalConfig(GenerationConfig, BenchmarkConfig):
    """The keys that `eval` takes as key.path=value."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    level: float = 0.95  # of the bootstrap intervals

    def __post_init__(self) -> None:
        BenchmarkConfig.__post_init__(self)
        GenerationConfig.__post_init__(self)
        if not 0 < self.level < 1:
            raise ValueError(f"level is between 0 and 1 (got {self.level})")
