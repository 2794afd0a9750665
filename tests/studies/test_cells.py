"""Grids into cells; bad ones refused in one line before anything starts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lens_megatron import strict
from lens_megatron.cli import main
from lens_megatron.config import RunConfig
from lens_megatron.errors import UsageError
from lens_megatron.model_spec import load_model_config
from lens_megatron.reporting.runs import Run
from lens_megatron.run_folder import RunFolder
from lens_megatron.studies.config import Target, load_study
from lens_megatron.studies.page import study_page
from lens_megatron.studies.planned import plan_of_cell
from lens_megatron.studies.running import last_words
from lens_megatron.studies.states import CellState, check_same_cells, write_state
from lens_megatron.studies.table import collect, hours_to_target

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "model": "qwen3-8b-base",
    "run_dir": "runs/unused",
    "algorithm": "lens",
    "data": {"train": "prompts.jsonl", "prompts_per_step": 128},
    "parallel": {"tp": 4},
    "memory": {"recompute": "full"},
}


def study(folder: Path, **tree: Any) -> Path:
    (folder / "RUN.yaml").write_text(yaml.safe_dump(BASE))
    path = folder / "STUDY.yaml"
    (folder / "site.yaml").write_text("partition: gpu\n")
    common = {"run": "RUN.yaml", "study_dir": str(folder / "study"), "where": "simulated", "gpu": "h100"}
    path.write_text(yaml.safe_dump({**common, **tree}, sort_keys=False))
    return path


def test_axes_are_crossed_and_arms_keep_their_own(tmp_path: Path) -> None:
    arms = [
        {"name": "grpo", "set": {"algorithm": "grpo"}},
        {"name": "tau half", "set": {"algorithm": {"preset": "lens", "rescue": {"tau": 0.5}}}, "grid": {"seed": [7]}},
    ]
    found = load_study(study(tmp_path, grid={"seed": [0, 1], "optimizer.lr": [1e-6, 2e-6]}, arms=arms))
    assert [cell.name for cell in found.cells] == [
        "grpo-seed0-lr1e_06", "grpo-seed0-lr2e_06", "grpo-seed1-lr1e_06", "grpo-seed1-lr2e_06",
        "tau_half-seed7-lr1e_06", "tau_half-seed7-lr2e_06",
    ]  # fmt: skip
    last = found.cells[-1].config
    assert (last.seed, last.optimizer.lr, last.algorithm.rescue.tau) == (7, 2e-6, 0.5)
    assert found.cells[0].config.algorithm.rescue.mode == "none"
    assert len({cell.config.run_dir for cell in found.cells}) == 6
    # a section of an arm, and one of its keys as an axis: the key is set within the section
    arms = [{"name": "a", "set": {"algorithm": {"preset": "lens", "rescue": {"gamma": 0.05}}}}]
    (cell,) = load_study(study(tmp_path, grid={"algorithm.rescue.tau": [0.25]}, arms=arms)).cells
    assert (cell.config.algorithm.rescue.tau, cell.config.algorithm.rescue.gamma) == (0.25, 0.05)


def test_nodes_become_data_parallel_ranks_and_weak_batches_grow(tmp_path: Path) -> None:
    cells = load_study(study(tmp_path, grid={"nodes": [2, 6], "scaling": ["strong", "weak"]})).cells
    seen = {cell.name: (cell.config.parallel.dp, cell.config.data.prompts_per_step, cell.processes) for cell in cells}
    assert seen == {
        "nodes2-strong": (4, 128, 16),
        "nodes2-weak": (4, 128, 16),
        "nodes6-strong": (12, 128, 48),
        "nodes6-weak": (12, 384, 48),
    }


COLOCATED = {"placement": "colocated", "rollout.engine": "sglang"}


@pytest.mark.parametrize(
    ("changes", "servers"),
    [
        ({"rollout": {"engine": "sglang", "servers": 8}, "parallel.dp": 2}, [8, 24]),
        ({"rollout": {"engine": "sglang", "servers": 8}}, [8, 24]),  # of the fewest nodes, as the batch
        ({"rollout": {"engine": "sglang", "servers": 3}, "parallel.dp": 4}, [1, 4]),
        ({**COLOCATED, "rollout.servers": 6}, [6, 6]),  # the study's own
        ({"rollout": {"engine": "sglang", "servers": 8}, "placement": "disaggregated"}, [8, 8]),
    ],
)
def test_nodes_become_colocated_servers_too(tmp_path: Path, changes: dict[str, Any], servers: list[int]) -> None:
    path = study(tmp_path, grid={"nodes": [1, 3]})
    run = strict.apply_overrides(BASE, ["placement=colocated"])
    given = changes if "rollout.servers" in changes else {}
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()]
    (tmp_path / "RUN.yaml").write_text(yaml.safe_dump(run if given else strict.apply_overrides(run, overrides)))
    tree = {**yaml.safe_load(path.read_text()), "arms": [{"name": "a", "set": given}]}
    path.write_text(yaml.safe_dump(tree))
    assert [cell.config.rollout.servers for cell in load_study(path).cells] == servers


def test_a_cell_is_planned_with_the_servers_that_it_starts(tmp_path: Path) -> None:
    arms = [{"name": f"{servers}", "set": {**COLOCATED, "rollout.servers": servers}} for servers in (2, 8, 16)]
    found = load_study(study(tmp_path, grid={"nodes": [1]}, arms=arms))
    few, all_ = (plan_of_cell(found, cell).seconds["generate"] for cell in found.cells[:2])
    assert few > 1.5 * all_
    with pytest.raises(UsageError, match="16 servers of 1 GPUs do not fit on the trainer's 8"):
        plan_of_cell(found, found.cells[2])


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"grid": {"seed": []}}, "grid.seed: an empty list"),
        ({"grid": {"nodes": [0]}}, "grid.nodes: whole numbers above 0"),
        ({"grid": {"scaling": ["weak"]}}, "grid.scaling: needs the axis nodes"),
        ({"grid": {"nodes": [1], "scaling": ["thick"]}}, "strong or weak (got 'thick')"),
        ({"grid": {"parallel.tp": [1, 3]}}, "cell tp3: parallel.tp: tp=3 does not divide"),
        ({"grid": {"nodes": [1], "parallel.tp": [16]}}, "cell nodes1-tp16"),
        ({"grid": {"optimiser.lr": [1]}}, "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ({"grid": {"seed": [1, 1]}}, "two cells are the same: seed1"),
        ({"grid": {"algorithm": ["lenz"]}}, "no preset 'lenz'; did you mean 'lens'?"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "a name twice: 'a'"),
        ({"grid": {"arm": ["a"]}}, "arms have a list of their own"),
        (
            {"arms": [{"name": "a", "set": {"seed": 1}}], "grid": {"seed": [1]}},
            "arm a sets seed, which is an axis too: give the arm `grid: {seed: [...]}`",
        ),
        ({"where": "moon"}, "where: "),
        ({"gird": {}}, "unknown key 'gird'; did you mean 'grid'?"),
        ({"run": "nowhere.yaml"}, "nowhere.yaml: No such file"),
        ({"at_once": 0}, "at_once and gpus_a_node are at least 1"),
        ({"grid": {"seed": list(range(200)), "steps": list(range(1, 100))}}, "more than 10000 cells"),
        ({"where": "local", "grid": {"seed": [1]}}, "cell seed1: "),  # its weights are not here
        ({"where": "slurm", "site": "nowhere.yaml"}, "nowhere.yaml: No such file"),
        ({"gpu": None}, "simulated cells need a kind of GPU: set gpu, one of a100, "),
        ({"gpu": "h1000"}, "h1000: not known; one of a100, "),
        ({"calibration": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_a_bad_grid_is_one_line_and_starts_nothing(
    tree: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(study(tmp_path, **tree))
    for more in ([], ["--list"]):
        assert main(["study", path, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "study").exists()


def test_cells_that_were_run_with_other_values_are_not_taken_for_these(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(study(tmp_path, arms=[{"name": "x", "set": {"steps": 3}}]))]) == 0
    assert main(["study", str(study(tmp_path, arms=[{"name": "x", "set": {"steps": 4}}]))]) == 2
    assert "cell x was run with other values (steps=3)" in capsys.readouterr().err


def test_cells_that_were_run_from_another_base_are_not_taken_for_these(tmp_path: Path) -> None:
    path = study(tmp_path, grid={"seed": [0]})
    found = load_study(path)
    (cell,) = found.cells
    RunFolder.create(str(cell.run_dir)).begin(strict.to_tree(RunConfig, cell.config))
    write_state(found, cell, CellState("done", "", 1.0, cell.overrides))

    def check(**changes: Any) -> None:
        (tmp_path / "RUN.yaml").write_text(yaml.safe_dump({**BASE, **changes}))
        now = load_study(path)
        check_same_cells(now, now.cells)

    check()
    check(timeout_s=900.0, checkpoint={"every": 5})  # no result's matter
    with pytest.raises(UsageError, match=r"run from another RUN.yaml \(steps was 300 and is 7 and 1 more"):
        check(optimizer={"lr": 0.5}, steps=7)
    with pytest.raises(UsageError, match=r"memory.recompute was full and is none"):
        check(memory={"recompute": "none"})
    write_state(found, cell, CellState("failed", "out of memory", 1.0, cell.overrides))
    check(memory={"recompute": "none"})  # it is run again, with more room


def test_a_simulated_cell_that_does_not_fit_fails_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study(tmp_path, grid={"nodes": [1, 4], "memory.recompute": ["none", "full"], "parallel.tp": [1]})
    assert main(["study", str(path)]) == 1
    out = capsys.readouterr().out
    assert "failed cell nodes1-recomputenone-tp1: out of memory: a trainer GPU of stage 0 needs" in out
    assert "nodes4-recomputefull-tp1: simulated" in out
    page = (tmp_path / "study" / "study.html").read_text()
    assert "SIMULATED" in page and 'id="measured"' not in page
    assert main(["study", str(path), "--list"]) == 0
    assert "failed     nodes1-recomputenone-tp1" in capsys.readouterr().out


def test_the_example_is_a_study() -> None:
    cells = load_study(ROOT / "examples" / "scaling" / "STUDY.yaml").cells
    assert len(cells) == 20 and {cell.where for cell in cells} == {"simulated"}
    assert all(cell.config.rollout.servers == cell.processes for cell in cells)  # as planned, so run


def test_cost_until_a_target_is_reached() -> None:
    metrics = [
        {"step": n + 1, "success": value, "time/step": 36.0} for n, value in enumerate([0.1, 0.9, 0.1, 0.6, 0.8])
    ]
    run = Run("r", {}, {}, metrics)
    assert hours_to_target(run, Target(0.9), 100) == pytest.approx(2 * 36 * 100 / 3600)
    assert hours_to_target(run, Target(0.7, window=2), 100) == pytest.approx(5 * 36 * 100 / 3600)
    assert hours_to_target(run, Target(0.95), 100) is None
    assert hours_to_target(run, None, 100) is None


def test_the_last_words_of_a_run(tmp_path: Path) -> None:
    output = tmp_path / "log.txt"
    output.write_text("step 1\nfailed: the disk is full\nTrackers closed\n")
    assert last_words(output, 1) == "failed: the disk is full"
    output.write_text("step 1\n\n")
    assert last_words(output, -9) == "ended by SIGKILL: step 1"
    output.write_text("")
    assert last_words(output, 3) == "exit code 3"


def test_cells_on_slurm_are_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the launchers' own functions replaced: a real Slurm runs in tests/slurm."""
    from launchers import inputs, queue, slurm
    from lens_megatron.studies import running

    monkeypatch.setattr(running, "_POLL_S", 0.01)
    submitted: list[tuple[str, list[str], bool]] = []
    ends = {"seed0": ("done", ""), "seed1": ("failed", "error: no such rule"), "seed2": ("unfinished", "")}

    class Job:
        def __init__(self, name: str) -> None:
            self.name = name

            self.looks = 0

        def status(self) -> queue.JobStatus:
            state, reason = ends[self.name]
            self.looks += 1
            if self.looks < 3:
                return queue.JobStatus("running", "17") if self.looks == 1 else queue.JobStatus("unknown", silent=True)
            return queue.JobStatus(state, "17", reason=reason)  # type: ignore[arg-type]

    def submit(
        run: Path, overrides: list[str], site: Path, name: str, *, resume: bool, tell: Callable[[str], None]
    ) -> Job:
        assert site == tmp_path / "site.yaml" and run == tmp_path / "RUN.yaml"
        submitted.append((name, overrides, resume))
        for line in ("nodes    1", "warning: one generate for all"):
            tell(line)
        return Job(name)

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(inputs, "find_models", lambda run, view: load_model_config(run.model))
    queued = {"seed0"}  # the job of an earlier, interrupted study
    monkeypatch.setattr(queue.Handle, "of", lambda folder: Job(folder.name) if folder.name in queued else None)
    path = study(tmp_path, where="slurm", site="site.yaml", at_once=3, grid={"seed": [0, 1, 2]})
    assert main(["study", str(path)]) == 1
    out = capsys.readouterr().out
    assert "seed0: done" in out and "seed0: job 17 of an earlier start goes on, running\n" in out
    assert "seed1: warning: one generate for all\n" in out and "seed1: submitted job 17\n" in out
    assert "nodes  " not in out
    assert "failed cell seed1: job 17 failed: error: no such rule" in out
    assert "failed cell seed2: job 17 unfinished" in out
    assert sorted(name for name, _, _ in submitted) == ["seed1", "seed2"]  # what is queued is not submitted twice
    run_dir = tmp_path / "study" / "cells" / "seed1"
    assert {name: overrides for name, overrides, _ in submitted}["seed1"] == ["seed=1", f'run_dir="{run_dir}"']


def test_a_cell_whose_job_can_never_start_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When Slurm says so for a while; one that says it once in passing runs. The job is taken from the queue."""
    from launchers import inputs, queue, slurm
    from lens_megatron.studies import running

    monkeypatch.setattr(running, "_POLL_S", 0.01)
    monkeypatch.setattr(running, "_HOPELESS_S", 0.1)
    never = queue.JobStatus("pending", "17", reason="Slurm says PartitionNodeLimit: too many nodes", never=True)
    cancelled: list[str] = []

    class Job:
        def __init__(self, name: str) -> None:
            self.name = name
            self.looks = 0

        def status(self) -> queue.JobStatus:
            self.looks += 1
            if self.name == "seed0" or self.looks == 3:
                return never
            return queue.JobStatus("done" if self.looks > 20 else "pending", "18", reason="Slurm says Priority")

        def cancel(self) -> None:
            cancelled.append(self.name)

    monkeypatch.setattr(slurm, "submit", lambda run, overrides, site, name, *, resume, tell: Job(name))
    monkeypatch.setattr(inputs, "find_models", lambda run, view: load_model_config(run.model))
    path = study(tmp_path, where="slurm", site="site.yaml", at_once=2, grid={"seed": [0, 1]})
    assert main(["study", str(path)]) == 1
    out = capsys.readouterr().out
    assert "failed cell seed0: job 17 cancelled: Slurm says PartitionNodeLimit: too many nodes" in out
    assert out.count("seed1: job 18 pending: Slurm says Priority\n") == 1  # it says so in between too
    assert "seed1: done" in out and cancelled == ["seed0"]


def test_an_interrupted_study_leaves_its_jobs_and_takes_what_became_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launchers import inputs, queue, slurm

    jobs: dict[str, str] = {}
    interrupted = False

    class Job:
        def __init__(self, name: str) -> None:
            self.name = name

        def status(self) -> queue.JobStatus:
            nonlocal interrupted
            if len(jobs) == 2 and not interrupted:
                interrupted = True
                os.kill(os.getpid(), signal.SIGINT)
            return queue.JobStatus(jobs[self.name], self.name)  # type: ignore[arg-type]

    def submit(
        run: Path, overrides: list[str], site: Path, name: str, *, resume: bool, tell: Callable[[str], None]
    ) -> Job:
        assert name not in jobs
        jobs[name] = "running"
        return Job(name)

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(inputs, "find_models", lambda run, view: load_model_config(run.model))
    monkeypatch.setattr(queue.Handle, "of", lambda folder: Job(folder.name) if folder.name in jobs else None)
    arms = [{"name": "a", "set": {"steps": 3}}, {"name": "b"}]
    common = {"where": "slurm", "site": "site.yaml", "at_once": 2}
    path = study(tmp_path, **common, arms=arms)
    start = time.monotonic()
    assert main(["study", str(path)]) == 130
    assert time.monotonic() - start < 4, "a study waits for its jobs after Ctrl-C"
    assert main(["study", str(path), "--list"]) == 0
    assert capsys.readouterr().out.count("begun") == 2
    # the jobs under way are of these values and no others
    changed = study(tmp_path, **common, arms=[{"name": "a", "set": {"steps": 4}}, {"name": "b"}])
    assert main(["study", str(changed)]) == 2
    assert "cell a was run with other values (steps=3)" in capsys.readouterr().err
    jobs.update(a="done", b="done")
    assert main(["study", str(study(tmp_path, **common, arms=arms))]) == 0


def test_it_does_not_start_inside_a_job_of_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lens_megatron.studies.running import clean_environment

    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="start it by itself"):
        clean_environment()


def test_the_legend_has_no_none(tmp_path: Path) -> None:
    """An axis at its default, and one whose name is also a column that nothing is known of yet."""
    found = load_study(study(tmp_path, grid={"steps": [2, 4], "reference": [None, "qwen3-8b-base"]}))
    page = study_page(found, collect(found))
    assert "qwen3-8b-base<" in page and "steps None" not in page and "reference None" not in page
