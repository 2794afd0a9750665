"""nemo-run: executors from sites, whole batch scripts, submission. The only file that imports it, inside functions."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launchers import script
from launchers.script import Job
from lens_megatron.errors import RunError, UsageError

_REWRITTEN = "/nemo_run"  # without a container, nemo-run replaces it all over the script by its own folder


def import_nemo_run() -> Any:
    try:
        import nemo_run
    except ImportError as error:
        raise UsageError(f"launch needs nemo-run ({error}): pip install 'lens-megatron[slurm]'") from None
    return nemo_run


def experiment_folder(job: Job) -> Path:
    """nemo-run's for the next submission; it is mounted into containers. In the run folder, since all nodes see that, unless
    NEMORUN_HOME names another home. Numbered, where nemo-run would take the time, so that a dry run shows the same path."""
    chosen = os.environ.get("NEMORUN_HOME")
    home = Path(chosen).expanduser().absolute() if chosen else job.launch / "nemo"
    title = home / "experiments" / job.name
    return next(folder for n in itertools.count(1) if not (folder := title / f"{job.name}_{n}").exists())


@contextlib.contextmanager
def _home(path: Path) -> Iterator[None]:
    """nemo-run reads NEMORUN_HOME when it is imported, and keeps a path made from it."""
    from nemo_run import config
    from nemo_run.run.torchx_backend.schedulers import slurm

    home, list_of_jobs = config.get_nemorun_home(), slurm.SLURM_JOB_DIRS
    config.set_nemorun_home(str(path))
    slurm.SLURM_JOB_DIRS = str(path / ".slurm_jobs")
    try:
        yield
    finally:
        config.set_nemorun_home(home)
        slurm.SLURM_JOB_DIRS = list_of_jobs


def _task_name(job: Job) -> str:
    return job.name if job.links == 1 else f"{job.name}-{job.link}"


def executor(job: Job, folder: Path | None = None) -> Any:
    """nemo-run's SlurmExecutor for a job: no launcher, one srun task a rank. `folder`: the experiment's, else in nemo-run's
    home."""
    run = import_nemo_run()
    site, shape = job.site, job.shape
    more: dict[str, Any] = {name.lstrip("-").replace("-", "_"): value for name, value in site.sbatch.items()}
    if site.reservation is not None:
        more["reservation"] = site.reservation
    if job.links > 1:
        more["kill_on_invalid_dep"] = "yes"
    whole = run.SlurmExecutor(
        account=site.account,
        partition=site.partition,
        qos=site.qos,
        constraint=site.constraint,
        time=site.time,
        nodes=shape.nodes,
        ntasks_per_node=shape.ranks_per_node,
        gpus_per_node=shape.gpus_per_node if site.gpus_per_node else None,
        cpus_per_task=site.cpus_per_rank,
        exclusive=site.exclusive or None,
        mem=site.memory,
        signal=f"USR1@{site.end_notice_s}" if site.end_notice_s else None,
        container_image=site.image,
        container_mounts=script.mounts(job, site) if site.image else [],
        container_env=script.environment_names(site.env) if site.image else None,
        additional_parameters=more or None,
        srun_args=script.trainer_step(job),
        setup_lines=script.setup_lines(job, folder or Path(run.config.get_nemorun_home()).absolute()),
        job_name_prefix="lens.",
        dependency_type="afterany",
        packager=run.Packager(),
        launcher=None,
        poll_estimated_start_time=False,
        tunnel=run.LocalTunnel(job_dir=""),
    )
    whole.job_details.folder = str(job.run_dir / "logs")
    return whole


def batch_script(job: Job) -> str:
    """The whole script, as it would be submitted."""
    import_nemo_run()
    from nemo_run.core.execution.slurm import SlurmBatchRequest

    folder = experiment_folder(job)
    whole = executor(job, folder)
    whole.experiment_dir = whole.tunnel.job_dir = str(folder)
    whole.job_dir = str(folder / _task_name(job))
    request = SlurmBatchRequest(
        launch_cmd=["sbatch", "--requeue", "--parsable"],
        jobs=[_task_name(job)],
        command_groups=[[script.command(job)]],
        executor=whole,
        max_retries=0,
        extra_env={},
    )
    return str(request.materialize())


def submit(jobs: Sequence[Job]) -> list[str]:
    """Slurm's ids of a chain of jobs, each waiting for the end of the one before."""
    run = import_nemo_run()
    path = str(jobs[0].run_dir) + str(jobs[0].work_dir)
    if jobs[0].site.image is None and _REWRITTEN in path:
        raise UsageError(f"nemo-run rewrites {_REWRITTEN!r} in paths: choose a run_dir and a working folder without it")
    folder = experiment_folder(jobs[0])
    said = io.StringIO()
    logging.getLogger("nemo_run").setLevel(logging.ERROR)
    quiet = contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)
    with _home(folder.parents[2]), without_input(), quiet[0], quiet[1]:
        experiment = run.Experiment(jobs[0].name, id=folder.name, log_level="ERROR", enable_goodbye_message=False)
        try:
            with experiment:
                before: list[str] = []
                for job in jobs:
                    task = run.Script(path=str(job.launch / "rank.sh"))
                    whole = executor(job, folder)
                    before = [experiment.add(task, executor=whole, name=_task_name(job), dependencies=before)]
                experiment.run(detach=True)
        except Exception as error:  # invoke's, torchx's, AssertionError: nemo-run has no error of its own here
            own = str(error)  # what nemo-run prints of it is wrapped to the width of a terminal
            raise submission_error(own if "sbatch: error" in own else f"{said.getvalue()}\n{own}") from None
    handles = [str(job.handle) for job in experiment.jobs]
    ids = [handle.partition("://")[2].split("/")[1] if handle else "" for handle in handles]
    if not all(ids):
        raise submission_error(said.getvalue())
    scripts = sorted(Path(experiment._exp_dir).glob("*_sbatch.sh"))
    for number, path_ in enumerate(scripts, 1):
        name = "sbatch.sh" if len(scripts) == 1 else f"sbatch-{number}.sh"
        (jobs[0].launch / name).write_text(path_.read_text())
    return ids


@contextlib.contextmanager
def without_input() -> Iterator[None]:
    """nemo-run gives sbatch our standard input, and reads from it: a terminal's, or a test's that may not be read."""
    before = sys.stdin
    with Path(os.devnull).open() as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


def submission_error(said: str) -> RunError | UsageError:
    """sbatch's own words, out of what nemo-run makes of them."""
    lines = [line.removeprefix("Batch job submission failed: ") for line in re.findall(r"sbatch: error: (.*)", said)]
    if lines:
        return UsageError("Slurm refused the job: " + "; ".join(dict.fromkeys(line.strip() for line in lines)))
    last = [line for line in said.splitlines() if line.strip()]
    return RunError(f"nemo-run did not submit the job: {last[-1] if last else 'it gave no reason'}")


def run_locally(arguments: Sequence[str], name: str) -> bool:
    """`lens-megatron ARGUMENTS` through nemo-run's LocalExecutor, its output on this terminal; whether it ended well."""
    run = import_nemo_run()
    task = run.Script(path="-m", entrypoint=sys.executable, args=["lens_megatron.cli", *arguments])
    with run.Experiment(name, log_level="WARNING", enable_goodbye_message=False) as experiment:
        experiment.add(task, executor=run.LocalExecutor(launcher=None), name=name, tail_logs=True)
        experiment.run(detach=False, tail_logs=True)
    return all(job.state.name == "SUCCEEDED" for job in experiment.jobs)
