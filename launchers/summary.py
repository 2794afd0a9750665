"""What a job will be, in a few lines for people: nodes, ranks, servers, and GPUs that would have nothing to do, all the time or
while others generate."""

from __future__ import annotations

from collections.abc import Iterator

from launchers.script import Job
from launchers.shape import JobShape
from launchers.site import SiteConfig
from lens_megatron.config import RunConfig


def summary(job: Job, config: RunConfig) -> Iterator[str]:
    shape, layout = job.shape, config.parallel
    trainer = f", {shape.trainer_nodes} of them for the trainer" if shape.nodes > shape.trainer_nodes else ""
    yield f"nodes    {shape.nodes}{trainer}"
    dp = shape.ranks // layout.model_ranks
    yield f"ranks    {shape.ranks}, {shape.ranks_per_node} a node: tp={layout.tp} pp={layout.pp} cp={layout.cp} dp={dp}"
    yield f"servers  {_servers(shape, config)}"
    yield from _idle(shape, job.site)
    if config.rollout.engine == "embedded" and shape.trainer_nodes > 1:
        yield (
            f"warning: the embedded engine is one HF generate, beside rank 0, for all {shape.trainer_nodes} nodes: "
            "rollout.engine: sglang has servers"
        )


def _servers(shape: JobShape, config: RunConfig) -> str:
    servers = shape.servers
    if servers is None:
        urls = config.rollout.server.urls if config.rollout.engine == "sglang" else []
        return f"{len(urls)}, not of this job: {', '.join(urls)}" if urls else "none: the embedded engine"
    where = f"{servers.nodes_each} nodes each" if servers.nodes_each > 1 else f"{servers.per_node} a node"
    whose = "the trainer's GPUs" if _colocated(shape) else "nodes of their own"
    return f"{servers.count} of {_gpus(servers.gpus)} each, {where}, on {whose}"


def _idle(shape: JobShape, site: SiteConfig) -> Iterator[str]:
    """Of what the job is given: with `exclusive` all GPUs of its nodes, else as many as any node of it needs."""
    if not site.gpus_per_node:
        return
    each = site.gpus_per_node if site.exclusive else shape.gpus_per_node
    given, idle = each * shape.nodes, each * shape.nodes - shape.gpus_in_use
    in_turn = ""
    if _colocated(shape):
        in_turn = f": {shape.ranks} train and {shape.gpus_that_generate} generate, in turn"
        yield from _wait_for_servers(shape)
    if not idle:
        yield f"GPUs     {given}, all in use{in_turn}"
        return
    yield f"GPUs     {given}, {idle} of them idle{in_turn}"
    yield f"warning: {idle} of the {_gpus(given)} that the job is given would be idle: {_remedy(shape, site, each)}"


def _colocated(shape: JobShape) -> bool:
    return shape.servers is not None and shape.servers.first_node == 0


def _wait_for_servers(shape: JobShape) -> Iterator[str]:
    assert shape.servers is not None
    full = shape.ranks // shape.servers.gpus
    if shape.servers.count < full:
        yield (
            f"warning: {shape.gpus_that_generate} of {_gpus(shape.ranks)} generate, the others wait meanwhile: "
            f"set rollout.servers={full}"
        )


def _remedy(shape: JobShape, site: SiteConfig, each: int) -> str:
    servers = shape.servers
    if servers is not None and servers.first_node and servers.nodes_each == 1:
        full = servers.nodes * (min(each, site.slots_per_node) // servers.gpus)
        if servers.count < full:
            return f"rollout.servers={full} would fill their {'node' if servers.nodes == 1 else 'nodes'}"
    if shape.ranks_per_node < site.slots_per_node:
        return "a larger parallel.dp" + (", or site.exclusive=false" if site.exclusive else "")
    return "site.ranks_per_node leaves GPUs of a node without a rank"


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"
