"""Runs on Slurm: `submit` queues one, its Handle says what became of it.

handle = submit(Path("run.yaml"), ["steps=100", "site.time=01:00:00"], Path("site.yaml"), "lens-8b")
handle.status().state   # pending, running, done, failed, stopped, unfinished, unknown
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from launchers import nemo
from launchers.inputs import View, check_inputs, find_models
from launchers.queue import Handle
from launchers.script import Job
from launchers.servers import servers_of
from launchers.shape import job_shape
from launchers.site import SiteConfig, load_site, split_overrides
from launchers.summary import summary
from lens_megatron import stopping, strict
from lens_megatron.config import RunConfig, load_run
from lens_megatron.errors import RunError, UsageError
from lens_megatron.files import replace_text
from lens_megatron.machine import run_command
from lens_megatron.run_folder import RunFolder


def submit(
    run: Path,
    overrides: Sequence[str],
    site: Path | SiteConfig | None,
    name: str = "",
    *,
    links: int = 1,
    resume: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Handle:
    """Queue RUN.yaml on Slurm. What is wrong is a UsageError before anything is queued, as far as it can be known.

    `overrides`: `key.path=value` of the run, and `site.key=value` of the site. `links`: so many jobs, each going on where
    the one before it ended. `resume`: go on with the run that the folder holds. `tell`: shown what the job will be.
    """
    jobs = prepare(run, overrides, site, name, links=links, resume=resume, tell=tell)
    ids = nemo.submit(jobs)
    known = jobs[0].launch / "jobs.json"
    try:
        replace_text(known, json.dumps({"jobs": ids, "name": jobs[0].name}) + "\n")
    except OSError as error:
        raise RunError(
            f"{known}: {error.strerror}: the run is queued as {' '.join(ids)}, and `status` will not find it"
        ) from None
    return Handle(jobs[0].run_dir, tuple(ids))


def prepare(
    run: Path,
    overrides: Sequence[str],
    site: Path | SiteConfig | None,
    name: str = "",
    *,
    links: int = 1,
    resume: bool = False,
    tell: Callable[[str], None] | None = None,
) -> list[Job]:
    """All of `submit` but the submission: everything checked, and what the jobs read written into the run folder."""
    jobs, tree, config = plan(run, overrides, site, name, links)
    if tell is not None:
        for line in summary(jobs[0], config):
            tell(line)
    check_cluster(jobs[0].site, str(site) if isinstance(site, Path) else "site")
    folder = RunFolder(jobs[0].run_dir)
    if folder.holds_run() and not resume:
        raise UsageError(
            f"run_dir {folder.path} already holds a run: --resume goes on with it, or choose another run_dir"
        )
    earlier = Handle.of(folder.path)
    if earlier is not None and not (now := earlier.status()).over:
        raise UsageError(f"run_dir {folder.path} belongs to job {now.job}, which is {now.state}: stop it first")
    _write(jobs[0], tree)
    return jobs


def plan(
    run: Path, overrides: Sequence[str], site: Path | SiteConfig | None, name: str = "", links: int = 1
) -> tuple[list[Job], dict, RunConfig]:
    """The jobs, the run's tree with its overrides, and what it means."""
    of_run, of_site = split_overrides(overrides)
    if isinstance(site, SiteConfig):
        where = strict.build(SiteConfig, strict.apply_overrides(strict.to_tree(SiteConfig, site), of_site), "site")
    else:
        where = load_site(site, of_site)
    config = load_run(run, of_run)
    run_dir, work_dir = Path(config.run_dir).absolute(), Path.cwd()
    view = View(where, run_dir, work_dir)
    model = find_models(config, view)
    if links < 1:
        raise UsageError(f"--chain: at least 1 (got {links})")
    shape = job_shape(model.spec, config.parallel, where, servers_of(config))
    check_inputs(config, view)
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", name or run_dir.name).strip("-") or "run"
    jobs = [
        Job(word, run_dir, work_dir, Path(sys.executable), where, shape, link, links) for link in range(1, links + 1)
    ]
    return jobs, strict.apply_overrides(strict.read_yaml(run), of_run), config


def check_cluster(site: SiteConfig, where: str) -> None:
    """What Slurm would refuse later or not at all."""
    if shutil.which("sbatch") is None:
        raise UsageError(
            "launch slurm: there is no sbatch here: run it on a login node of the cluster, or add --dry-run"
        )
    partitions = run_command(["sinfo", "--noheader", "--format", "%R"])
    if partitions is None or not partitions.ok:
        raise UsageError(f"launch slurm: Slurm does not answer: {partitions.text if partitions else 'no sinfo'}")
    names = sorted(set(partitions.text.split()))
    for wanted in (site.partition or "").split(","):
        if wanted and wanted not in names:
            raise UsageError(f"{where}: partition {wanted!r} is not on this cluster; there are: {', '.join(names)}")
    for place in {site.image: site, site.servers_place.image: site.servers_place}.values():
        if place.image is None:
            continue
        is_file = place.image.startswith(("/", "./", "../"))
        if is_file and not Path(place.image).exists():
            raise UsageError(f"{where}: image {place.image}: no such file")
        help_text = run_command(["srun", "--help"])
        if help_text is None or "--container-image" not in help_text.text:
            raise UsageError(
                f"{where}: image {place.image}: srun here has no --container-image: pyxis is not installed"
            )


def _write(job: Job, tree: dict) -> None:
    """What the job reads: the run as it is now, whatever becomes of RUN.yaml while the job waits."""
    try:
        (job.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        job.launch.mkdir(exist_ok=True)
        for stale in ("outcome", "jobs.json"):
            (job.launch / stale).unlink(missing_ok=True)
        stopping.forget_stop(job.run_dir)
        (job.launch / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        (job.launch / "token").write_text(secrets.token_hex(8) + "\n")
        (job.launch / "site.json").write_text(json.dumps(asdict(job.site), indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"run_dir {job.run_dir} cannot be written: {error.strerror}") from None
    if job.shape.servers is not None:
        shutil.copy(Path(__file__).with_name("supervisor.py"), job.launch / "supervisor.py")
