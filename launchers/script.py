"""The shell of a job: what goes around nemo-run's one srun. Pure text; tests compare whole scripts with golden files.

The batch script writes two small scripts into the run folder, for the trainer's ranks and for the nodes of the servers,
checks that every node sees that folder, starts the servers in a step of their own, and leaves the trainer's step to
nemo-run. However the trainer ends, `end_of_job` says how in `launch/outcome` and queues the job again when it is to go on.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.shape import JobShape
from launchers.site import Place, SiteConfig
from lens_megatron.stopping import EXIT_CODES

_SERVERS_END_S = 60
_REQUEUE_S, _REQUEUE_PAUSE_S = 300, 10  # how long Slurm is asked to queue a job again, and how often
_AGAIN, _STOP = EXIT_CODES["make room"], EXIT_CODES["stop"]


@dataclass(frozen=True)
class Job:
    """One Slurm job of a run. All paths absolute, as the nodes see them."""

    name: str
    run_dir: Path
    work_dir: Path  # relative paths in RUN.yaml are meant from here
    python: Path  # this command's interpreter
    site: SiteConfig
    shape: JobShape
    link: int = 1  # of a chain
    links: int = 1

    @property
    def launch(self) -> Path:
        return self.run_dir / "launch"


def trainer_step(job: Job) -> list[str]:
    """srun's arguments for the trainer; nemo-run adds the log, the container's image and --kill-on-bad-exit."""
    shape = job.shape
    arguments = [
        f"--nodes={shape.trainer_nodes}",
        f"--ntasks={shape.ranks}",
        f"--ntasks-per-node={shape.ranks_per_node}",
        "--distribution=block",  # neighbours in rank order share a node: that is where tensor parallelism belongs
        "--overlap",
    ]
    if shape.trainer_nodes < shape.nodes:
        arguments.append("--relative=0")
    if job.site.cpus_per_rank is not None:  # srun no longer takes it from the job
        arguments.append(f"--cpus-per-task={job.site.cpus_per_rank}")
    if job.site.image is None:
        arguments.append(f"--chdir={job.work_dir}")
    return arguments


def mounts(job: Job, place: Place) -> list[str]:
    return all_mounts(place, job.run_dir, job.work_dir)


def all_mounts(place: Place, *own: Path) -> list[str]:
    """`own`: always mounted. A folder that a configured mount already holds is not mounted again."""
    folders = [folder for folder in dict.fromkeys(map(str, own)) if folder != "/"]
    there = [mount.split(":")[1] for mount in place.mounts]
    missing = [f for f in folders if not any(f == m or f.startswith(m.rstrip("/") + "/") for m in there)]
    return [*place.mounts, *(f"{folder}:{folder}" for folder in missing)]


def command(job: Job) -> str:
    """What nemo-run's srun starts once a rank."""
    return f"bash {shlex.quote(str(job.launch / 'rank.sh'))}"


def setup_lines(job: Job, mounted: Path) -> str:
    """Between nemo-run's own preparations and its srun. `mounted`: its folder, which it mounts into containers."""
    parts = [
        "set +evx",
        *_names(job),
        _FUNCTIONS.format(
            again=_AGAIN,
            stop=_STOP,
            patience=_SERVERS_END_S,
            requeue=_requeue(job),
            requeue_s=_REQUEUE_S,
            pause_s=_REQUEUE_PAUSE_S,
        ),
        "trap end_of_job EXIT",
        "trap 'terminated=1; exit 143' TERM",
        *(_chain_check(job) if job.link > 1 else ()),
        'rm -f "$LAUNCH/outcome" "$LAUNCH/servers.stop"',
        *(_setup(job) if job.site.setup else ()),
        *_exports(job),
        _here_document(job.launch / "rank.sh", _rank_script(job)),
        _every_node_sees(job, mounted),
        *(_servers(job) if job.shape.servers is not None else ()),
    ]
    return "\n\n" + "\n".join(parts) + "\n"


_FUNCTIONS = """
export LENS_MEGATRON_MEETING=$LAUNCH/meeting.$life  # where rank 0 says on which port it is to be met
export LENS_MEGATRON_NOTICE=$LAUNCH/notice.$life  # is there once Slurm has announced the time limit

outcome() {{ echo "$1" > "$LAUNCH/outcome.partial" && mv "$LAUNCH/outcome.partial" "$LAUNCH/outcome"; }}

requeue() {{  # the controller may be away, as while it is restarted
  give_up=$((SECONDS + {requeue_s}))
  while :; do
    outcome "unfinished $life"
    if scontrol requeue "$SLURM_JOB_ID"; then sleep 60; break; fi  # Slurm ends this job meanwhile
    outcome "unfinished unqueued $life"  # the time limit may come before the next attempt
    [ $SECONDS -lt $give_up ] || {{ echo "error: Slurm did not queue the job again for {requeue_s} s" >&2; break; }}
    sleep {pause_s}
  done
  exit {again}
}}

end_of_job() {{
  code=$?
  trap - EXIT TERM
  set +e
  if [ -n "$terminated" ]; then  # Slurm ends the whole job; whether it is queued again is up to Slurm
    outcome "unfinished $life"
    exit $code
  fi
  preempted=""
  case "$(scontrol -o show job "$SLURM_JOB_ID")" in
    *" PreemptTime=None "*) ;;
    *" JobState=RUNNING "*" PreemptTime="*) preempted=1 ;;  # in its grace time: no time for the servers
  esac
  if [ -n "$servers" ]; then
    touch "$LAUNCH/servers.stop"
    [ -n "$preempted" ] || for second in $(seq {patience}); do kill -0 "$servers" 2> /dev/null || break; sleep 1; done
    kill "$servers" 2> /dev/null
  fi
  told=$(cat "$LAUNCH/told.$life" 2> /dev/null)
  if [ $code -ne 0 ]; then
    if [ -n "$preempted" ] && [ $code -ne 2 ]; then  # who ends within the grace time is not queued again by Slurm
      {requeue}; exit $code
    fi
    case "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %L)" in
      0:00|INVALID|-*) outcome "unfinished $life" ;;  # out of time, and the notice came to nothing
      *) outcome "failed $code $life" ;;
    esac
    exit $code
  fi
  case "$told" in
    {again}) {requeue} ;;
    {stop}) outcome "stopped $life" ;;
    0) outcome "done $life" ;;
    *) outcome "unfinished $life" ;;  # rank 0 had no time to say how it ended
  esac
  exit 0
}}"""


def _requeue(job: Job) -> str:
    if job.links > 1 or not job.site.requeue:
        return 'outcome "unfinished $life"'  # another job goes on
    return "requeue"


def _names(job: Job) -> list[str]:
    return [
        f"RUN={shlex.quote(str(job.run_dir))}",
        'LAUNCH=$RUN/launch; servers=""; terminated=""',
        "life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}",
    ]


def _setup(job: Job) -> list[str]:
    """What fails ends the job, by the rules of `set -e`, for the site's own lines alone: scripts that they source, and the
    functions of modules, may have commands that fail, and are judged by their last one."""
    return [
        """
setup_failed() {
  [ ${#BASH_SOURCE[@]} -le 2 ] || return  # within a sourced script
  trap - ERR
  echo "error: setup: exit code $1 of: $(sed -n "$2{s/^ *//;p}" "$0")" >&2
  exit 2
}
trap 'setup_failed $? $LINENO' ERR  # by its line: $BASH_COMMAND may be within a function of modules""",
        *job.site.setup,
        "trap - ERR",
        *_names(job),  # whatever it made of them
        "",
    ]


def _exports(job: Job) -> list[str]:
    environment = {"OMP_NUM_THREADS": "1", **job.site.env} if job.site.cpus_per_rank is None else job.site.env
    return [
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        "# by Slurm's own address of the first node: names need not resolve, and a container has no scontrol",
        'export MASTER_ADDR=$(scontrol -o show node "$head_node" | sed -n "s/.*NodeAddr=\\([^ ]*\\).*/\\1/p")',
    ]


def _chain_check(job: Job) -> list[str]:
    return [
        f"# job {job.link} of {job.links}: after one that ended the run there is nothing to do",
        'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then case "$(cat "$LAUNCH/outcome" 2> /dev/null)" in',
        '  done*|stopped*) trap - EXIT; echo "the run has ended: $(cat "$LAUNCH/outcome")"; exit 0 ;;',
        '  failed*) trap - EXIT; echo "error: the job before failed: $(cat "$LAUNCH/outcome")"; exit 1 ;;',
        "esac; fi",
    ]


def _rank_script(job: Job) -> str:
    launch, work_dir = shlex.quote(str(job.launch)), shlex.quote(str(job.work_dir))
    return f"""# one rank of the trainer
life=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}
notice() {{ touch {launch}/notice.$life; }}
trap notice USR1  # Slurm's, before the time limit; it may come before the program can hear it
trap : TERM  # the program ends itself in order
(trap "" USR1; cd {work_dir} && exec {_program(job.site, job)} train --continue {launch}/run.yaml) &
program=$!
while :; do
  wait $program
  code=$?
  kill -0 $program 2> /dev/null || break  # it runs on: a signal to this shell ended the wait
done
wait $program  # once more: a signal that came just before its end hid its code
last=$?
[ $last = 127 ] || code=$last  # 127 also of a shell that gives it only once
case $code in  # done, or told to end: no failure, and no reason for srun to kill the other ranks
  0|{_AGAIN}|{_STOP}) if [ "$SLURM_PROCID" = 0 ]; then echo $code > {launch}/told.$life; fi; exit 0 ;;
esac
exit $code"""


def _program(place: Place, job: Job) -> str:
    if place.venv is not None:
        return shlex.quote(f"{place.venv.rstrip('/')}/bin/lens-megatron")
    return "lens-megatron" if place.image is not None else f"{shlex.quote(str(job.python))} -m lens_megatron.cli"


def _every_node_sees(job: Job, mounted: Path) -> str:
    """A folder that some node does not have must not look like a hang of the others."""
    looks = [
        f'[ -e "{job.launch}/token" ] || say "does not see {job.run_dir}: run_dir must lie on storage that all nodes share"'
    ]
    if job.site.image is not None:
        looks.append(
            f'[ -d "{mounted}" ] || '
            f'say "does not see {mounted}: NEMORUN_HOME must lie on storage that all nodes share, or be unset"'
        )
    else:
        interpreter = f"{job.site.venv.rstrip('/')}/bin/lens-megatron" if job.site.venv else str(job.python)
        looks.append(
            f'[ -x "{interpreter}" ] || say "has no {interpreter}: venv must lie on storage that all nodes share"'
        )
        looks.append(
            f'[ -d "{job.work_dir}" ] || say "does not see the folder {job.work_dir} that the job was launched from"'
        )
    check = "; ".join(['say() { echo "error: node ${SLURMD_NODENAME:-$(hostname)} $1" >&2; exit 2; }', *looks])
    nodes = job.shape.nodes
    step = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --overlap --chdir=/"
    return f"{step} bash -c {shlex.quote(check)} || exit 2"


def _servers(job: Job) -> list[str]:
    servers = job.shape.servers
    assert servers is not None
    place = job.site.servers_place
    flags = [
        f"--nodes={servers.nodes}",
        f"--ntasks={servers.nodes}",
        "--ntasks-per-node=1",
        f"--relative={servers.first_node}",
        "--overlap",
        "--kill-on-bad-exit=0",  # a lost server is the trainer's to judge
        *([f"--cpus-per-task={cpus * job.shape.ranks_per_node}"] if (cpus := job.site.cpus_per_rank) else ()),
        *_container(job, place),
    ]
    environment = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in place.env.items())
    python = f"{place.venv.rstrip('/')}/bin/python" if place.venv else "python3" if place.image else str(job.python)
    supervise = [
        shlex.quote(python),
        shlex.quote(str(job.launch / "supervisor.py")),
        '"$LENS_MEGATRON_SERVERS"',
        shlex.quote(str(job.launch / "servers.stop")),
        f"--count={servers.count}",
        f"--per-node={servers.per_node}",
        f"--nodes-each={servers.nodes_each}",
    ]
    script = f"""# the SGLang servers of one node
trap "" USR1
{environment}exec {" ".join(supervise)}"""
    log = '--output "$RUN/logs/servers-$life-%n.out"'
    return [
        "export LENS_MEGATRON_SERVERS=$LAUNCH/servers.$life  # where trainer and supervisors leave word for each other",
        _here_document(job.launch / "servers.sh", script),
        f"srun {' '.join(map(shlex.quote, flags))} {log} bash {shlex.quote(str(job.launch / 'servers.sh'))} &",
        "servers=$!",
    ]


def _container(job: Job, place: Place) -> Sequence[str]:
    if place.image is None:
        return ()
    return (
        f"--container-image={place.image}",
        f"--container-mounts={','.join(mounts(job, place))}",
        f"--container-env={','.join(environment_names({}))}",
    )


def _here_document(path: Path, text: str) -> str:
    return f"cat > {shlex.quote(str(path))} <<'END_OF_SCRIPT'\n{text}\nEND_OF_SCRIPT"


def environment_names(environment: Mapping[str, str]) -> list[str]:
    """For pyxis, which lets the image's own values win unless a name is listed."""
    return [*environment, "MASTER_ADDR", "LENS_MEGATRON_MEETING", "LENS_MEGATRON_NOTICE", "LENS_MEGATRON_SERVERS"]
