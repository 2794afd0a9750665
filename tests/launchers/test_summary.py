"""What --dry-run says of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launchers.script import Job
from launchers.servers import servers_of
from launchers.shape import job_shape
from launchers.site import SiteConfig
from launchers.summary import summary
from lens_megatron.config import load_run
from lens_megatron.model_spec import load_model_spec
from tests.loop.runs import run_tree, write_run


def said(folder: Path, *overrides: str, **site: Any) -> list[str]:
    where = SiteConfig(**site)
    config = load_run(
        write_run(folder, run_tree(folder, folder / "run")), ["update.tokens_per_microbatch=16384", *overrides]
    )
    shape = job_shape(load_model_spec("qwen3-8b-base"), config.parallel, where, servers_of(config))
    return list(summary(Job("x", folder, folder, folder, where, shape), config))


SGLANG = "rollout={engine: sglang, servers: 1, server: {tp: 1}}"


def test_one_server_on_a_node_of_its_own_leaves_seven(tmp_path: Path) -> None:
    assert said(tmp_path, "parallel={tp: 4, dp: 2}", SGLANG) == [
        "nodes    2, 1 of them for the trainer",
        "ranks    8, 8 a node: tp=4 pp=1 cp=1 dp=2",
        "servers  1 of 1 GPU each, 1 a node, on nodes of their own",
        "GPUs     16, 7 of them idle",
        "warning: 7 of the 16 GPUs that the job is given would be idle: rollout.servers=8 would fill their node",
    ]


@pytest.mark.parametrize(
    ("overrides", "site", "gpus", "warning"),
    [
        (["parallel={tp: 4, dp: 4}"], {}, "16, all in use", "the embedded engine is one HF generate"),
        (["parallel={tp: 4}"], {"nodes": 2}, "16, all in use", "beside rank 0, for all 2 nodes"),
        (["parallel={tp: 2}"], {}, "8, 6 of them idle", "a larger parallel.dp, or site.exclusive=false"),
        (["parallel={tp: 2}"], {"exclusive": False}, "2, all in use", ""),
        (["parallel={tp: 4}"], {"ranks_per_node": 4}, "8, 4 of them idle", "site.ranks_per_node leaves GPUs"),
        (["parallel={tp: 8}", SGLANG, "rollout.servers=8"], {}, "16, all in use", ""),
        (["parallel={tp: 8}", SGLANG, "rollout.server.tp=16"], {}, "24, all in use", ""),
        (
            ["parallel={tp: 8}", SGLANG, "rollout.servers=3", "rollout.server.tp=4"],
            {},
            "24, 4 of them idle",
            "=4 would",
        ),
        (
            ["parallel={tp: 8}", SGLANG, "placement=colocated"],
            {},
            "8, all in use: 8 train and 1 generate, in turn",
            "1 of 8 GPUs generate, the others wait meanwhile: set rollout.servers=8",
        ),
        (
            ["parallel={tp: 2, dp: 16}", SGLANG, "placement=colocated", "rollout.servers=8"],
            {},
            "32, all in use: 32 train and 8 generate, in turn",
            "8 of 32 GPUs generate, the others wait meanwhile: set rollout.servers=32",
        ),
        (
            ["parallel={tp: 2, dp: 16}", SGLANG, "placement=colocated", "rollout.servers=8", "rollout.server.tp=4"],
            {},
            "32, all in use: 32 train and 32 generate, in turn",
            "",
        ),
        (
            ["parallel={tp: 2, dp: 16}", SGLANG, "placement=colocated", "rollout.server.tp=16"],
            {},
            "32, all in use: 32 train and 16 generate, in turn",
            "set rollout.servers=2",
        ),
        (["parallel={tp: 2}", SGLANG], {"exclusive": False}, "4, 1 of them idle", "rollout.servers=2 would"),
    ],
)
def test_gpus(tmp_path: Path, overrides: list[str], site: dict[str, Any], gpus: str, warning: str) -> None:
    lines = said(tmp_path, *overrides, **site)
    assert f"GPUs     {gpus}" in lines
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == (bool(warning) or "idle" in gpus) and warning in "".join(warnings)


def test_what_serves_a_run(tmp_path: Path) -> None:
    urls = "rollout={engine: sglang, server: {urls: ['http://a:1', 'http://b:2']}}"
    assert "servers  2, not of this job: http://a:1, http://b:2" in said(tmp_path, "parallel={tp: 8}", urls)
    lines = said(tmp_path, "parallel={tp: 8}", gpus_per_node=0, ranks_per_node=8)
    assert lines[-1] == "servers  none: the embedded engine"  # nothing of GPUs where there are none
    spanning = said(tmp_path, "parallel={tp: 8}", SGLANG, "rollout.server.tp=16")
    assert "servers  1 of 16 GPUs each, 2 nodes each, on nodes of their own" in spanning
