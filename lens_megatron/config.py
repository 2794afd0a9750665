"""RUN.yaml as one typed tree. Unknown keys raise; a preset's values stand under the run's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from lens_megatron import presets, strict
from lens_megatron.algorithms.algorithm import AlgorithmConfig
from lens_megatron.algorithms.outcomes import is_success
from lens_megatron.checkpoints import CheckpointConfig
from lens_megatron.data.config import DataConfig, SupervisedDataConfig
from lens_megatron.errors import UsageError
from lens_megatron.evaluation.config import EvaluationConfig
from lens_megatron.guards.config import GuardConfig, ModelGuardConfig
from lens_megatron.mcore.layout import ParallelConfig, check_budget
from lens_megatron.mcore.settings import MemoryConfig, OptimizerConfig
from lens_megatron.precision import Precision
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rollout.sampling import SamplingConfig
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.tracking import TrackingConfig
from lens_megatron.update_config import DiagnosticsConfig, UpdateConfig


@dataclass(frozen=True)
class RolloutConfig(SamplingConfig):
    """`rollout:`; what is sampled is SamplingConfig's, what samples it is here."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    engine: Literal["embedded", "sglang"] = "embedded"
    slots: int = 128  # rollouts that the embedded engine runs at once
    threads: int = 1  # of the embedded engine, on CPU
    servers: int = 1  # of SGLang, to be started
    server: ServerConfig = field(default_factory=ServerConfig)  # of SGLang
    staleness: Literal[0, 1] = 0  # 1: the next step's rollouts are made, with older weights, while this step trains
    sync: SyncConfig = field(default_factory=SyncConfig)


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    model: str  # a name in model_configs/, an HF folder or a hub id in the local cache
    run_dir: str
    data: DataConfig
    algorithm: AlgorithmConfig
    name: str = ""  # in reports; default: the preset's
    steps: int = 300
    seed: int = 0
    reference: str | None = None  # default: the initial policy
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    precision: Precision = "auto"
    update: UpdateConfig = field(default_factory=UpdateConfig)
    placement: Literal["disaggregated", "colocated"] = "disaggregated"  # SGLang on GPUs of its own, or on the trainer's
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    timeout_s: float = 600.0  # of collectives, and of waiting for a rank that shows no sign of life

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is at least 1 (got {self.steps})")
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        check_budget("update.tokens_per_microbatch", self.update.tokens_per_microbatch, longest, self.parallel)
        _refuse_sampling(self)
        _refuse_engines(self)
        _refuse_staleness(self)
        _refuse_old_logprobs(self)
        _refuse_rewards(self)


def _refuse_sampling(run: RunConfig) -> None:
    if run.rollout.temperature == 0:
        raise ValueError("rollout.temperature 0 leaves no log-probs to train on: set it above 0")
    algorithm = run.algorithm
    if run.rollout.n == 1 and algorithm.advantage.learns_from == "spread" and algorithm.rescue.replacement != "union":
        raise ValueError(
            "rollout.n 1 teaches nothing: one reward does not differ from its group's mean. Set it to 2 or more"
        )
    overlong = algorithm.advantage.overlong
    if overlong is not None and overlong.buffer_tokens >= run.rollout.max_response_tokens:
        raise ValueError(
            f"algorithm.advantage.overlong.buffer_tokens {overlong.buffer_tokens} punishes every length: "
            f"rollout.max_response_tokens is {run.rollout.max_response_tokens}. Set it to a fifth of that, as DAPO "
            "(4096 of 20480), or overlong: null"
        )


def _refuse_engines(run: RunConfig) -> None:
    if run.rollout.servers < 1:
        raise ValueError(f"rollout.servers is at least 1 (got {run.rollout.servers})")
    if run.rollout.sync.transport == "distributed" and run.placement == "colocated":
        raise ValueError(
            "rollout.sync.transport distributed needs servers on GPUs of their own: leave it out with placement colocated"
        )
    if run.rollout.routing_replay and run.rollout.engine != "sglang":
        raise ValueError(
            "rollout.routing_replay needs rollout.engine sglang: the embedded engine does not tell which experts it took"
        )


def _refuse_staleness(run: RunConfig) -> None:
    if not run.rollout.staleness:
        return
    if run.placement == "colocated":
        raise ValueError("rollout.staleness 1 generates while it trains, which placement colocated cannot: set it to 0")
    if run.rollout.engine != "sglang" and run.rollout.sync.in_flight != "wait":
        raise ValueError(
            f"rollout.sync.in_flight {run.rollout.sync.in_flight} needs rollout.engine sglang: the embedded engine gets "
            "no weights while it generates; leave it at wait"
        )
    if run.algorithm.loss.engine_correction.mode == "none" and run.update.old_logprobs != "engine":
        raise ValueError(
            "rollout.staleness 1 trains on rollouts of older weights: correct for it with "
            "algorithm.loss.engine_correction.mode: truncate, or update.old_logprobs: engine"
        )
    if run.guards.on_logprob_diff == "drop_sequences" and run.guards.logprob_diff is None:
        raise ValueError(
            "guards.on_logprob_diff drop_sequences has no bound with rollout.staleness 1, where log-probs differ by what "
            "was learnt since: set guards.logprob_diff"
        )


def _refuse_old_logprobs(run: RunConfig) -> None:
    if run.update.old_logprobs != "engine":
        return
    ratio = run.algorithm.loss.purified.kind
    if ratio in ("none", "mixture") and run.algorithm.rescue.strategy != "resample":
        raise ValueError(
            f"update.old_logprobs: engine is of the prompt that was rolled out, and loss.purified_ratio {ratio} "
            "asks for a purified rollout's under the original one: leave old_logprobs at megatron, with "
            "algorithm.loss.engine_correction.mode: truncate where a mismatch is to be corrected"
        )
    if run.algorithm.loss.engine_correction.mode != "none":
        raise ValueError(
            "update.old_logprobs: engine leaves loss.engine_correction nothing to correct: set one of them off"
        )
    if run.guards.leaves_out:
        raise ValueError(
            f"guards.on_logprob_diff {run.guards.on_logprob_diff} leaves out what trainer and engine disagree on, and "
            "with update.old_logprobs: engine there is nothing to compare: set on_logprob_diff: report, or old_logprobs: "
            "megatron"
        )


def _refuse_rewards(run: RunConfig) -> None:
    """A success has the right answer: what a form alone earns must not make one."""
    threshold = run.algorithm.rescue.success_threshold
    weights = [rule.format.weight for rule in run.rewards.rules if rule.format is not None]
    if any(is_success(weight, threshold) for weight in weights):
        raise ValueError(
            f"rewards: a format weight of {max(weights):g} makes a success of a wrong answer in the right form: it reaches "
            f"algorithm.rescue.success_threshold {threshold:g}. Set it below"
        )


@dataclass(frozen=True)
class SftConfig:
    """Supervised training: rows of prompt and response."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    model: str
    run_dir: str
    data: SupervisedDataConfig
    steps: int = 300
    seed: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    precision: Precision = "auto"
    tokens_per_microbatch: int = 16384
    prompt_loss_weight: float = 0.0  # of prompt tokens beside the response's 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    guards: ModelGuardConfig = field(default_factory=ModelGuardConfig)
    timeout_s: float = 600.0


def load_run(path: Path, overrides: Sequence[str]) -> RunConfig:
    tree = strict.apply_overrides(strict.read_yaml(path), overrides)
    where = str(path)
    choice = tree.get("algorithm")
    if choice is None:
        raise UsageError(f"{where}: algorithm is missing: a preset ({', '.join(presets.preset_names())}) or its values")
    algorithm = presets.load_algorithm(choice, f"{where}: algorithm")
    values = presets.preset_run_values(choice, f"{where}: algorithm")
    tree = strict.merge(values, {**tree, "algorithm": strict.to_tree(AlgorithmConfig, algorithm)})
    if not tree.get("name"):
        tree["name"] = choice if isinstance(choice, str) else str(choice.get("preset", "custom"))
    return strict.build(RunConfig, tree, where)


def preset_line(path: Path, overrides: Sequence[str]) -> str:
    """What the preset sets of the run because RUN.yaml says nothing of it, for people; empty: nothing."""
    tree = strict.apply_overrides(strict.read_yaml(path), overrides)
    choice = tree.get("algorithm")
    name = choice.get("preset") if isinstance(choice, Mapping) else choice
    if choice is None or name is None:
        return ""
    left = list(_left_to(presets.preset_run_values(choice, f"{path}: algorithm"), tree))
    return f"from preset {name}: {', '.join(left)}" if left else ""


def _left_to(preset: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key.path=value` of the preset's values that `given` has no place for."""
    for key, value in preset.items():
        own = given.get(key, {})
        if isinstance(value, Mapping) and isinstance(own, Mapping):
            yield from _left_to(value, own, f"{prefix}{key}.")
        elif key not in given:
            yield f"{prefix}{key}={value}"


def load_sft(path: Path, overrides: Sequence[str]) -> SftConfig:
    return strict.build(SftConfig, strict.apply_overrides(strict.read_yaml(path), overrides), str(path))
