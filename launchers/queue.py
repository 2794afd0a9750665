"""What Slurm and the run folder say of a run's jobs. Works with and without accounting."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lens_megatron import stopping
from lens_megatron.machine import run_command

State = Literal["pending", "running", "done", "failed", "stopped", "unfinished", "unknown"]
_STATES: dict[str, State] = {
    "PENDING": "pending", "CONFIGURING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending", "RESV_DEL_HOLD": "pending", "SPECIAL_EXIT": "pending",
    "RUNNING": "running", "COMPLETING": "running", "SUSPENDED": "running", "STOPPED": "running", "SIGNALING": "running",
    "RESIZING": "running", "STAGE_OUT": "running",
}  # fmt: skip
_ENDINGS: dict[str, State] = {"done": "done", "stopped": "stopped", "unfinished": "unfinished", "failed": "failed"}
# why a job that waits will wait for ever unless somebody does something
_IMPOSSIBLE = {  # who asked for it
    "PartitionNodeLimit": "it asks for more nodes, or more time, than the partition allows",
    "PartitionTimeLimit": "its time is over the partition's limit: lower site.time",
    "PartitionConfig": "the partition cannot hold it: fewer nodes, or another partition",
    "BadConstraints": "no node has what constraint, gpus_per_node or cpus_per_rank ask for",
    "InvalidAccount": "the account does not exist or may not use the partition",
    "InvalidQOS": "the qos does not exist",
    "DependencyNeverSatisfied": "the job that it waits for cannot end as asked",
    "JobHoldMaxRequeue": "it was queued again too often: see its log",
    "ReservationDeleted": "its reservation is gone",
}
_HOPELESS = {  # or an administrator, or whoever holds it
    **_IMPOSSIBLE,
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "JobHeldUser": "it is held: scontrol release",
    "JobHeldAdmin": "an administrator holds it",
    "launch_failed_requeued_held": "a node could not start it: see slurmd's log; scontrol release tries again",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "NodeDown": "a node that it needs is down",
}
_UNQUEUED = "Slurm did not answer when the job was to be queued again: launch it with --resume"


@dataclass(frozen=True)
class JobStatus:
    state: State
    job: str = ""  # the one that runs, or runs next, or ran last
    slurm: str = ""  # Slurm's own word
    reason: str = ""  # why it waits, or why it failed
    nodes: str = ""
    used: str = ""  # of the time limit
    limit: str = ""
    restarts: int = 0
    silent: bool = False  # Slurm did not answer: it may be anything
    never: bool = False  # it waits, and will for ever: what it asks for cannot be

    @property
    def active(self) -> bool:
        return self.state in ("pending", "running")

    @property
    def over(self) -> bool:
        return not self.active and not self.silent


@dataclass(frozen=True)
class Handle:
    """A run that was submitted. It lives in the run folder: `Handle.of(run_dir)` finds it again."""

    run_dir: Path
    jobs: tuple[str, ...]  # Slurm's ids; more than one is a chain

    @classmethod
    def of(cls, run_dir: Path) -> Handle | None:
        path = run_dir / "launch" / "jobs.json"
        return cls(run_dir, tuple(json.loads(path.read_text())["jobs"])) if path.exists() else None

    def status(self) -> JobStatus:
        """Asks Slurm, and the run folder for what Slurm has forgotten."""
        return status(self.run_dir, self.jobs)

    def wait(
        self, seconds: float | None = None, poll_s: float = 5.0, tell: Callable[[str], None] | None = None
    ) -> JobStatus:
        """Until the run has ended, or for so long. `tell` hears why it waits: every reason once, as they alternate."""
        deadline = None if seconds is None else time.monotonic() + seconds
        told = {""}
        while not (now := self.status()).over and (deadline is None or time.monotonic() < deadline):
            if tell is not None and now.reason not in told:
                tell(f"job {now.job} {now.state}: {now.reason}")
            told.add(now.reason)
            time.sleep(poll_s)
        return now

    def stop(self) -> None:
        """A running job ends after its step, with a checkpoint; one that waits is taken from the queue."""
        stopping.ask_to_stop(self.run_dir)
        cancel(self.jobs, only_pending=True)

    def cancel(self) -> None:
        """At once, without a checkpoint."""
        cancel(self.jobs, only_pending=False)


def status(run_dir: Path, jobs: Sequence[str]) -> JobStatus:
    """Of a chain, the job that runs, else the first that waits, else the last that ended."""
    found = [_job(job) for job in jobs]
    for state in ("running", "pending"):
        for one in found:
            if one.state == state:
                return one
    ended = outcome(run_dir)
    last = next((one for one in reversed(found) if one.job == ended.job), found[-1])
    if ended.state in ("unknown", "unfinished") and (silent := [one for one in found if one.silent]):
        return silent[0]
    if ended.state in ("done", "stopped", "unfinished"):
        return JobStatus(ended.state, ended.job or last.job, last.slurm, ended.reason, restarts=last.restarts)
    if ended.state == "unknown" and last.state != "failed":
        return last
    reason = last_error(run_dir) or last.reason or ended.reason
    return JobStatus("failed", last.job, last.slurm, reason, restarts=last.restarts)


def outcome(run_dir: Path) -> JobStatus:
    """What the batch script wrote last: `done 123.0`, `failed 1 123.2`, `unfinished unqueued 123.0`."""
    path = run_dir / "launch" / "outcome"
    words = path.read_text().split() if path.exists() else []
    if not words or words[0] not in _ENDINGS:
        return JobStatus("unknown")
    reason = f"exit code {words[1]}" if words[0] == "failed" else _UNQUEUED if "unqueued" in words else ""
    return JobStatus(_ENDINGS[words[0]], words[-1].partition(".")[0], reason=reason)


def _job(job: str) -> JobStatus:
    """From the controller's memory, else from accounting."""
    shown = run_command(["scontrol", "--oneliner", "show", "job", job])
    if shown is not None and shown.ok and "JobState=" in shown.text:
        fields = dict(re.findall(r"(\w+)=(\S*)", shown.text))
        return _from_controller(job, fields)
    told = run_command(
        ["sacct", "-n", "-X", "-P", "--duplicates", "-j", job, "-o", "State,ExitCode,NodeList,Elapsed,Timelimit"]
    )
    if told is not None and told.ok and told.text:
        *_, line = told.text.splitlines()
        word, code, nodes, used, limit = [*line.split("|"), "", "", "", ""][:5]
        state = _STATES.get(word.split()[0], "done" if word.startswith("COMPLETED") else "failed")
        return JobStatus(state, job, word, _why_failed(word, code) if state == "failed" else "", nodes, used, limit)
    if shown is not None and not shown.ok and "Invalid job id" not in shown.text:  # a job may be alive meanwhile
        line = (shown.text.splitlines() or ["scontrol said nothing"])[-1]
        return JobStatus("unknown", job, reason=f"Slurm does not answer: {line}", silent=True)
    return JobStatus("unknown", job)


def _from_controller(job: str, fields: Mapping[str, str]) -> JobStatus:
    word = fields["JobState"].split("+")[0]
    state = _STATES.get(word, "done" if word == "COMPLETED" else "failed")
    why = fields.get("Reason", "None")
    if state == "pending":
        reason = "" if why == "None" else f"Slurm says {why}" + (f": {_HOPELESS[why]}" if why in _HOPELESS else "")
    else:
        reason = _why_failed(word, fields.get("ExitCode", "")) if state == "failed" else ""
    return JobStatus(
        state,
        job,
        word,
        reason,
        fields.get("NodeList", "").replace("(null)", ""),
        fields.get("RunTime", ""),
        fields.get("TimeLimit", ""),
        int(fields.get("Restarts", "0") or 0),
        never=state == "pending" and why in _IMPOSSIBLE,
    )


def _why_failed(word: str, code: str) -> str:
    if code == "0:53":
        return "a node could not write the job's log: run_dir must lie on storage that all nodes share"
    return f"Slurm says {word}, exit code {code}" if code else f"Slurm says {word}"


_ERROR = re.compile(r"^\s*(?:\d+: )?((?:error|failed): .*)$")
_OTHER = re.compile(  # of a rank (Slurm may put its number before it), of Slurm, of the shell, of Python
    r"^\s*(?:\d+: )?((?:srun|slurmstepd|bash|sbatch): .*|\S*slurm_script: line .*|[\w.]*(?:Error|Exception): .*)$"
)


# what the other ranks say when one has ended
_ECHOES = ("another process of the run went away", "waited for rank 0 to", "did not say within")


def last_error(run_dir: Path) -> str:
    """Of the newest log that has one: our own one-line errors before anybody else's last words."""
    logs = sorted((run_dir / "logs").glob("*.out"), key=lambda path: path.stat().st_mtime, reverse=True)
    texts = [_tail(path) for path in logs if not path.name.startswith("servers-")][:2]
    for pattern in (_ERROR, _OTHER):
        for text in texts:
            found = [match.group(1).strip() for line in text.splitlines() if (match := pattern.match(line))]
            if found:
                return next((line for line in reversed(found) if not any(word in line for word in _ECHOES)), found[-1])
    return ""


def _tail(path: Path, most: int = 200_000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().decode(errors="replace")


def cancel(jobs: Sequence[str], only_pending: bool) -> None:
    run_command(["scancel", *(["--state=PENDING"] if only_pending else []), *jobs])
