"""The best layouts of a model on so many GPUs: every allowed one is planned; those that fit are ranked by step time, and where
that is as good as equal, by how little is split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import ParallelConfig, check_layout
from lens_megatron.mcore.settings import Recompute
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.activations import CUDA, Kernels
from lens_megatron.planning.gpus import ROOM_FOR_ENGINE, Gpu, Rates
from lens_megatron.planning.parameters import count_parameters
from lens_megatron.planning.plans import Placement, Plan, Setup, make_plan
from lens_megatron.planning.work import Workload

_CHEAPEST_FIRST: tuple[Recompute, ...] = (
    "none",
    "light",
    "selective",
    "full",
)  # in time; the first that fits is the best

ALIKE = 0.03  # formulas over assumed rates cannot tell apart step times that differ by less


@dataclass(frozen=True)
class Found:
    best: list[Plan]
    tried: int
    nearest: Plan | None  # when nothing fits: what came closest


def search(
    spec: ModelSpec,
    gpu: Gpu,
    rates: Rates,
    work: Workload,
    gpus: int,
    placements: tuple[Placement, ...] = ("colocated", "disaggregated"),
    most: int = 5,
    kernels: Kernels = CUDA,
) -> Found:
    fitting: list[Plan] = []
    nearest: Plan | None = None
    tried = 0
    for placement in placements:
        for trainer_gpus, engine_gpus in _splits(gpus, placement):
            engine_tp = engine_tp_for(spec, gpu, engine_gpus)
            if engine_tp is None:
                continue
            for layout in _layouts(spec, trainer_gpus, gpu.a_node):
                setup = Setup(
                    spec, gpu, rates, work, layout, trainer_gpus, placement, engine_gpus, engine_tp, kernels=kernels
                )
                tried += 1
                plan = _least_recomputed(setup)
                if plan.fits:
                    fitting.append(plan)
                elif nearest is None or plan.trainer.peak < nearest.trainer.peak:
                    nearest = plan
    return Found(list(_ranked(fitting, most)), tried, None if fitting else nearest)


def _ranked(plans: Sequence[Plan], most: int) -> Iterator[Plan]:
    """Again and again the simplest of those that are as fast as the fastest left."""
    left = sorted(plans, key=lambda plan: plan.step_seconds)
    while left and most:
        alike = [plan for plan in left if plan.step_seconds <= (1 + ALIKE) * left[0].step_seconds]
        simplest = min(alike, key=_complexity)  # the fastest of several
        left.remove(simplest)
        most -= 1
        yield simplest


def _complexity(plan: Plan) -> tuple[int, ...]:
    """Each kind of splitting is one more thing to get wrong, and its messages one more thing that a formula underrates."""
    layout = plan.setup.layout
    return layout.model_ranks * layout.ep, layout.pp, layout.cp, layout.ep, layout.ends_count_as_layers


def _least_recomputed(setup: Setup) -> Plan:
    for recompute in _CHEAPEST_FIRST:
        plan = make_plan(dataclasses.replace(setup, recompute=recompute))
        if plan.fits:
            return plan
    return plan


def _splits(gpus: int, placement: Placement) -> Iterator[tuple[int, int]]:
    """(trainer's, engine's) GPUs."""
    if placement != "disaggregated":
        yield gpus, gpus
        return
    for share in (0.25, 0.5, 0.75):
        trainer = round(gpus * share)
        if trainer * 4 == gpus * share * 4 and 0 < trainer < gpus:
            yield trainer, gpus - trainer


def engine_tp_for(spec: ModelSpec, gpu: Gpu, gpus: int) -> int | None:
    """The smallest server whose weights leave at least half of its memory for keys and values; else the smallest that fits."""
    size = 2 * count_parameters(spec)
    fits = [tp for tp in (1, 2, 4, 8, 16, 32) if gpus % tp == 0 and spec.heads % tp == 0]
    for share in (ROOM_FOR_ENGINE, 0.85):
        for tp in fits:
            if size / tp <= share * gpu.memory:
                return tp
    return None


def _layouts(spec: ModelSpec, world: int, a_node: int) -> Iterator[ParallelConfig]:
    powers = [2**k for k in range(int(math.log2(world)) + 1)]
    experts = [ep for ep in powers if spec.moe is not None and spec.moe.experts % ep == 0] or [1]
    for tp in (tp for tp in powers if tp <= a_node):
        for pp in (pp for pp in powers if pp <= 16 and tp * pp <= world):
            for cp in (cp for cp in (1, 2, 4) if tp * pp * cp <= world):
                for ep in experts:
                    for ends in (False, True) if pp > 1 else (False,):
                        layout = ParallelConfig(tp=tp, pp=pp, cp=cp, ep=ep, ends_count_as_layers=ends)
                        try:
                            check_layout(spec, layout, world)
                        except UsageError:
                            continue
                        yield layout
