"""Checkpoints: a resumed run equals an uninterrupted one, in the same layout bit by bit; and nothing half-written shows."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lens_megatron.checkpoints import CheckpointConfig, latest, newest_first, read_manifest
from lens_megatron.mcore.hf_companions import companions_of
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.mcore.stored_dtypes import BY_NAME
from tests.checkpoints_tools.payloads import (
    planted_in_an_object,
    planted_in_common,
    planted_in_index,
    unpickle_carelessly,
)
from tests.distributed import checkpoint_cases as cases
from tests.distributed.pool import WorkerPool

LAYOUTS = {
    "1": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2 vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
    "dp2": (2, ParallelConfig()),
    "dp3": (3, ParallelConfig()),
    "ep2": (2, ParallelConfig(ep=2)),
    "tp2 pp2": (4, ParallelConfig(tp=2, pp=2)),
    "tp2 dp2": (4, ParallelConfig(tp=2)),
    "tp2 ep2": (2, ParallelConfig(tp=2, ep=2)),
    "ep2 pp2": (4, ParallelConfig(ep=2, pp=2)),
    "ep4": (4, ParallelConfig(ep=4)),
}
# kind, layout that saves, layouts that resume
JOURNEYS = [
    ("qwen3_tied", "tp2", ["tp2", "pp2"]),
    ("qwen3_tied", "dp2", ["dp2", "1"]),
    ("qwen3_tied", "pp2 vpp2", ["pp2 vpp2", "tp2", "dp2"]),
    ("llama", "tp2 pp2", ["tp2 pp2", "1"]),
    ("llama", "1", ["1", "tp2 dp2"]),
    ("qwen3_moe", "ep2", ["ep2", "1", "ep4", "tp2"]),
    ("qwen3_moe", "tp2", ["tp2", "pp2", "cp2"]),
    ("qwen3_moe", "tp2 ep2", ["tp2 ep2", "ep2 pp2"]),
]
EACH = [(kind, start, end) for kind, start, ends in JOURNEYS for end in ends]


@pytest.fixture(scope="module")
def saved(workers: Any, hf_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """saved(kind, layout): a checkpoint after 2 of 4 steps, and every rank's answer after the 4."""

    @functools.cache
    def get(kind: str, layout: str) -> tuple[Path, list[cases.Answer]]:
        world, parallel = LAYOUTS[layout]
        target = tmp_path_factory.mktemp("run") / "step_000002"
        return target, workers(world).run(cases.uninterrupted, hf_folder(kind), parallel, target)

    return get


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert set(found) == set(expected)
    assert found
    return max(
        float((found[name].float() - value.float()).abs().max() / value.float().abs().max().clamp_min(1e-7))
        for name, value in expected.items()
    )


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@pytest.mark.parametrize(("kind", "start", "end"), EACH, ids=[f"{k}: {s} -> {e}" for k, s, e in EACH])
def test_resumed_equals_uninterrupted(
    kind: str, start: str, end: str, saved: Any, workers: Any, hf_folder: Any
) -> None:
    source, straight = saved(kind, start)
    world, parallel = LAYOUTS[end]
    answers = workers(world).run(cases.resumed, hf_folder(kind), parallel, source)
    error = difference(answers[0].weights, straight[0].weights)
    assert error == 0.0 if start == end else error < 1e-4
    assert answers[0].rates == straight[0].rates[2:]
    assert len(set(straight[0].rates)) == 4
    assert all(answer.extra == cases.EXTRA for answer in answers)
    if start == end:
        for answer, expected in zip(answers, straight, strict=True):
            assert set(answer.random) >= {"cpu", "tracker.model-parallel-rng"}
            assert all(torch.equal(answer.random[name], state) for name, state in expected.random.items())


def test_a_checkpoint_of_plain_layers_is_resumed_with_those_of_transformer_engine(
    saved: Any, workers: Any, hf_folder: Any
) -> None:
    source, straight = saved("qwen3_moe", "ep2")
    world, parallel = LAYOUTS["ep2"]
    answers = workers(world).run(cases.resumed_with_states_of_the_engine, hf_folder("qwen3_moe"), parallel, source)
    assert difference(answers[0].weights, straight[0].weights) == 0.0


@pytest.mark.parametrize(("kind", "layout"), [("llama", "dp2"), ("qwen3_tied", "dp3"), ("qwen3_moe", "dp3")])
def test_buffers_in_several_buckets(kind: str, layout: str, workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    """Megatron-Core loses count where it fills a bucket up; on a GPU every run with data parallelism has several."""
    world, parallel = LAYOUTS[layout]
    for filled, before, after in workers(world).run(
        cases.saved_and_loaded_in_buckets, hf_folder(kind), parallel, tmp_path / "step_000002"
    ):
        assert filled > 0, "no bucket is filled up: this test cannot fail"
        assert before == after


@pytest.mark.parametrize(("kind", "layout"), [("qwen3_tied", "dp2"), ("qwen3_moe", "ep2"), ("llama", "tp2 dp2")])
def test_ranks_agree_on_what_is_saved(kind: str, layout: str, workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    """Ranks that hold nothing of the optimizer's state have no empty one either."""
    world, parallel = LAYOUTS[layout]
    said = workers(world).run(cases.warnings_of_a_save, hf_folder(kind), parallel, tmp_path / "step_000001")
    assert said == [[]] * world


def test_saving_changes_nothing(saved: Any, workers: Any, hf_folder: Any) -> None:
    _, straight = saved("qwen3_moe", "ep2")
    unsaved = workers(2).run(cases.uninterrupted, hf_folder("qwen3_moe"), LAYOUTS["ep2"][1], None)
    assert difference(unsaved[0].weights, straight[0].weights) == 0.0


@pytest.mark.parametrize("spoil", ["exp_avg", "exp_avg_sq", "shared step", "schedule"])
def test_a_state_not_restored_would_be_noticed(spoil: str, saved: Any, workers: Any, hf_folder: Any) -> None:
    source, straight = saved("qwen3_tied", "dp2")
    answers = workers(1).run(cases.resumed, hf_folder("qwen3_tied"), ParallelConfig(), source, spoil)
    assert difference(answers[0].weights, straight[0].weights) > 1e-3


def test_every_parameter_has_a_step_of_its_own(saved: Any, workers: Any, hf_folder: Any) -> None:
    source, _ = saved("qwen3_moe", "ep2")
    for (count, distinct), value in workers(2).run(cases.moments, hf_folder("qwen3_moe"), LAYOUTS["ep2"][1], source):
        assert count == distinct > 0
        assert value == 2.0


def test_asynchronous_save_holds_the_weights_of_its_moment(workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    folder = hf_folder("llama")
    answers = workers(2).run(cases.save_while_training, folder, ParallelConfig(), tmp_path)
    for _, finished, early, visible in answers:
        assert finished
        assert early == [False] * 4
        assert not visible
    found = workers(2).run(cases.weights_of, folder, ParallelConfig(tp=2), tmp_path / "step_000002")
    assert difference(found[0], answers[0][0].weights) == 0.0


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("file", ["__1_0.distcp", "common.pt", ".metadata.tmp", "manifest.json"])
def test_full_disk(file: str, asynchronous: bool, saved: Any, workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    copied(saved("qwen3_tied", "dp2")[0], tmp_path / "step_000001")
    folder = hf_folder("qwen3_tied")
    errors = workers(2).run(cases.disk_full, folder, ParallelConfig(), tmp_path / "step_000002", file, asynchronous)
    assert len(set(errors)) == 1
    assert "No space left on device" in errors[0]
    assert "step_000002" in errors[0]
    assert "\n" not in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert workers(1).run(cases.resume, folder, ParallelConfig(), tmp_path)[0][2] == "step_000001"


def test_killed_while_saving(workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    folder = hf_folder("qwen3_tied")
    root = tmp_path / "checkpoints"
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    store = tempfile.mktemp(prefix="lens-test-store-")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.distributed.checkpoint_cases",
        str(folder),
        str(root),
        store,
    ]
    ranks = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert ranks[0].stdout is not None
        assert [ranks[0].stdout.readline().strip() for _ in range(2)] == ["1", "2"]
        while not any(root.glob("step_*.partial/__0_0.distcp")):  # in the middle of writing
            assert ranks[0].poll() is None
    finally:
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.wait()
    whole, broken = newest_first(root)
    assert not broken
    assert whole[0].manifest.step >= 2
    answer = workers(1).run(cases.resume, folder, ParallelConfig(), root)[0]
    assert answer == (whole[0].manifest.step, {"step": whole[0].manifest.step}, whole[0].folder.name, (), ())
    assert not list(root.glob("*.partial"))


@pytest.mark.parametrize("how", ["truncated", "garbage", "missing", "manifest"])
def test_damaged_newest_is_passed_over(how: str, saved: Any, workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    source, _ = saved("qwen3_tied", "tp2")
    copied(source, tmp_path / "step_000002")
    newer = copied(source, tmp_path / "step_000004")
    tensors = newer / "__1_0.distcp"
    if how == "truncated":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif how == "garbage":  # of the right size: only reading finds out
        tensors.write_bytes(b"\x5a" * tensors.stat().st_size)
    elif how == "missing":
        tensors.unlink()
    else:
        os.truncate(newer / "manifest.json", 40)
    tree = json.loads((newer / "manifest.json").read_text()) if how != "manifest" else None
    if tree is not None:
        (newer / "manifest.json").write_text(json.dumps({**tree, "step": 4}))
    folder = hf_folder("qwen3_tied")
    for answer in workers(2).run(cases.resume, folder, ParallelConfig(pp=2), tmp_path):
        step, extra, name, passed_over, unreadable = answer
        assert (step, extra, name) == (2, cases.EXTRA, "step_000002")
        assert len(passed_over) == 1
        assert "step_000004" in passed_over[0]
        assert "\n" not in passed_over[0]
        assert unreadable == ((newer,) if how == "garbage" else ())  # the others look like nothing that could be kept
    assert newer.is_dir()
    shutil.rmtree(tmp_path / "step_000002")
    kind, message = workers(2).run(cases.resume, folder, ParallelConfig(pp=2), tmp_path)[1]
    assert kind == "RunError"  # never a silent new start
    assert "step_000004" in message


def two_checkpoints(saved: Any, root: Path) -> Path:
    for step in (2, 4):
        folder = copied(saved("qwen3_tied", "tp2")[0], root / f"step_{step:06d}")
        tree = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**tree, "step": step}))
    return folder


@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize(
    ("rank", "file", "read"),
    [
        *((0, file, False) for file in ("manifest.json", "common.pt", "extra.json", "metadata.json", ".metadata")),
        *((rank, "*.distcp", read) for rank in (0, 1) for read in (False, True)),
        *((1, ".metadata", read) for read in (False, True)),
    ],
)
def test_an_error_of_the_file_system_is_no_damage(
    rank: int, file: str, read: bool, times: int, saved: Any, workers: Any, hf_folder: Any, tmp_path: Path
) -> None:
    newer = two_checkpoints(saved, tmp_path)
    error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    before = sorted(tmp_path.rglob("*"))
    answers = workers(2).run(
        cases.resume_meeting, error, times, hf_folder("qwen3_tied"), ParallelConfig(pp=2), tmp_path, rank, file, read
    )
    assert answers == [answers[0]] * 2
    if times == 1:  # it passed
        assert answers[0] == (4, cases.EXTRA, "step_000004", (), ())
    else:
        kind, words = answers[0]
        assert kind == "RunError"
        where, _, then = words.partition(" cannot be read: ")
        assert (Path(where).parent == newer and Path(where).match(file)) or (read and where == str(newer))
        assert then == "Stale file handle; nothing was changed: see to the file system, then resume"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_one_rank_alone_does_not_find_is_no_damage(
    saved: Any, workers: Any, hf_folder: Any, tmp_path: Path
) -> None:
    """Its node has not mounted the file system, or remembers an older folder."""
    newer, folder = two_checkpoints(saved, tmp_path), hf_folder("qwen3_tied")
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    meeting = functools.partial(cases.resume_meeting, error)
    for kind, words in workers(2).run(meeting, 99, folder, ParallelConfig(pp=2), tmp_path, 1, ".metadata", False):
        assert kind == "RunError"
        assert words.startswith(f"{newer / '.metadata'} cannot be read: No such file or directory; nothing was changed")


def test_being_told_to_end_while_reading_is_no_damage(saved: Any, workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    two_checkpoints(saved, tmp_path)
    meeting = functools.partial(cases.resume_meeting, SystemExit(143))
    folder, layout = hf_folder("qwen3_tied"), ParallelConfig(pp=2)
    others, its_own = workers(2).run(meeting, 1, folder, layout, tmp_path, 1, "*.distcp", False)
    assert its_own == ("SystemExit", 143)
    assert others == ("RunError", "rank 1 was interrupted: SystemExit: 143")


def test_an_index_that_names_a_file_that_is_not_there_is_damage(
    saved: Any, workers: Any, hf_folder: Any, tmp_path: Path
) -> None:
    newer = two_checkpoints(saved, tmp_path)
    tree = json.loads((newer / "manifest.json").read_text())
    del tree["files"]["__1_0.distcp"]
    (newer / "manifest.json").write_text(json.dumps(tree))
    (newer / "__1_0.distcp").unlink()
    for answer in workers(2).run(cases.resume, hf_folder("qwen3_tied"), ParallelConfig(pp=2), tmp_path):
        assert answer[0] == 2 and answer[4] == (newer,)
        assert "says that tensors are in __1_0.distcp, which is not there" in answer[3][0]


def test_saver_keeps_newest_and_best(workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    folder = hf_folder("llama")
    config = CheckpointConfig(every=1, keep=1, keep_best="success")
    weights = workers(2).run(cases.save_steps, folder, ParallelConfig(tp=2), tmp_path, 4, config)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000004"]
    found = latest(tmp_path)
    assert found is not None
    assert found.folder.name == "step_000004"
    loaded = workers(2).run(cases.weights_of, folder, ParallelConfig(pp=2), found.folder)[0]
    assert difference(loaded, weights) == 0.0


def test_manifest_and_companions(saved: Any, hf_folder: Any) -> None:
    source, _ = saved("llama", "tp2 pp2")
    manifest = read_manifest(source)
    assert (manifest.step, manifest.dtype, manifest.world_size, manifest.optimizer) == (2, "float32", 4, True)
    assert manifest.layout == {"tp": 2, "pp": 2, "vpp": 1, "cp": 1, "ep": 1, "etp": 2, "dp": 1}
    on_disk = {p.relative_to(source).as_posix(): p.stat().st_size for p in source.rglob("*") if p.is_file()}
    assert on_disk.pop("manifest.json") > 0
    assert manifest.files == on_disk
    beside = companions_of(hf_folder("llama"), BY_NAME["float32"])  # beside an HF copy of the same weights
    assert json.loads(beside["config.json"])["eos_token_id"] is not None
    assert beside == {path.name: path.read_bytes() for path in (source / "hf").iterdir()}


@pytest.mark.parametrize("problem", ["other model", "format", "no manifest", "nothing there"])
def test_refusals(problem: str, saved: Any, workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    source = copied(saved("qwen3_tied", "dp2")[0], tmp_path / "step_000002")
    kind, expected = "qwen3_tied", ""
    if problem == "other model":
        kind, expected = "llama", "another model: family"
    elif problem == "format":
        tree = json.loads((source / "manifest.json").read_text())
        (source / "manifest.json").write_text(json.dumps({**tree, "format": "lens-megatron/99"}))
        expected = "lens-megatron/99"
    elif problem == "no manifest":
        (source / "manifest.json").unlink()
        expected = "no manifest.json"
    else:
        source, expected = tmp_path / "elsewhere", "no such folder"
    errors = workers(2).run(cases.refusal, hf_folder(kind), ParallelConfig(tp=2), source)
    assert len(set(errors)) == 1
    assert errors[0].startswith("UsageError: ")
    assert expected in errors[0]
    assert "\n" not in errors[0]


@pytest.mark.parametrize("plant", [planted_in_index, planted_in_common, planted_in_an_object])
def test_planted_payloads_are_not_run(plant: Any, saved: Any, workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    root, proof = tmp_path / "run", tmp_path / "proof"
    copied(saved("qwen3_tied", "dp2")[0], root / "step_000001")  # an older one: an attack is not passed over
    source = copied(saved("qwen3_tied", "dp2")[0], root / "step_000002")
    expected = plant(source, proof)
    folder = hf_folder("qwen3_tied")
    for error in workers(2).run(cases.refusal, folder, ParallelConfig(tp=2), source):
        assert error.startswith("UsageError: ") and expected in error and "\n" not in error
    for kind, message in workers(2).run(cases.resume, folder, ParallelConfig(tp=2), root):
        assert kind == "UsageError" and expected in message
    assert not proof.exists()
    unpickle_carelessly(source, plant)
    assert proof.exists()


def test_bf16_keeps_master_weights(workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    source = tmp_path / "step_000002"
    folder = hf_folder("qwen3_tied")
    at_save, straight, again = workers(2).run(cases.two_dtypes, folder, ParallelConfig(tp=2), source)[0]
    assert difference(again, straight) == 0.0
    assert json.loads((source / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    # a run in fp32 goes on from the master weights, of which bf16 held the rounded copy
    masters = workers(2).run(cases.weights_of, folder, ParallelConfig(pp=2), source)[0]
    assert difference({name: tensor.bfloat16() for name, tensor in masters.items()}, at_save) == 0.0
    assert difference(masters, at_save) > 0.0


def test_weights_only(workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    source = tmp_path / "step_000002"
    trained, *others = workers(2).run(cases.weights_only, hf_folder("qwen3_moe"), LAYOUTS["ep2"][1], source)[0]
    assert [difference(other, trained) for other in others] == [0.0] * 3
    assert not read_manifest(source).optimizer


def test_staged_tensors_are_copies_when_training_goes_on(workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    for copy, expected in ((True, 1.0), (False, 0.0)):  # without a copy the change shows: the test can fail
        target = tmp_path / f"copy {copy}"
        target.mkdir()
        found = workers(1).run(cases.staged_copy, hf_folder("llama"), target, copy)[0]
        assert found.tolist() == [expected] * 3


def test_an_error_of_one_rank_is_every_ranks(workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    folder = hf_folder("llama")
    for errors in workers(2).run(cases.failing_twice, folder, tmp_path / "step_000002"):
        assert len(errors) == 2
        assert errors[0] == errors[1]
        assert "rank 1: ZeroDivisionError" in errors[0]
    assert not list(tmp_path.iterdir())
    for errors in workers(2).run(cases.error_of_rank_0, folder):
        assert "Invalid access pattern" in errors[0]
        assert "not JSON serializable" in errors[1]
        assert not any("\n" in error for error in errors)


RESCUES = {
    "all fail": ["step_000004 was being written when the run failed, and is complete"],
    "one rank fails": [],
    "a writer hangs": [],
    "a writer fails": ["step_000004 was being written when the run failed: .*rank 1: No space left on device.*"],
}


@pytest.mark.parametrize("how", RESCUES)
def test_a_save_under_way_when_the_run_fails(how: str, workers: Any, tmp_path: Path) -> None:
    answers = workers(2).run(cases.rescued, tmp_path, how)
    assert [shown for shown, _, _ in answers] == [how == "all fail"] * 2
    (_, said, _), _ = answers
    assert len(said) == len(RESCUES[how])
    assert all(re.fullmatch(words, text) for words, text in zip(RESCUES[how], said, strict=True))
    assert all(took < 5.0 for _, _, took in answers)
    whole, broken = newest_first(tmp_path)
    assert [found.manifest.step for found in whole] == [4] * (how == "all fail") and not broken
    assert list(tmp_path.glob("*.partial")) == [tmp_path / "step_000004.partial"] * (
        how in ("one rank fails", "a writer hangs")
    )


def test_hf_copies(workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    folder = hf_folder("qwen3_tied")
    root = tmp_path / "hf"
    later = root / "step_000009"  # of a run that went back to an earlier checkpoint: not counted, not touched
    later.mkdir(parents=True)
    said = f"old HF copies stay, the run goes on: {root / 'step_000001'}: not removed: Permission denied"
    answers = workers(2).run(cases.hf_copy, folder, ParallelConfig(tp=2), root, steps=5, stuck="step_000001")
    assert answers == [("", [said]), ("", [])]  # once
    left = ["step_000001", "step_000004", "step_000005", "step_000009"]
    assert sorted(path.name for path in root.iterdir()) == left
    written = load_file(root / "step_000005" / "model.safetensors")
    assert difference(written, load_file(folder / "model.safetensors")) == 0.0
    (tmp_path / "file").write_text("")
    errors = workers(2).run(cases.hf_copy, folder, ParallelConfig(pp=2), tmp_path / "file" / "hf")
    assert all("the HF copy was not written (Not a directory); free space" in error for error, _ in errors)


def test_a_copy_that_takes_longer_than_a_collective_may(hf_folder: Any, tmp_path: Path) -> None:
    """A large model, a slow disk: the second stage waits for its turn, then for the end of it."""
    pool = WorkerPool(2, collective_s=4.0)
    try:
        answers = pool.run(
            cases.hf_copy, hf_folder("qwen3_tied"), ParallelConfig(pp=2), tmp_path / "hf", steps=1, pause_s=6.0
        )
    finally:
        pool.close()
    assert answers == [("", [])] * 2
