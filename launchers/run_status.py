"""`lens-megatron status`: the run folder and Slurm, in a few lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launchers.queue import Handle, JobStatus, last_error
from lens_megatron import checkpoints, recorder, stopping
from lens_megatron.errors import UsageError
from lens_megatron.progress import duration
from lens_megatron.run_folder import RunFolder

_SKEW_S = 5.0  # between the clocks of Slurm and of the nodes


def look(run_dir: Path) -> dict[str, Any]:
    folder = RunFolder(run_dir)
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir}: no such run folder")
    handle = Handle.of(run_dir)
    if handle is None and not folder.holds_run() and not folder.in_use():
        raise UsageError(f"{run_dir}: neither a run nor a job of one is in this folder")
    metrics = folder.read_metrics()
    steps = folder.read_config().get("steps")
    done = metrics[-1]["step"] if metrics else 0
    job = handle.status() if handle is not None else _without_job(folder, done, steps)
    whole: list[checkpoints.Found] = []
    with contextlib.suppress(checkpoints.Unreadable):  # the rest can be told all the same
        whole, _ = checkpoints.newest_first(folder.checkpoints)
    return {
        "run": str(run_dir),
        "state": job.state,
        "job": job.job or None,
        "slurm": job.slurm or None,
        "reason": job.reason or None,
        "nodes": job.nodes or None,
        "used": job.used or None,
        "limit": job.limit or None,
        "restarts": job.restarts,
        "stopping": stopping.stop_file(run_dir).exists() and job.active,
        "step": done,
        "steps": steps,
        "step_seconds_ago": round(time.time() - folder.metrics_path.stat().st_mtime) if metrics else None,
        "reward": metrics[-1].get("reward") if metrics else None,
        "doing": _doing(folder, job) if job.state == "running" else None,
        "checkpoint": whole[0].manifest.step if whole else None,
        "last_error": last_error(run_dir) or None,
    }


def _doing(folder: RunFolder, job: JobStatus) -> dict[str, Any] | None:
    """The phase that rank 0 began last, in this life of the run. Step 0: it starts."""
    try:
        events = recorder.read(recorder.path_of(folder.logs, 0))
        began = folder.taken_at()
        if job.used:  # a job that was queued again runs before its processes have taken the folder
            began = max(began, time.time() - _seconds(job.used) - _SKEW_S)
    except (OSError, ValueError):  # there is none yet, the file system does not give it, or Slurm knows no time
        return None
    if not events or (event := events[-1]).clock < began:
        return None
    ended = event.seconds is not None
    return {"phase": event.what, "step": event.step, "ended": ended, "seconds": round(time.time() - event.clock)}


def _seconds(used: str) -> int:
    """[D-]HH:MM:SS of Slurm."""
    days, _, clock = used.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return 86_400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


def _without_job(folder: RunFolder, done: int, steps: int | None) -> JobStatus:
    if folder.in_use():
        return JobStatus("running")
    if (ending := folder.read_ending()) is not None:
        state, reason = ending
        return JobStatus(state, reason=reason)
    return JobStatus("done" if steps is not None and done >= steps else "unfinished")


def describe(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", status["run"]
    yield "state", " ".join(_state(status))
    if status["reason"]:
        yield "reason", status["reason"]
    ago = status["step_seconds_ago"]
    # fewer than were made were asked for when nothing was left to do: earlier versions took that down
    of = f" of {status['steps']}" if status["steps"] is not None and status["steps"] >= status["step"] else ""
    reward = f"; reward {status['reward']:.3f}" if status["reward"] is not None else ""
    yield "step", f"{status['step']}{of}" + (f", {duration(ago)} ago{reward}" if ago is not None else "")
    if (doing := status["doing"]) is not None:
        step = f" (step {doing['step']})" if doing["step"] else ""
        yield "doing", f"{'after ' if doing['ended'] else ''}{doing['phase']}{step}, for {duration(doing['seconds'])}"
    none = "none" if status["state"] in ("done", "failed") else "none yet"
    yield "checkpoint", none if status["checkpoint"] is None else f"step {status['checkpoint']}"
    yield "last error", status["last_error"] or "none"


def _state(status: Mapping[str, Any]) -> Iterator[str]:
    yield status["state"]
    if status["job"]:
        parts = [f"Slurm job {status['job']}"]
        if status["nodes"]:
            parts.append(f"on {status['nodes']}")
        if status["state"] == "running" and status["limit"]:
            parts.append(f"{status['used']} of {status['limit']}")
        if status["restarts"]:
            parts.append(f"restarted {status['restarts']} times" if status["restarts"] > 1 else "restarted once")
        yield f"({', '.join(parts)})"
    if status["stopping"]:
        yield "and told to stop"
