"""A plan: one run on so many GPUs, with its memory by part, its seconds by phase, and what limits both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lens_megatron.mcore.layout import ParallelConfig, check_layout
from lens_megatron.mcore.settings import Recompute
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.activations import CUDA, Kernels
from lens_megatron.planning.generation import Generation, generate
from lens_megatron.planning.gpus import Gpu, Rates
from lens_megatron.planning.memory import OTHER_BYTES, ROOM, EngineBytes, TrainerBytes, trainer_bytes
from lens_megatron.planning.parameters import count_parameters
from lens_megatron.planning.step_time import (
    PassTimes,
    microbatch_count,
    verify_seconds,
)
from lens_megatron.planning.syncs import AUTOMATIC, Sync, SyncWay, sync_seconds
from lens_megatron.planning.work import Workload, kv_bytes_a_token, training_flops

Placement = Literal["colocated", "disaggregated", "embedded"]
PHASES = ("score", "generate", "verify", "logprobs", "train", "sync")
_MOST_ROWS = 256  # that a server runs at once, whatever its memory holds (SGLang's own limit is a setting like it)


@dataclass(frozen=True)
class Setup:
    """Everything that a plan is computed from."""

    spec: ModelSpec
    gpu: Gpu
    rates: Rates
    work: Workload
    layout: ParallelConfig
    trainer_gpus: int
    placement: Placement
    engine_gpus: int  # disaggregated: others; colocated: the same ones; embedded: the one of rank 0
    engine_tp: int
    recompute: Recompute = "none"
    offload_reference: bool = True
    offload_optimizer: float = 0.0  # share of Adam's moments on the host
    slots: int = _MOST_ROWS
    kernels: Kernels = CUDA
    sync: Sync = AUTOMATIC

    @property
    def gpus(self) -> int:
        return self.trainer_gpus + (self.engine_gpus if self.placement == "disaggregated" else 0)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpu.a_node)

    @property
    def sync_way(self) -> SyncWay:
        """On one node a run shares memory with the servers that it starts itself. Colocated ones on several nodes are those of
        a Slurm job, which get files."""
        if self.placement == "embedded":
            return "host memory"
        return self.sync.way(self.placement == "colocated", self.nodes)

    @property
    def dp(self) -> int:
        return self.trainer_gpus // self.layout.model_ranks


@dataclass(frozen=True)
class Plan:
    setup: Setup
    trainer: TrainerBytes
    engine: EngineBytes
    generation: Generation
    seconds: Mapping[str, float]  # by phase; verify counts what generation does not hide
    train_parts: Mapping[str, float]
    complaint: str  # why it cannot run; empty when it fits

    @property
    def fits(self) -> bool:
        return not self.complaint

    @property
    def step_seconds(self) -> float:
        generated = self.seconds["generate"] + self.seconds["verify"]
        rest = sum(self.seconds.values()) - generated
        overlaps = self.setup.work.staleness > 0 and self.setup.placement == "disaggregated"
        return max(generated, rest) if overlaps else generated + rest

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.setup.work.trained_tokens / self.step_seconds / self.setup.gpus

    @property
    def mfu(self) -> float:
        """Of the training phase, on the trainer's GPUs, against the peak of the data sheet."""
        work = self.setup.work
        mean = work.prompt_tokens + work.response_tokens
        flops = training_flops(self.setup.spec, work.trained_tokens * work.epochs, mean)
        return flops / self.seconds["train"] / self.setup.trainer_gpus / self.setup.gpu.matmul

    @property
    def limits_time(self) -> str:
        phase = max(self.seconds, key=lambda name: self.seconds[name])
        why = ""
        if phase == "generate":
            why = self.generation.limit
        if phase == "train":
            why = max(self.train_parts, key=lambda name: self.train_parts[name])
        share = self.seconds[phase] / self.step_seconds
        return f"{phase} {share:.0%}" + (f" ({why})" if why else "")

    @property
    def limits_memory(self) -> str:
        parts = self.trainer.parts()
        largest = max(parts, key=lambda name: parts[name])
        used = self.trainer.peak / self.setup.gpu.memory
        return f"{largest} ({parts[largest] / self.trainer.peak:.0%} of the trainer's {used:.0%} of the card)"


def make_plan(setup: Setup) -> Plan:
    """Raises UsageError for a layout that cannot be."""
    spec, work, layout = setup.spec, setup.work, setup.layout
    check_layout(spec, layout, setup.trainer_gpus)
    count = microbatch_count(
        layout, setup.trainer_gpus, work.trained_tokens / work.minibatches, work.tokens_per_microbatch
    )
    engine = _engine_bytes(setup)
    trainer = trainer_bytes(
        spec,
        layout,
        setup.trainer_gpus,
        kernels=setup.kernels,
        recompute=setup.recompute,
        tokens_per_microbatch=work.tokens_per_microbatch,
        longest=work.longest,
        microbatches=count,
        reference=work.scores_prompts or work.scores_responses,
        offload_reference=setup.offload_reference,
        offload_optimizer=setup.offload_optimizer,
        engine=engine.total if setup.placement == "embedded" else 0,
    )
    slots = _slots(setup, engine)
    generation = generate(spec, setup.rates, work, max(1, setup.engine_gpus // setup.engine_tp), setup.engine_tp, slots)
    seconds, parts = _seconds(setup, trainer, generation)
    return Plan(
        setup,
        trainer,
        engine,
        generation,
        seconds,
        parts,
        _complaint(setup, trainer, engine),
    )


def _engine_bytes(setup: Setup) -> EngineBytes:
    weights = 2 * count_parameters(setup.spec) // setup.engine_tp
    a_token = kv_bytes_a_token(setup.spec, setup.engine_tp)
    if setup.placement == "embedded":  # its cache grows with what runs: as if all slots held the longest response
        rows = min(setup.slots, setup.work.rollouts + setup.work.purified_rollouts)
        return EngineBytes(weights, int(rows * setup.work.longest * a_token))
    room = int(ROOM * setup.gpu.memory) - OTHER_BYTES - weights
    servers = setup.engine_gpus // setup.engine_tp
    wanted = (setup.work.rollouts + setup.work.purified_rollouts) / max(1, servers) * setup.work.longest * a_token
    return EngineBytes(weights, max(0, min(room, int(wanted))))


def _slots(setup: Setup, engine: EngineBytes) -> float:
    """Responses of mean length that the cache holds."""
    mean = setup.work.prompt_tokens + setup.work.response_tokens
    held = engine.kv_cache / (mean * kv_bytes_a_token(setup.spec, setup.engine_tp))
    return max(1.0, min(setup.slots, held))


def _complaint(setup: Setup, trainer: TrainerBytes, engine: EngineBytes) -> str:
    room = int(ROOM * setup.gpu.memory)
    gib = 1024**3
    if trainer.peak > room:
        parts = trainer.parts()
        largest = max(parts, key=lambda name: parts[name])
        return (
            f"out of memory: a trainer GPU of stage {trainer.stage} needs {trainer.peak / gib:.1f} GiB at the "
            f"{trainer.fullest_moment}, {setup.gpu.name} gives {room / gib:.1f}; largest: {largest} "
            f"{parts[largest] / gib:.1f} GiB"
        )
    one_response = setup.work.longest * kv_bytes_a_token(setup.spec, setup.engine_tp)
    if engine.kv_cache < one_response:
        return (
            f"out of memory: an engine GPU holds {engine.weights / gib:.1f} GiB of weights, which leaves no room for the "
            f"cache of one response; more GPUs a server are needed than {setup.engine_tp}"
        )
    if setup.work.tokens_per_microbatch < setup.work.longest:
        return (
            f"update.tokens_per_microbatch {setup.work.tokens_per_microbatch} holds no sequence of "
            f"{setup.work.longest} tokens: set at least that"
        )
    return ""


def _seconds(setup: Setup, trainer: TrainerBytes, generation: Generation) -> tuple[dict[str, float], dict[str, float]]:
    work = setup.work
    passes = PassTimes(setup.spec, setup.layout, setup.trainer_gpus, setup.gpu, setup.rates, setup.kernels, work)
    moves = passes.reference_moves() if setup.offload_reference else 0.0
    score = logprobs = 0.0
    if work.scores_prompts:
        tokens = work.prompts * work.batches * work.prompt_tokens
        score = 2 * passes.forward_seconds(tokens, work.prompt_tokens) + moves
    samples = work.trained_tokens
    if work.scores_old:
        logprobs += passes.forward_seconds(samples)
    if work.scores_responses:
        logprobs += passes.forward_seconds(samples) + moves
    training = passes.training(setup.recompute, setup.offload_optimizer)
    train = training.seconds + (work.epochs * passes.forward_seconds(samples) if work.scores_entropies else 0.0)
    sync = sync_seconds(setup.spec, setup.layout, setup.rates, setup.nodes, setup.sync_way)
    if setup.placement == "colocated":  # weights and optimizer leave for the host while the engine runs, and come back
        sync += 2 * (trainer.weights + trainer.optimizer) / setup.rates.host
    verify = max(0.0, verify_seconds(work) - 0.8 * generation.seconds)
    seconds = {
        "score": score, "generate": generation.seconds, "verify": verify, "logprobs": logprobs, "train": train, "sync": sync,
    }  # fmt: skip
    return seconds, training.parts


def as_tree(plan: Plan) -> dict[str, Any]:
    """For --json and tables."""
    setup = plan.setup
    layout = setup.layout
    return {
        "gpus": setup.gpus,
        "gpu": setup.gpu.name,
        "placement": setup.placement,
        "trainer_gpus": setup.trainer_gpus,
        "engine": {"gpus": setup.engine_gpus, "tp": setup.engine_tp},
        "parallel": {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "ep": layout.ep,
                     "etp": layout.expert_tp, "dp": setup.dp, "ends_count_as_layers": layout.ends_count_as_layers},
        "recompute": setup.recompute,
        "offload_optimizer": setup.offload_optimizer,
        "fits": plan.fits,
        "complaint": plan.complaint or None,
        "memory": {
            "card": setup.gpu.memory,
            "peak": plan.trainer.peak,
            "fullest_moment": plan.trainer.fullest_moment,
            "stage": plan.trainer.stage,
            "parts": plan.trainer.parts(),
            "moments": plan.trainer.moments,
            "engine_gpu": {"weights": plan.engine.weights, "kv_cache": plan.engine.kv_cache, "other": OTHER_BYTES},
        },
        "seconds": dict(plan.seconds),
        "train_parts": dict(plan.train_parts),
        "step_seconds": plan.step_seconds,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "mfu": plan.mfu,
        "limits": {"time": plan.limits_time, "memory": plan.limits_memory},
        "measured_rates": list(setup.rates.measured),
    }  # fmt: skip
