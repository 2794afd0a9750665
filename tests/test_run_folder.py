"""The run folder: nothing is overwritten, nothing is half there, and what is read is what was written."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout_table import ROLLOUT_COLUMNS, RolloutRow
from lens_megatron.run_folder import RunFolder


def row(**changes: object) -> RolloutRow:
    first = RolloutRow(
        step=3,
        prompt_id="p0",
        source="toy",
        answer="4",
        question="2 + 2?",
        index=0,
        purified=False,
        origin="failure",
        trained=True,
        prompt_tokens=[1, 2, 3],
        prompt_pieces=["2", " +", " 2"],
        scores=[None, 0.5, 0.25],
        deleted=[1],
        roll_tokens=[1, 2, 3],
        response=[7, 8],
        response_text="</script> 4",
        reward=0.1,
        success=False,
        finish="stop",
        advantage=None,
        weight=0.625,
        behaviour_logprobs=[-0.5, -0.25],
        proximal_logprobs=None,
        weight_version=2,
    )
    return dataclasses.replace(first, **changes)  # type: ignore[arg-type]


def test_create_makes_the_folders_and_refuses_a_second_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a" / "run")
    assert folder.logs.is_dir() and folder.checkpoints.is_dir()
    RunFolder.create(folder.path).close()  # still empty
    folder.write_config({"steps": 2})
    with pytest.raises(UsageError, match="already holds a run: go on with it by --resume, or choose another"):
        RunFolder.create(folder.path)


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "rollouts/step_000001.parquet", "checkpoints/step_000001/x"]
)
def test_anything_of_a_run_is_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(UsageError, match="already holds a run"):
        RunFolder.create(tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_a_launcher_s_logs_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slurm.out").write_text("hello")
    RunFolder.create(tmp_path)
    assert (tmp_path / "logs" / "slurm.out").read_text() == "hello"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"run_dir .*file/run cannot be written: Not a directory; choose another"):
        RunFolder.create(tmp_path / "file" / "run")
    with pytest.raises(UsageError, match="cannot be written"):
        RunFolder.create("/proc/run")


def test_resume_and_open_want_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run to resume: start one without --resume, or with --continue"):
        RunFolder.resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="no such run folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no metrics\.jsonl"):
        RunFolder.open(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_config({})
    resume = f"from lens_megatron.run_folder import RunFolder; RunFolder.resume({str(tmp_path)!r})"
    second = subprocess.run([sys.executable, "-c", resume], capture_output=True, text=True, check=False)
    assert second.returncode != 0 and "in use by another running process" in second.stderr
    folder.close()
    subprocess.run([sys.executable, "-c", resume], check=True)


def test_an_orphan_of_a_killed_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    code = (
        "import os, signal, time; from lens_megatron.run_folder import RunFolder\n"
        f"folder = RunFolder.create({str(tmp_path)!r}); folder.write_config({{}})\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60)\n"
        "print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        process.wait(timeout=60)
        try:
            RunFolder.resume(tmp_path)
        finally:
            os.kill(orphan, 9)


def test_a_resumed_run_keeps_its_first_configuration(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_config({"parallel": {"tp": 2}, "model": "modèle"})
    folder.write_config({"parallel": {"tp": 2}, "model": "modèle"})
    assert not list(tmp_path.glob("config.*.yaml"))
    folder.write_config({"parallel": {"pp": 2}})
    folder.write_config({"parallel": {"pp": 4}})
    assert folder.read_config() == {"parallel": {"pp": 4}}
    assert "tp: 2" in (tmp_path / "config.1.yaml").read_text()
    assert "pp: 2" in (tmp_path / "config.2.yaml").read_text()


def test_kept_configurations_say_until_when(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    for number in range(12):
        folder.begin({"number": number}, 4 * number)
    (tmp_path / "config.of-mine.yaml").write_text("not: ours")
    (tmp_path / "config.3.yaml").write_text("number: 2\n")  # of a version that did not say
    earlier = folder.read_earlier_configs()
    assert earlier == [(None if k == 2 else 4 * (k + 1), {"number": k}) for k in range(11)]
    assert folder.read_config() == {"number": 11}


def test_versions(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_versions(processes=2)
    versions = folder.read_versions()
    assert {"python", "torch", "megatron-core", "transformers", "lens_megatron", "git", "machine"} <= set(versions)
    assert versions["processes"] == 2 and versions["machine"]["cpus"] >= 1


def test_metrics_survive_a_half_written_line_and_are_rewound(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    for step in range(1, 6):
        folder.append_metrics({"step": step, "reward": step / 10, "kl": float("nan")})
        folder.write_rollouts(step, [row(step=step)])
    assert json.loads(folder.metrics_path.read_text().splitlines()[0]) == {"step": 1, "reward": 0.1, "kl": None}
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 6, "rew')
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4, 5]
    resumed = RunFolder.resume(tmp_path)
    resumed.rewind(3)
    resumed.append_metrics({"step": 4, "reward": 1.0})
    assert [(line["step"], line["reward"]) for line in resumed.read_metrics()] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 1.0),
    ]
    assert resumed.rollout_steps() == [1, 2, 3]


def test_a_spoilt_line_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.metrics_path.write_text('{"step": 1}\n{"reward": 1}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2"):
        folder.read_metrics()


texts = st.text(st.characters(codec="utf-8"), max_size=8)
rows = st.builds(
    row,
    prompt_id=texts,
    response_text=texts,
    reward=st.floats(allow_nan=False),
    advantage=st.none() | st.floats(allow_nan=False),
    purified=st.booleans(),
    prompt_pieces=st.lists(texts, max_size=4),
    scores=st.lists(st.none() | st.floats(0, 9, width=32), max_size=4),
    deleted=st.lists(st.integers(0, 9), max_size=3),
    response=st.lists(st.integers(0, 200_000), max_size=4),
    behaviour_logprobs=st.lists(st.floats(-9, 0, width=32), max_size=4),
    proximal_logprobs=st.none() | st.lists(st.floats(-9, 0, width=32), max_size=4),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(rows, max_size=3))
def test_rollouts_are_read_as_written(tmp_path_factory: pytest.TempPathFactory, written: list[RolloutRow]) -> None:
    folder = RunFolder.create(tmp_path_factory.mktemp("run"))
    folder.write_rollouts(12, written)
    assert folder.rollout_steps() == [12]
    assert folder.read_rollout_columns(12) == [dataclasses.asdict(row) for row in written]


def test_columns_of_chosen_prompts(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_rollouts(1, [row(prompt_id="a"), row(prompt_id="b", index=1)])
    assert folder.read_rollout_columns(1, ["prompt_id", "index"], ["b"]) == [{"prompt_id": "b", "index": 1}]
    assert tuple(pq.read_schema(folder.rollouts_path(1)).names) == ROLLOUT_COLUMNS


def test_half_a_surrogate_pair_can_be_stored(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_rollouts(1, [row(response_text="a\ud83d", prompt_pieces=["\udc00"])])
    (back,) = folder.read_rollout_columns(1)
    assert (back["response_text"], back["prompt_pieces"]) == ("a\\ud83d", ["\\udc00"])


def test_a_full_disk_spoils_nothing(tmp_path: Path) -> None:
    """A limit on file size is the full disk that a test can have: a write stops in its middle, as on a real one."""
    folder = RunFolder.create(tmp_path)
    folder.append_metrics({"step": 1, "note": "x" * 3000})
    folder.write_rollouts(1, [row(step=1)])
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    long = row(step=1, response=list(range(5000)), behaviour_logprobs=[-i / 7 for i in range(5000)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(RunError, match=r"metrics\.jsonl: File too large; what was written before is whole"):
            folder.append_metrics({"step": 2, "note": "x" * 3000})
        for step in (1, 2):
            with pytest.raises(RunError, match=rf"step_00000{step}\.parquet: .*File too large"):
                folder.write_rollouts(step, [long])
        with pytest.raises(RunError, match=r"config\.yaml"):
            folder.write_config({"x": "y" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    folder.append_metrics({"step": 2})
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    RunFolder.create(tmp_path).write_config({})
    partial = tmp_path / "rollouts" / ".step_000001.parquet.partial"
    partial.write_text("half")
    RunFolder.resume(tmp_path)
    assert not partial.exists()
