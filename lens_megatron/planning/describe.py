"""Plans as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lens_megatron.planning.plans import PHASES, Plan
from lens_megatron.planning.storage import Stored
from lens_megatron.planning.syncs import sync_seconds

_GIB = 1024**3


def layout_words(plan: Plan) -> str:
    layout, setup = plan.setup.layout, plan.setup
    names = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "ep": layout.ep}
    shown = [f"{name} {value}" for name, value in names.items() if value > 1 or name == "tp"]
    if layout.ends_count_as_layers:
        shown.append("ends count as layers")
    return ", ".join([*shown, f"dp {setup.dp}", f"recompute {setup.recompute}"])


def placement_words(plan: Plan) -> str:
    setup = plan.setup
    if setup.placement == "embedded":
        return f"{setup.trainer_gpus} GPUs; embedded engine beside rank 0"
    servers = f"{servers_of(plan)} servers of tp {setup.engine_tp}"
    if setup.placement == "colocated":
        return f"{setup.trainer_gpus} GPUs, colocated: {servers}"
    return f"{setup.trainer_gpus} GPUs train, {setup.engine_gpus} generate: {servers}"


def servers_of(plan: Plan) -> int:
    return plan.setup.engine_gpus // plan.setup.engine_tp


def keys_of(plan: Plan) -> list[str]:
    """What a RUN.yaml says to be run so, as overrides."""
    layout, setup = plan.setup.layout, plan.setup
    sizes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "ep": layout.ep, "dp": setup.dp}
    keys = [f"parallel.{name}={size}" for name, size in sizes.items()]
    keys += [
        f"parallel.ends_count_as_layers={str(layout.ends_count_as_layers).lower()}",
        f"memory.recompute={setup.recompute}",
        f"memory.offload_reference={str(setup.offload_reference).lower()}",
        f"memory.offload_optimizer={setup.offload_optimizer:g}",
    ]
    if setup.placement == "embedded":
        return [*keys, "rollout.engine=embedded"]
    return [
        *keys,
        f"placement={setup.placement}",
        "rollout.engine=sglang",
        f"rollout.servers={servers_of(plan)}",
        f"rollout.server.tp={setup.engine_tp}",
    ]


def _sync_words(plan: Plan) -> str:
    setup = plan.setup
    if setup.placement == "embedded":
        return ""
    if setup.placement == "colocated" and setup.nodes == 1 and setup.sync.transport == "auto":
        of_way = partial(sync_seconds, setup.spec, setup.layout, setup.rates, 1)
        in_job = plan.seconds["sync"] - of_way(setup.sync_way) + of_way("files")
        return f"  through {setup.sync_way}; as a Slurm job {in_job:.2f}, through files"
    return f"  through {setup.sync_way}" if setup.sync_way != "broadcast" else "  by broadcast"


def plan_lines(plan: Plan) -> list[str]:
    """One plan in full."""
    trainer, gpu = plan.trainer, plan.setup.gpu
    lines = [placement_words(plan), layout_words(plan), ""]
    lines.append(
        f"memory of the fullest trainer GPU (stage {trainer.stage}), GiB, at its fullest moment: {trainer.fullest_moment}"
    )
    for name, size in trainer.parts().items():
        lines.append(f"  {name:<14}{size / _GIB:>9.2f}")
    lines.append(
        f"  {'peak':<14}{trainer.peak / _GIB:>9.2f}  of {gpu.memory / _GIB:.1f} ({trainer.peak / gpu.memory:.0%})"
    )
    if plan.setup.placement != "embedded":
        lines.append("memory of an engine GPU, GiB")
        lines.append(f"  {'weights':<14}{plan.engine.weights / _GIB:>9.2f}")
        lines.append(f"  {'KV cache':<14}{plan.engine.kv_cache / _GIB:>9.2f}")
    lines += ["", "seconds of a step"]
    for phase in PHASES:
        way = _sync_words(plan) if phase == "sync" else ""
        lines.append(f"  {phase:<14}{plan.seconds[phase]:>9.2f}{way}")
    lines.append(f"  {'step':<14}{plan.step_seconds:>9.2f}")
    lines += [
        "",
        f"{plan.tokens_per_second_per_gpu:,.0f} trained tokens/s/GPU; MFU of training {plan.mfu:.0%}",
        f"time is limited by {plan.limits_time}",
        f"memory by {plan.limits_memory}",
    ]
    return lines


def storage_lines(stored: Sequence[Stored]) -> list[str]:
    lines = ["on shared storage, GB, at most at once"]
    lines += [f"  {one.name:<14}{one.bytes / 1e9:>9.2f}  {one.most} of {one.each / 1e9:.2f}" for one in stored]
    return [*lines, f"  {'sum':<14}{sum(one.bytes for one in stored) / 1e9:>9.2f}"] if len(stored) > 1 else lines


def comparison(plans: Sequence[Plan]) -> list[str]:
    """Several plans, one line each, the best first."""
    lines = []
    for place, plan in enumerate(plans, 1):
        peak = f"{plan.trainer.peak / _GIB:.1f} GiB ({plan.trainer.peak / plan.setup.gpu.memory:.0%})"
        lines.append(
            f"{place}. {plan.step_seconds:.0f} s a step, {peak}: {placement_words(plan)}; {layout_words(plan)}; "
            f"limited by {plan.limits_time}"
        )
    return lines
