"""A site: what a Slurm cluster wants to know of every job, in one YAML. See docs/slurm.md for the keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lens_megatron import strict

_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
# of `sbatch:`, what other keys or the launcher itself decide
_TAKEN = {
    "account": "account", "partition": "partition", "qos": "qos", "reservation": "reservation", "time": "time",
    "constraint": "constraint", "nodes": "nodes", "ntasks-per-node": "ranks_per_node", "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_rank", "signal": "end_notice_s", "exclusive": "exclusive", "requeue": "requeue",
    "no-requeue": "requeue", "job-name": "--name", "output": "the launcher", "error": "the launcher", "array": "study",
    "open-mode": "the launcher", "ntasks": "the launcher", "dependency": "--chain",
}  # fmt: skip
_MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")  # of `sbatch:`, instead of the key
_NOTICE_EARLY_S = 60  # Slurm's: it looks at limits now and then


@dataclass(frozen=True)
class Place:
    """What a process finds around it on a node: a container, or a Python environment."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    image: str | None = None  # of pyxis: a .sqsh file or a registry's name; null: no container
    mounts: list[str] = field(default_factory=list)  # FROM:TO[:FLAGS]; run folder and working folder are always mounted
    venv: str | None = None  # a folder with bin/lens-megatron; null: this command's, or in a container what is on PATH
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mount in self.mounts:
            if not re.fullmatch(r"[^:,]+(:[^:,]+){1,2}", mount):
                raise ValueError(f"mounts: {mount!r} is not FROM:TO or FROM:TO:FLAGS")
        if self.mounts and self.image is None:
            raise ValueError("mounts need an image: without a container nothing is mounted")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"env: {name!r} is no name of a variable")


@dataclass(frozen=True)
class SiteConfig(Place):
    """SITE.yaml. What is said of the place at the top holds for the trainer, and for the servers if they have none."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time: str = "04:00:00"  # of one job; a run may take many
    nodes: int | None = None  # of the trainer; null: as many as the layout needs
    gpus_per_node: int = 8  # 0: a cluster without GPUs
    ranks_per_node: int | None = None  # null: one a GPU
    cpus_per_rank: int | None = None
    exclusive: bool = True  # whole nodes
    mem: str | int | None = (
        "auto"  # of a node; 0: all of it; auto: 0 with `exclusive`, which alone need not give memory
    )
    end_notice_s: int = 600  # before the time limit: longer than a step and a checkpoint together
    requeue: bool = True  # false: where a job may not queue itself again; use --chain
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)  # more #SBATCH lines
    setup: list[str] = field(default_factory=list)  # lines of shell before anything else, such as `module load ...`
    check_inputs: bool = True  # before queueing; false: data, functions or a reference are there on the nodes alone
    servers: Place | None = None  # null: as the trainer

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _TIME.fullmatch(self.time):
            raise ValueError(f"time: {self.time!r} is not [D-]HH:MM:SS")
        for name in ("nodes", "ranks_per_node", "cpus_per_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (got {value})")
        if self.gpus_per_node == 0 and self.ranks_per_node is None:
            raise ValueError("gpus_per_node: 0 leaves open how many ranks a node takes: set ranks_per_node")
        if self.gpus_per_node < 0:
            raise ValueError(f"gpus_per_node must be 0 or more (got {self.gpus_per_node})")
        if self.gpus_per_node and self.slots_per_node > self.gpus_per_node:
            raise ValueError(f"ranks_per_node: {self.ranks_per_node} ranks do not find a GPU each on a node")
        if not 0 <= self.end_notice_s <= 65535:
            raise ValueError(f"end_notice_s: Slurm takes 0 to 65535 (got {self.end_notice_s})")
        limit = _seconds(self.time)
        if self.end_notice_s and limit and limit <= self.end_notice_s + _NOTICE_EARLY_S:  # time 0: no limit
            raise ValueError(
                f"time: {self.time} is over at once: notice of its end comes end_notice_s {self.end_notice_s} s before it, "
                "and up to a minute earlier: a longer time, or a shorter end_notice_s"
            )
        if self.mem not in ("auto", None) and self._sbatch_memory:
            raise ValueError(
                f"sbatch: {self._sbatch_memory} and mem: {self.mem} both say how much memory: leave one out"
            )
        for name in self.sbatch:
            if (key := _TAKEN.get(name.lstrip("-").replace("_", "-"))) is not None:
                raise ValueError(f"sbatch: {name} is decided by {key!r}")

    @property
    def slots_per_node(self) -> int:
        """Ranks that fit on a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def memory(self) -> str | None:
        """--mem of sbatch; None: it is left out."""
        if self.mem == "auto":
            return "0" if self.exclusive and self._sbatch_memory is None else None
        return None if self.mem is None else str(self.mem)

    @property
    def _sbatch_memory(self) -> str | None:
        return next((name for name in self.sbatch if name.lstrip("-").replace("_", "-") in _MEMORY), None)

    @property
    def servers_place(self) -> Place:
        return self.servers or self


def _seconds(time: str) -> int:
    """As Slurm reads it: minutes, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS; seconds count as a whole minute."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash or len(parts) == 3 else [0, *parts, 0][:3]
    return 86400 * int(days or 0) + 3600 * hours + 60 * (minutes + (seconds > 0))


def load_site(path: Path | None, overrides: Sequence[str] = ()) -> SiteConfig:
    """Without a file: the defaults. Overrides: those of the command line that begin with `site.`, without it."""
    tree = {} if path is None else strict.read_yaml(path)
    return strict.build(SiteConfig, strict.apply_overrides(tree, overrides), str(path or "site"))


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the run, and of the site (`site.time=01:00:00`)."""
    site = [override.removeprefix("site.") for override in overrides if override.startswith("site.")]
    return [override for override in overrides if not override.startswith("site.")], site
