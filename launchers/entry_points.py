"""nemo-run's own way to the same calls.

    python -m launchers.entry_points config=RUN.yaml site=SITE.yaml [overrides='["steps=10"]'] [--yes] [--dryrun]

and without a site on this machine. `slurm` and `task` are for experiments of one's own: the executor that a run needs,
and what it runs once a rank. They prepare the run folder as `submit` does.

    with nemo_run.Experiment("mine") as experiment:
        experiment.add(task("RUN.yaml"), executor=slurm("RUN.yaml", "SITE.yaml"), name="train")
        experiment.run(detach=True)
"""

# no `from __future__ import annotations`: nemo-run reads the types of `train`, and cannot read them as text

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers import local, nemo
from launchers.site import split_overrides
from launchers.slurm import plan, prepare, submit
from lens_megatron.config import load_run

nemo_run = nemo.import_nemo_run()
from nemo_run.cli import RunContext  # noqa: E402  (a clear word first, when there is no nemo-run)


def train(ctx: RunContext, config: str, site: str = "", name: str = "", overrides: list[str] = []) -> None:  # noqa: B006
    """Train RUN.yaml (config): on Slurm when a site is given, else on this machine."""
    if ctx.dryrun:
        print(nemo.batch_script(plan(Path(config), overrides, Path(site), name)[0][0]) if site else config)
    elif site:
        handle = submit(Path(config), overrides, Path(site), name)
        print(f"submitted job {' '.join(handle.jobs)}; run folder {handle.run_dir}")
    else:
        local.launch(Path(config), overrides, name)


entry_point: Any = nemo_run.cli.entrypoint(namespace="lens", name="train", type="experiment")(train)


def slurm(config: str, site: str, name: str = "", overrides: Sequence[str] = ()) -> Any:
    """An executor for one run: nodes, ranks and servers are the run's, so that it fits no other."""
    (job,) = prepare(Path(config), overrides, Path(site), name)
    return nemo.executor(job)


def task(config: str, overrides: Sequence[str] = ()) -> Any:
    of_run, _ = split_overrides(overrides)
    run_dir = Path(load_run(Path(config), of_run).run_dir).absolute()
    return nemo_run.Script(path=str(run_dir / "launch" / "rank.sh"))


if __name__ == "__main__":
    nemo_run.cli.main(entry_point)
