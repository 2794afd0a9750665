"""The best layouts of a model on so many GPUs: every allowed one is planned; those that fit are ranked by step time, but for
the first, which is the simplest of those as good as the fastest."""

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
from lens_megatron.planning.syncs import AUTOMATIC, Sync
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
    sync: Sync = AUTOMATIC,
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
                    spec,
                    gpu,
                    rates,
                    work,
                    layout,
                    trainer_gpus,
                    placement,
                    engine_gpus,
                    engine_tp,
                    kernels=kernels,
                    sync=sync,
                )
                tried += 1
                plan = _least_recomputed(setup)
                if plan.fits:
                    fitting.append(plan)
                elif nearest is None or plan.trainer.peak < nearest.trainer.peak:
                    nearest = plan
    return Found(list(_ranked(fitting))[:most], tried, None if fitting else nearest)


def _ranked(plans: Sequence[Plan]) -> Iterator[Plan]:
    """The simplest of those that are as good as equal to the fastest, then all others from the fastest on."""
    by_time = sorted(plans, key=lambda plan: plan.step_seconds)
    if by_time:
        alike = [plan for plan in by_time if plan.step_seconds <= (1 + ALIKE) * by_time[0].step_seconds]
        simplest = min(alike, key=_complexity)  # the fastest of several
        by_time.remove(simplest)
        by_time.insert(0, simplest)
    yield from by_time


def _complexity(plan: Plan) -> tuple[int, ...]:
    """Experts beyond a node wait for the network in every layer; stages have to be filled and balanced; sequences cut in parts,
    and experts cut by tensor parallelism, make small kernels. Tensor parallelism and experts spread over a node are what
    everybody runs."""
    layout, moe = plan.setup.layout, plan.setup.spec.moe is not None
    experts_cut = layout.expert_tp if moe else 1
    beyond_a_node = layout.ep * experts_cut > plan.setup.gpu.a_node
    apart = plan.setup.placement != "colocated"
    return beyond_a_node, layout.pp, layout.cp, experts_cut, layout.tp, layout.ep, apart


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
                        break  # where both ways divide, a plan cannot tell them apart
