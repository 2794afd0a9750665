"""Jobs of several shapes, at places that are the same on every machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launchers.script import Job
from launchers.shape import JobShape, Servers, job_shape
from launchers.site import SiteConfig, load_site
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.model_spec import load_model_spec

ROOT = Path(__file__).parents[2]
SITES = ROOT / "examples" / "sites"


def shape(
    site: SiteConfig, layout: ParallelConfig, servers: Servers | None = None, model: str = "qwen3-8b-base"
) -> JobShape:
    return job_shape(load_model_spec(model), layout, site, servers)


def job(site: str, layout: ParallelConfig, servers: Servers | None = None, **changes: object) -> Job:
    where = replace(load_site(SITES / f"{site}.yaml"), **changes)  # type: ignore[arg-type]
    return Job(
        name="lens-8b",
        run_dir=Path("/shared/runs/lens-8b"),
        work_dir=Path("/home/me/project"),
        python=Path("/home/me/project/.venv/bin/python"),
        site=where,
        shape=shape(where, layout, servers),
    )


def tp_dp(tp: int, dp: int) -> ParallelConfig:
    return ParallelConfig(tp=tp, dp=dp)


JOBS = {
    "1-node-container": job("container", tp_dp(4, 2)),
    "1-node-two-gpus-of-eight": job("venv", tp_dp(2, 1), venv=None, exclusive=False),
    "4-nodes-venv": job("venv", tp_dp(4, 4), reservation="friday", requeue=False),
    "4-nodes-colocated-container": job("container", tp_dp(4, 8), Servers(count=8, gpus=4, colocated=True)),
    "4-nodes-disaggregated-venv": job("venv", tp_dp(4, 2), Servers(count=2, gpus=4, colocated=False)),
    "64-nodes-disaggregated-container": job("container", tp_dp(8, 32), Servers(count=16, gpus=16, colocated=False)),
    "2nd-of-3-in-a-chain": replace(job("container", tp_dp(4, 2)), link=2, links=3),
}
