"""`lens-megatron launch`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

SUMMARY = "train on this machine or on Slurm, through nemo-run"
EXAMPLE = "lens-megatron launch slurm RUN.yaml --site SITE.yaml parallel.dp=16 site.time=12:00:00"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("where", choices=("local", "slurm"))
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of RUN.yaml; site.key=value: of SITE.yaml")
    parser.add_argument("--site", metavar="SITE.yaml", type=Path, help="account, partition, container, ...")
    parser.add_argument("--name", default="", help="of the job; default: the run folder's")
    parser.add_argument("--resume", action="store_true", help="go on with the run that run_dir holds")
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, each going on where the one before ended"
    )
    parser.add_argument("--wait", action="store_true", help="return when the run has ended: 0 if it is done")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")


def run(args: argparse.Namespace) -> int:
    if args.where == "local":
        return _local(args)
    from launchers import nemo, slurm
    from launchers.summary import summary

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    if args.dry_run:
        jobs, _, config = slurm.plan(Path(args.run), args.overrides, args.site, args.name, args.chain)
        for line in summary(jobs[0], config):
            tell(line)
        print("\n".join(nemo.batch_script(job) for job in jobs), end="")
        return 0
    handle = slurm.submit(
        Path(args.run), args.overrides, args.site, args.name, links=args.chain, resume=args.resume, tell=tell
    )
    print(
        f"submitted {'job' if len(handle.jobs) == 1 else 'jobs'} {' '.join(handle.jobs)}; run folder {handle.run_dir}"
    )
    print(f"lens-megatron status {shlex.quote(str(handle.run_dir))} says how it goes", flush=True)
    return _wait(handle) if args.wait else 0


def _local(args: argparse.Namespace) -> int:
    from launchers import local

    if args.dry_run:
        print(shlex.join(["lens-megatron", *local.command(Path(args.run), args.overrides, args.resume)]))
        return 0
    local.launch(Path(args.run), args.overrides, args.name, resume=args.resume)
    return 0


def _wait(handle: object) -> int:
    from launchers.queue import Handle
    from lens_megatron.errors import RunError

    assert isinstance(handle, Handle)
    ended = handle.wait(tell=lambda line: print(line, flush=True))
    if ended.state != "done":
        raise RunError(f"job {ended.job} {ended.state}{': ' + ended.reason if ended.reason else ''}")
    return 0
