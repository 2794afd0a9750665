"""A real Slurm of two nodes on this machine: munge, slurmctld and one slurmd a node, as root, in a folder of its own.

No systemd and no cgroups: processes are tracked by ancestry. Both slurmds are `localhost` under two names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
_START_S = 60.0


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    if os.geteuid() != 0:
        return "a test cluster of Slurm runs its daemons as root, and this is another user"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge" if absent else None


def missing_accounting() -> str | None:
    absent = [program for program in ("slurmdbd", "mariadbd", "mariadb-install-db") if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed: apt-get install slurmdbd mariadb-server" if absent else None


@dataclass
class Cluster:
    root: Path
    accounting: bool = False
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def run(self, *command: str, check: bool = True, seconds: float = 30.0) -> str:
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self) -> None:
        for folder in ("munge", "state", "spool", "log", "run"):
            (self.root / folder).mkdir(parents=True)
        self._write_settings()
        key = self.root / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.root / "munge").chmod(0o755)
        munge = [f"--{name}={self.root / 'munge' / file}" for name, file in _MUNGE.items()]
        self._daemon("munged", "--force", "--foreground", *munge)
        self.until(lambda: (self.root / "munge" / "munge.socket").exists(), "munged")
        if self.accounting:
            self._start_accounting()
        self._controller = self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.until(self._all_up, "the nodes")

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """As while it is restarted, which clusters do now and then; jobs live on."""
        self._controller.terminate()
        self._controller.wait(_START_S)
        yield
        self._controller = self._daemon("slurmctld", "-D")
        self.until(self._all_up, "the controller")

    def start_node(self, node: str) -> None:
        # a mount namespace of its own: a test can hide a folder from one node
        self._daemon("unshare", "--mount", "slurmd", "-D", "-N", node)

    def hide(self, folder: Path, node: str) -> None:
        """An empty folder in the place of `folder`, on one node alone."""
        pid = (self.root / "run" / f"slurmd.{node}.pid").read_text().strip()
        subprocess.run(
            ["nsenter", f"--mount=/proc/{pid}/ns/mnt", "mount", "-t", "tmpfs", "none", str(folder)], check=True
        )

    def show(self, folder: Path, node: str) -> None:
        pid = (self.root / "run" / f"slurmd.{node}.pid").read_text().strip()
        subprocess.run(["nsenter", f"--mount=/proc/{pid}/ns/mnt", "umount", str(folder)], check=True)

    def down(self, node: str) -> None:
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def resume(self, node: str) -> None:
        """Unless it has come back by itself (ReturnToService)."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def job(self, job: str) -> dict[str, str]:
        line = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(part.partition("=")[::2] for part in line.split())

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            self.run("scancel", "--quiet", "--user=root", seconds=5.0)
            self.until(lambda: not self.run("squeue", "--noheader", check=False).strip(), "the queue to empty", 10.0)
        for process in reversed(self._started):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self._started:
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid, name in self._processes():
            if name.startswith("slurmstepd"):  # one that outlived its slurmd
                os.kill(pid, signal.SIGKILL)
        self.until(lambda: not self._processes(), "an end of all processes of the cluster, or of its jobs,", 10.0)

    def _processes(self) -> list[tuple[int, str]]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.root).encode() in (entry / "environ").read_bytes():
                    found.append((int(entry.name), (entry / "comm").read_text().strip()))
        return found

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.root / "log" / f"{command[0]}-{len(self._started)}.out").open("wb") as log:
            self._started.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *command],  # gone with these tests, however they end
                    env={**os.environ, **self.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return self._started[-1]

    def _all_up(self) -> bool:
        lines = self.run("sinfo", "--noheader", "--Node", "--format", "%N %T", check=False).splitlines()
        return {line.strip() for line in lines} == {f"{node} idle" for node in NODES}  # one line a partition

    def until(self, holds: object, what: str, seconds: float = _START_S) -> None:
        assert callable(holds)
        deadline = time.monotonic() + seconds
        while not holds():
            logs = "\n".join(path.read_text(errors="replace")[-1000:] for path in (self.root / "log").iterdir())
            assert time.monotonic() < deadline, f"{what} did not come in {seconds:.0f} s:\n{logs}"
            time.sleep(0.1)

    def _write_settings(self) -> None:
        socket_, ports = self.root / "munge" / "munge.socket", free_ports(5)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=False)
        )
        accounts = "AccountingStorageType=accounting_storage/none"
        if self.accounting:
            self._database_port = ports[4]
            accounts = (
                "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
                f"AccountingStoragePort={ports[3]}\nAccountingStoragePass={socket_}\n"
                "AccountingStorageEnforce=associations"
            )
            settings = self.root / "slurmdbd.conf"
            settings.write_text(_SLURMDBD.format(root=self.root, socket=socket_, port=ports[3], database_port=ports[4]))
            settings.chmod(0o600)
        text = _SLURM.format(root=self.root, socket=socket_, port=ports[2], nodes=nodes, accounts=accounts)
        (self.root / "slurm.conf").write_text(text)

    def _start_accounting(self) -> None:
        data, socket_ = self.root / "database", self.root / "run" / "mariadb.socket"
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
             "--auth-root-authentication-method=socket", "--skip-name-resolve"],
            check=True, capture_output=True,
        )  # fmt: skip
        self._daemon("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={socket_}",
                     f"--pid-file={self.root}/run/mariadb.pid", "--bind-address=127.0.0.1",
                     f"--port={self._database_port}", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M",
                     "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0")  # fmt: skip
        client = ["mariadb", "--no-defaults", "-S", str(socket_), "-e"]
        self.until(lambda: subprocess.run([*client, "select 1"], capture_output=True).returncode == 0, "mariadbd")
        grants = [
            f"create user 'slurm'@'{host}' identified by 'slurm'; grant all on slurm_acct.* to 'slurm'@'{host}';"
            for host in ("127.0.0.1", "localhost")
        ]
        subprocess.run([*client, " ".join(grants)], check=True)
        self._daemon("slurmdbd", "-D")
        self.until(lambda: "error" not in self.run("sacctmgr", "-n", "list", "cluster", check=False), "slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", "testcluster", check=False)
        self.run("sacctmgr", "-i", "add", "account", "lab")
        self.run("sacctmgr", "-i", "add", "user", "root", "account=lab")


_MUNGE = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid",
          "log-file": "munged.log", "seed-file": "munged.seed"}  # fmt: skip

# cred_expire: a requeued job starts after seconds, not after two minutes
_SLURM = """\
ClusterName=testcluster
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0,nohold_on_prolog_fail
{accounts}
ReturnToService=2
SlurmdTimeout=10
KillWait=3
MinJobAge=600
JobRequeue=1
CompleteWait=0
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=one Nodes=node1 MaxNodes=1 MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=with_grace Nodes=ALL MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=without_grace Nodes=ALL MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE
"""

_SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={root}/run/slurmdbd.pid
LogFile={root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
CommitDelay=1
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def running(root: Path, accounting: bool = False) -> Iterator[Cluster]:
    cluster = Cluster(root, accounting)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
