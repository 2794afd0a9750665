"""What a run reads is looked for before its job is queued, where that can be known."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers.inputs import View
from launchers.site import SiteConfig
from launchers.slurm import plan
from lens_megatron.errors import UsageError
from tests.loop.runs import run_tree, write_run, write_task

LOOP = Path(__file__).parents[1] / "loop"  # where its reward function is


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def run(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(LOOP), str(LOOP.parents[1])]))
    return write_run(tmp_path, run_tree(task, tmp_path / "run"))


def site(**keys: Any) -> SiteConfig:
    return SiteConfig(**{"gpus_per_node": 2, **keys})


ABSENT = [
    ("data.train=nofile.jsonl", "data.train: nofile.jsonl: no such file"),
    ("data.train=data/nofile.jsonl", "data.train: data/nofile.jsonl: no such file"),  # no hub id
    ("evaluation.benchmarks=[nofile.jsonl]", "evaluation.benchmarks: nofile.jsonl: no such file"),
    ("evaluation={benchmarks: [amc23], data: nofolder}", "evaluation.benchmarks: nofolder/amc23.jsonl: No such file"),
    ("evaluation.benchmarks=[amc32]", "evaluation.benchmarks: benchmark 'amc32': not one of all"),
]
FUNCTION = "rewards.default.function=nope:score"


@pytest.mark.parametrize(("override", "message"), [*ABSENT, (FUNCTION, "rewards: reward function nope:score: cannot")])
def test_what_is_not_there_is_refused(run: Path, override: str, message: str) -> None:
    plan(run, [], site())
    with pytest.raises(UsageError) as caught:
        plan(run, [override], site())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    plan(run, [override], site(check_inputs=False))


def lines(count: int, answer: str = "1", **more: str) -> str:
    return "".join(json.dumps({"prompt": f"How many? {n}", "answer": answer, **more}) + "\n" for n in range(count))


MATH = "rewards={default: {kind: math}, workers: 1}"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", [], "rows.jsonl: the data set is empty"),
        (lines(3), [], "rows.jsonl: data.prompts_per_step is 4, and there are 3 rows: lower it"),
        (lines(8).replace("prompt", "problem"), [], "rows.jsonl:1: "),
        (lines(8), ["data.answer_key=solution"], "rows.jsonl:1: "),
        (lines(8)[:-9], [], "rows.jsonl:8: "),
        (
            lines(8, source="mine"),
            ["rewards={default: null, sources: {theirs: {kind: math}}}"],
            "rows.jsonl: no reward for source 'mine'",
        ),
        (lines(8, answer="it depends on " * 9), [MATH], "rows.jsonl: no response could be right"),
    ],
)
def test_rows_are_read(run: Path, text: str, overrides: list[str], message: str) -> None:
    """As `train` would: a wrong column, a rule that fits no answer."""
    Path("rows.jsonl").write_text(lines(8))
    plan(run, ["data.train=rows.jsonl", MATH], site())
    Path("rows.jsonl").write_text(text)
    with pytest.raises(UsageError) as caught:
        plan(run, ["data.train=rows.jsonl", *overrides], site())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    plan(run, ["data.train=rows.jsonl", *overrides], site(check_inputs=False))


def test_a_hub_id_is_left_to_the_job(run: Path) -> None:
    plan(run, ["data.train=owner/name", "evaluation.benchmarks=[amc23]"], site())


def test_a_container_is_seen_through_its_mounts(run: Path, tmp_path: Path) -> None:
    (tmp_path / "host" / "sets").mkdir(parents=True)
    (tmp_path / "host" / "sets" / "train.jsonl").write_text(lines(4))
    container = site(image="lens.sqsh", mounts=[f"{tmp_path}/host:/data", "/not/on/this/machine:/data/other"])
    for override in (
        "data.train=/data/sets/train.jsonl",
        "data.train=/data/other/nofile.jsonl",  # its mount comes from where this machine does not see
        "data.train=/in/the/image.jsonl",
        FUNCTION,  # of the image
    ):
        plan(run, [override], container)
    for override, message in (
        ("data.train=/data/sets/nofile.jsonl", f"data.train: {tmp_path}/host/sets/nofile.jsonl: no such file"),
        ABSENT[0],  # the working folder is always mounted
    ):
        with pytest.raises(UsageError) as caught:
            plan(run, [override], container)
        assert str(caught.value).replace(f"{tmp_path}/here/", "").startswith(message)


def test_the_innermost_mount_holds_a_path(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    where = site(image="x", mounts=[f"{tmp_path}:/data", f"{tmp_path}/in:/data/deep"])
    view = View(where, Path("/run"), Path("/work"))
    assert view.here("/data/deep/a") == tmp_path / "in" / "a"
    assert view.here("/data/deep/../a") == tmp_path / "a"
    assert view.here("/database") is None


def test_functions_are_looked_for_by_the_interpreter_that_will_run_them(run: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    override = "rewards.default.function=of_the_venv:score"
    plan(run, [override], site(venv=str(venv)))  # on the nodes alone
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{venv}:$PYTHONPATH" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(UsageError, match="cannot import of_the_venv"):
        plan(run, [override], site(venv=str(venv)))
    (venv / "of_the_venv.py").write_text("def score(response, answer, source):\n    return 1.0\n")
    plan(run, [override], site(venv=str(venv)))
    path = os.pathsep.join([str(tmp_path / "mine"), os.environ["PYTHONPATH"]])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nope.py").write_text("def score(response, answer, source):\n    return 1.0\n")
    plan(run, [FUNCTION], site(env={"PYTHONPATH": path}))


def test_models_are_looked_for_in_the_sites_cache(
    run: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    repository = tmp_path / "hf" / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(task / "model", repository / "snapshots" / ("0" * 40))
    tiny, home = "model=owner/tiny", {"HF_HOME": f"{tmp_path}/hf"}
    with pytest.raises(UsageError, match="model 'owner/tiny': not a folder, not in the Hugging Face cache, and not a"):
        plan(run, [tiny], site())
    plan(run, [tiny], site(env=home))
    plan(run, [tiny], site(env={"HF_HUB_CACHE": f"{tmp_path}/hf/hub", "HF_HOME": "/nowhere"}))
    plan(run, [tiny], site(image="x", env={"HF_HOME": "/hf"}, mounts=[f"{tmp_path}/hf:/hf"]))
    published = ["model=qwen3-8b-base", "update.tokens_per_microbatch=4096"]
    message = f"model 'qwen3-8b-base': no folder, and no weights in the Hugging Face cache {tmp_path}/hf/hub; download"
    for where in (site(env=home), site(image="x", env={"HF_HOME": "/hf"}, mounts=[f"{tmp_path}/hf:/hf"])):
        with pytest.raises(UsageError) as caught:
            plan(run, published, where)
        assert str(caught.value).startswith(message)
    plan(run, published, site(image="x", env={"HF_HOME": "/hf"}))  # where nobody here can see
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "ours"))  # the job inherits it
    with pytest.raises(UsageError, match=f"cache {tmp_path}/ours"):
        plan(run, published, site(env=home))


def test_weights_are_looked_into(run: Path, task: Path, tmp_path: Path) -> None:
    """As headers alone tell; those of a reference too, and in a container through its mounts."""
    broken = tmp_path / "host" / "broken"
    shutil.copytree(task / "model", broken)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    container = site(image="x", mounts=[f"{tmp_path}/host:/models"])
    for key in ("model", "reference"):
        for where, place in ((site(), broken), (container, Path("/models/broken"))):
            with pytest.raises(UsageError, match=f"{broken}/model.safetensors: .*truncated"):
                plan(run, [f"{key}={place}", "algorithm=lens"], where)
    plan(run, [f"reference={broken}", "algorithm=gspo"], site())  # which has no use for one
    other = tmp_path / "host" / "other"
    shutil.copytree(task / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 123.0}))
    with pytest.raises(UsageError, match=f"reference {other}: not of the same shape as {task}/model"):
        plan(run, [f"reference={other}", "algorithm=lens"], site())


def test_a_reference_that_nobody_here_can_see_is_left_to_the_job(run: Path, task: Path, tmp_path: Path) -> None:
    hidden = site(image="x", mounts=["/not/on/this/machine:/models"], env={"HF_HOME": "/in/the/image"})
    plan(run, ["reference=/models/ref", "algorithm=lens"], site(image="x", mounts=["/not/on/this/machine:/models"]))
    plan(run, ["reference=/in/the/image/ref", "algorithm=lens"], site(image="x"))
    plan(run, [f"model={task}/model", "reference=owner/name", "algorithm=lens"], hidden)
    with pytest.raises(UsageError, match="model 'owner/name': not a folder, not in the Hugging Face cache"):
        plan(run, ["reference=owner/name", "algorithm=lens"], site())
    plan(run, ["reference=owner/name", "algorithm=lens"], site(check_inputs=False))


def test_a_model_is_looked_for_as_training_will(
    run: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shipped name is no folder; ~ is no home; what a mount holds is not looked for outside of it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(task / "model", Path("qwen3-8b-base"))
    shutil.copytree(task / "model", tmp_path / "tiny")
    container = site(image="x", mounts=[f"{tmp_path}/host:{tmp_path}/tiny"])
    (tmp_path / "host").mkdir()
    refused = [
        ("qwen3-8b-base", site(), "no weights in the Hugging Face cache"),
        ("qwen3-8b-base", site(image="x"), "no weights in the Hugging Face cache"),
        ("~/tiny", site(), "not a folder"),
        ("~/tiny", site(image="x", mounts=[f"{tmp_path}:{tmp_path}"]), "not a folder"),
        (str(tmp_path / "tiny"), container, f"{tmp_path}/host/config.json: No such file"),
    ]
    for name, where, message in refused:
        with pytest.raises(UsageError, match=message):
            plan(run, [f"model={name}", "update.tokens_per_microbatch=4096"], where)
    shutil.copytree(task / "model", Path("mine"))
    plan(run, ["model=mine"], site())
    plan(run, ["model=mine"], site(image="x"))  # the working folder is always mounted
