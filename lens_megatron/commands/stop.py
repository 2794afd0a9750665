"""`lens-megatron stop`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "end a run after its step, with a checkpoint to go on from"
EXAMPLE = "lens-megatron stop runs/lens-8b"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--now", action="store_true", help="cancel its Slurm jobs at once, without a checkpoint")


def run(args: argparse.Namespace) -> int:
    from launchers.queue import Handle
    from lens_megatron import stopping
    from lens_megatron.errors import RunError, UsageError
    from lens_megatron.run_folder import RunFolder

    folder = RunFolder(args.run)
    handle = Handle.of(args.run)
    if not folder.path.is_dir() or not (folder.holds_run() or handle is not None or folder.in_use()):
        raise UsageError(f"{args.run}: no run to stop")
    if args.now:
        if handle is None:
            raise UsageError(f"{args.run}: --now cancels jobs of Slurm, and this run has none")
        handle.cancel()
        print(f"cancelled {' '.join(handle.jobs)}")
    elif handle is not None and not (now := handle.status()).over:
        handle.stop()
        if now.silent:
            raise RunError(f"{now.reason}: a running job ends after its step, one that waits may still be queued")
        print(f"{args.run} ends after its step; jobs that had not started are cancelled")
    elif folder.in_use():
        stopping.ask_to_stop(args.run)
        print(f"{args.run} ends after its step")
    else:
        raise UsageError(f"{args.run}: the run is not running")
    return 0
