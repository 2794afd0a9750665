"""Nodes and what runs on which; layouts that cannot be placed are refused with what would be right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchers.shape import ServerNodes, Servers
from launchers.site import SiteConfig
from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import ParallelConfig
from tests.launchers.jobs import shape

SITE = SiteConfig(gpus_per_node=8)


@pytest.mark.parametrize(
    ("tp", "dp", "nodes", "per_node"), [(1, 1, 1, 1), (4, 2, 1, 8), (4, 1, 1, 4), (8, 2, 2, 8), (8, 64, 64, 8)]
)
def test_trainer_alone(tp: int, dp: int, nodes: int, per_node: int) -> None:
    found = shape(SITE, ParallelConfig(tp=tp, dp=dp))
    assert (found.ranks, found.nodes, found.ranks_per_node) == (tp * dp, nodes, per_node)
    assert found.ranks == found.trainer_nodes * found.ranks_per_node


def test_nodes_of_the_site_leave_dp() -> None:
    assert shape(replace(SITE, nodes=4), ParallelConfig(tp=4)).ranks == 32


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colocated", [True, False])
def test_every_server_has_gpus_of_its_own(count: int, gpus: int, colocated: bool) -> None:
    layout = ParallelConfig(tp=8, dp=4)
    if colocated and count * gpus > 32:
        with pytest.raises(UsageError, match="do not fit on the trainer's 32"):
            shape(SITE, layout, Servers(count, gpus, colocated))
        return
    job = shape(SITE, layout, Servers(count, gpus, colocated))
    servers = job.servers
    assert servers is not None
    taken: set[tuple[int, int]] = set()
    for number in range(count):  # as the supervisor counts: `per_node` to a node, or `nodes_each` nodes to one
        for part in range(gpus):
            if servers.nodes_each > 1:
                node, gpu = number * servers.nodes_each + part // 8, part % 8
            else:
                node, gpu = number // servers.per_node, number % servers.per_node * gpus + part
            assert 0 <= gpu < 8 and node < servers.nodes
            taken.add((servers.first_node + node, gpu))
    assert len(taken) == count * gpus
    assert job.gpus_per_node == 8  # the trainer fills its nodes
    trainer = {(node, gpu) for node in range(4) for gpu in range(8)}
    assert taken <= trainer if colocated else not taken & trainer
    assert job.nodes == max(node for node, _ in taken | trainer) + 1


@pytest.mark.parametrize(
    ("layout", "servers", "message"),
    [
        (ParallelConfig(tp=3), None, "tp=3 does not divide"),
        (ParallelConfig(tp=4, dp=3), None, "12 ranks do not fill nodes of 8"),
        (ParallelConfig(tp=8), Servers(1, 3, False), "servers of 3 GPUs do not fill a node of 8"),
        (ParallelConfig(tp=8), Servers(1, 12, False), "12 GPUs of a server do not fill nodes of 8"),
        (ParallelConfig(tp=8), Servers(3, 4, True), "3 servers of 4 GPUs do not fit on the trainer's 8"),
    ],
)
def test_impossible(layout: ParallelConfig, servers: Servers | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shape(SITE, layout, servers)


def test_one_server_of_all() -> None:
    servers = shape(SITE, ParallelConfig(tp=8), Servers(1, 16, False)).servers
    assert servers == ServerNodes(count=1, gpus=16, first_node=1, nodes=2, nodes_each=2, per_node=1)
