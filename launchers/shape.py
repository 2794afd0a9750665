"""How many nodes a run takes, and what runs on which. Pure; an impossible layout is refused before anything is queued."""

from __future__ import annotations

from dataclasses import dataclass

from launchers.site import SiteConfig
from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import ParallelConfig, check_layout
from lens_megatron.model_spec import ModelSpec


@dataclass(frozen=True)
class Servers:
    """SGLang servers that a run asks for."""

    count: int
    gpus: int  # of one server
    colocated: bool


@dataclass(frozen=True)
class ServerNodes:
    """Servers on their nodes, counted from the job's first node."""

    count: int
    gpus: int
    first_node: int
    nodes: int
    nodes_each: int  # of a server that spans nodes; else 1
    per_node: int  # servers on a node; 1 when one spans several


@dataclass(frozen=True)
class JobShape:
    ranks: int
    ranks_per_node: int
    trainer_nodes: int
    servers: ServerNodes | None = None

    @property
    def nodes(self) -> int:
        return max(self.trainer_nodes, self.servers.first_node + self.servers.nodes if self.servers else 0)

    @property
    def gpus_per_node(self) -> int:
        """Most that any node of the job needs."""
        servers = self.servers
        of_servers = servers.gpus * servers.per_node // servers.nodes_each if servers else 0
        return max(self.ranks_per_node, of_servers)

    @property
    def gpus_in_use(self) -> int:
        """By ranks, servers or both in turn."""
        of_trainer = [self.ranks_per_node * (node < self.trainer_nodes) for node in range(self.nodes)]
        return sum(max(pair) for pair in zip(of_trainer, self._gpus_of_servers(), strict=True))

    @property
    def gpus_that_generate(self) -> int:
        return sum(self._gpus_of_servers())

    def _gpus_of_servers(self) -> list[int]:
        """Of each node."""
        found, servers = [0] * self.nodes, self.servers
        for number in range(servers.count if servers else 0):
            assert servers is not None
            first = servers.first_node + number * servers.nodes_each // servers.per_node
            for node in range(first, first + servers.nodes_each):
                found[node] += servers.gpus // servers.nodes_each
        return found


def job_shape(spec: ModelSpec, layout: ParallelConfig, site: SiteConfig, servers: Servers | None) -> JobShape:
    slots = site.slots_per_node
    ranks = layout.processes if site.nodes is None else site.nodes * slots
    check_layout(spec, layout, ranks)
    if ranks > slots and ranks % slots:
        raise UsageError(
            f"parallel: {ranks} ranks do not fill nodes of {slots}: make tp x pp x cp x dp a multiple of {slots}, "
            "or set ranks_per_node in the site"
        )
    nodes = -(-ranks // slots)
    placed = None if servers is None else _place(servers, site, nodes)
    return JobShape(ranks, min(ranks, slots), nodes, placed)


def _place(servers: Servers, site: SiteConfig, trainer_nodes: int) -> ServerNodes:
    slots = site.slots_per_node
    if servers.gpus > slots and servers.gpus % slots:
        raise UsageError(f"rollout.server: {servers.gpus} GPUs of a server do not fill nodes of {slots}")
    each = -(-servers.gpus // slots)
    if slots % servers.gpus and servers.gpus < slots:
        raise UsageError(
            f"rollout.server: servers of {servers.gpus} GPUs do not fill a node of {slots}: take a divisor of {slots}"
        )
    per_node = max(1, slots // servers.gpus)
    if not servers.colocated:
        per_node = min(per_node, servers.count)
        nodes = each * -(-servers.count // per_node)
        return ServerNodes(servers.count, servers.gpus, trainer_nodes, nodes, each, per_node)
    # colocated servers take turns with the trainer on its own GPUs: all of them, evenly over its nodes
    room = trainer_nodes * slots
    if servers.count * servers.gpus > room:
        raise UsageError(
            f"rollout.servers: {servers.count} servers of {servers.gpus} GPUs do not fit on the trainer's {room}: "
            "lower rollout.servers, or placement: disaggregated"
        )
    per_node = min(per_node, -(-servers.count * each // trainer_nodes))
    return ServerNodes(servers.count, servers.gpus, 0, each * -(-servers.count // per_node), each, per_node)
