"""`lens-megatron score`, end to end: against the HF models, cut over two processes, and on bad input."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lens_megatron import cli
from tests.data.tokenizers import byte_level
from tests.tiny_models import hf_config

PROMPTS = [
    "How many clips did Natalia sell altogether in April and May?",
    "Größe <b>48</b> & friends: how many?",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
]
GAMMA = 0.2
KEYS = ("ids", "tokens", "policy_logprobs", "reference_logprobs", "scores", "eligible", "deleted", "purified_ids")


def save_model(folder: Path, vocabulary: int, noise: float = 0.0, kind: str = "qwen3", **shape: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = hf_config(kind)
    config.update({"vocab_size": vocabulary, "num_hidden_layers": 2, **shape})
    if "layer_types" in config.to_dict():
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15, generator=generator)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Folders:
    policy: Path
    reference: Path
    prompts: Path  # PROMPTS as JSONL
    vocabulary: int


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("score")
    for name, noise in (("policy", 0.02), ("reference", 0.0)):
        tokenizer = byte_level(root / name)
        vocabulary = len(tokenizer) + 7  # padded as published models are, to a number that divides by nothing
        save_model(root / name, vocabulary, noise)
    with (root / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in PROMPTS)
    return Folders(root / "policy", root / "reference", root / "prompts.jsonl", vocabulary)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    outside = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {
        **{k: v for k, v in os.environ.items() if k not in outside},
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-m", "lens_megatron.cli", "score", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@dataclass(frozen=True)
class Outcome:
    tree: Any
    page: str
    output: str


@pytest.fixture(scope="module")
def outcome(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcome]:
    """outcome(tp): what the command gave for PROMPTS, run once."""
    made: dict[int, Outcome] = {}

    def get(tp: int) -> Outcome:
        if tp not in made:
            out = tmp_path_factory.mktemp(f"tp{tp}")
            result = command(
                *("--model", str(folders.policy), "--reference", str(folders.reference)),
                *("--prompts", str(folders.prompts), "--gamma", str(GAMMA)),
                *("--json", str(out / "s.json"), "--html", str(out / "s.html")),
                *([] if tp == 1 else [f"parallel.tp={tp}"]),
                *("tokens_per_microbatch=64", "purification.noise_floor=1e-5"),
            )
            assert result.returncode == 0, result.stderr
            made[tp] = Outcome(
                json.loads((out / "s.json").read_text()), (out / "s.html").read_text(encoding="utf-8"), result.stdout
            )
        return made[tp]

    return get


def hf_logprobs(folder: Path, ids: list[int]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def test_json_equals_the_hf_models(outcome: Callable[[int], Outcome], folders: Folders) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders.policy)
    tree = outcome(1).tree
    assert len(tree["prompts"]) == len(PROMPTS)
    for text, prompt in zip(PROMPTS, tree["prompts"], strict=True):
        assert set(KEYS) <= set(prompt)
        ids = prompt["ids"]
        message = [{"role": "user", "content": text}]
        written = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert ids == tokenizer(written, add_special_tokens=False)["input_ids"]
        assert "".join(prompt["tokens"]).replace("\ufffd", "") in written or "�" in "".join(prompt["tokens"])
        for key in ("tokens", "policy_logprobs", "reference_logprobs", "scores", "eligible"):
            assert len(prompt[key]) == len(ids)
        for key, folder in (("policy_logprobs", folders.policy), ("reference_logprobs", folders.reference)):
            assert prompt[key][0] is None
            assert prompt[key][1:] == pytest.approx(hf_logprobs(folder, ids), abs=1e-4)
        assert prompt["scores"][0] is None
        for score, policy, reference in list(
            zip(prompt["scores"], prompt["policy_logprobs"], prompt["reference_logprobs"], strict=True)
        )[1:]:
            assert score == pytest.approx(abs(policy - reference), abs=1e-6)


def test_what_is_deleted(outcome: Callable[[int], Outcome], folders: Folders) -> None:
    """The highest scores among the tokens of the user's question, a share gamma of them."""
    for text, prompt in zip(PROMPTS, outcome(1).tree["prompts"], strict=True):
        eligible = [place for place, good in enumerate(prompt["eligible"]) if good]
        question = "".join(prompt["tokens"][place] for place in eligible)
        assert question == text or "�" in question
        assert not prompt["eligible"][0]
        deleted = prompt["deleted"]
        assert deleted == sorted(set(deleted))
        assert math.floor(GAMMA * len(eligible)) <= len(deleted) <= math.ceil(GAMMA * len(eligible))
        ranked = sorted(eligible, key=lambda place: -prompt["scores"][place])
        assert set(deleted) == set(ranked[: len(deleted)])
        assert prompt["purified_ids"] == [token for place, token in enumerate(prompt["ids"]) if place not in deleted]
        assert 0 < len(deleted) < len(eligible)


def test_two_processes_agree(outcome: Callable[[int], Outcome]) -> None:
    for one, two in zip(outcome(1).tree["prompts"], outcome(2).tree["prompts"], strict=True):
        for key in ("ids", "tokens", "eligible", "deleted", "purified_ids"):
            assert one[key] == two[key]
        for key in ("policy_logprobs", "reference_logprobs", "scores"):
            assert one[key][1:] == pytest.approx(two[key][1:], abs=1e-4)
    assert outcome(1).output.count("deleted") == outcome(2).output.count("deleted"), "rank 0 alone prints"


def test_the_page_strikes_out_what_is_deleted(outcome: Callable[[int], Outcome]) -> None:
    page, prompts = outcome(1).page, outcome(1).tree["prompts"]
    paragraphs = re.findall(r'<p class="heatmap">(.*?)</p>', page, flags=re.DOTALL)
    assert len(paragraphs) == len(prompts)
    for paragraph, prompt in zip(paragraphs, prompts, strict=True):
        struck = [unescape(text) for text in re.findall(r"<del [^>]*>(.*?)</del>", paragraph, flags=re.DOTALL)]
        assert struck == [prompt["tokens"][place] for place in prompt["deleted"]]
        assert len(re.findall(r"<(?:span|del) ", paragraph)) == len(prompt["ids"])
    assert "<b>48" not in page, "a prompt's markup is text"
    assert not re.search(r"(?:src|href)=", page), "readable without a network"


def test_the_terminal_shows_every_token_with_both_logprobs(outcome: Callable[[int], Outcome]) -> None:
    output = outcome(1).output
    for prompt in outcome(1).tree["prompts"]:
        for policy, reference in list(zip(prompt["policy_logprobs"], prompt["reference_logprobs"], strict=True))[1:]:
            assert re.search(rf"{policy:.4f}\D+{reference:.4f}", output)


def no_model(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a process group or a model was made for input that is wrong")


@pytest.fixture
def refuse(folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command on bad input in this process; its one line. No process group, worker or model may be made."""
    from lens_megatron import workers
    from lens_megatron.mcore import runtime

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lens_megatron.endings.on_signals", lambda *_: None)  # of this process, which goes on
    monkeypatch.setattr(runtime, "initialize", no_model)
    monkeypatch.setattr(workers, "run_workers", no_model)

    def run(*arguments: str, model: Path | str = "", reference: Path | str = "", text: str = "Hello") -> str:
        capsys.readouterr()
        policy, other = str(model or folders.policy), str(reference or folders.reference)
        code = cli.main(["score", "--model", policy, "--reference", other, "--prompt", text, *arguments])
        output = capsys.readouterr()
        lines = output.err.strip().splitlines()
        assert code == 2, output.err
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert output.out == ""
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["paralel.tp=2"], ["paralel", "did you mean", "parallel"]),
        (["parallel.tpp=2"], ["tpp", "tp"]),
        (["purification.gama=0.1"], ["gama", "gamma"]),
        (["parallel.tp=two"], ["parallel.tp"]),
        (["parallel.tp"], ["parallel.tp"]),
        (["parallel.tp=3"], ["parallel.tp", "does not divide the 8 attention heads", "1, 2, 4"]),
        (["parallel.pp=3"], ["parallel.pp", "does not divide 2 layers"]),
        (["parallel.ep=2"], ["parallel.ep", "no experts"]),
        (["--gamma=1.5"], ["gamma", "1.5"]),
        (["--scope=all"], ["question", "prompt"]),
        (["--json=/nowhere/at/all.json"], ["/nowhere/at/all.json"]),
    ],
)
def test_bad_arguments(arguments: list[str], words: list[str], refuse: Callable[..., str]) -> None:
    line = refuse(*arguments)
    for word in words:
        assert word in line


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_result_that_could_not_be_written_is_refused_before_scoring(
    option: str, refuse: Callable[..., str], tmp_path: Path
) -> None:
    assert f"{tmp_path}: is a folder" in refuse(option, str(tmp_path))
    assert "its folder does not exist" in refuse(option, str(tmp_path / "none" / "f"))
    (tmp_path / "kept").write_text("")
    (tmp_path / "kept").chmod(0o444)
    if not os.access(tmp_path / "kept", os.W_OK):  # root writes everywhere
        assert "kept: cannot be written" in refuse(option, str(tmp_path / "kept"))


def test_a_process_that_went_away_is_one_line(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    monkeypatch.setattr("lens_megatron.scoring.score_prompts", lost)
    monkeypatch.setattr("lens_megatron.endings.on_signals", lambda *_: None)
    models = ["--model", str(folders.policy), "--reference", str(folders.reference)]
    assert cli.main(["score", *models, "--prompt", "Hello"]) == 1
    words = capsys.readouterr().err
    assert len(words.splitlines()) == 1 and "another process of the run went away" in words


def test_a_model_that_is_not_there(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere" in refuse(model=tmp_path / "nowhere")
    assert "nowhere" in refuse(reference=tmp_path / "nowhere")


def copy(folder: Path, target: Path, shards: int = 1) -> Path:
    """A folder of links to `folder`'s files, its weights cut into `shards` real files with an index."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).symlink_to(path)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    weight_map = {name: files[place % shards] for place, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def test_an_unsupported_family(refuse: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.policy, tmp_path / "mamba")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba2", "architectures": ["Mamba2"]}))
    for line in (refuse(model=folder), refuse(reference=folder)):
        assert "mamba2" in line
        assert "qwen3" in line, "says what is supported"


def test_a_reference_of_another_shape(refuse: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    byte_level(tmp_path / "deeper")
    save_model(tmp_path / "deeper", folders.vocabulary, num_hidden_layers=3)
    line = refuse(reference=tmp_path / "deeper")
    assert str(tmp_path / "deeper") in line
    assert "same shape" in line


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda shard: shard.unlink(), "missing"),
    "truncated shard": (lambda shard: os.truncate(shard, shard.stat().st_size - 10), "truncated"),
    "garbage": (lambda shard: shard.write_bytes(b"\xff" * 100), "not a safetensors file"),
}


@pytest.mark.parametrize("whose", ["model", "reference"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights(damage: str, whose: str, refuse: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.policy, tmp_path / "damaged", shards=2)
    harm, word = DAMAGE[damage]
    harm(folder / "model-00002-of-00002.safetensors")
    line = refuse(**{whose: folder})
    assert "model-00002-of-00002.safetensors" in line
    assert word in line


def test_damaged_weights_met_by_two_processes_are_one_line(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.policy, tmp_path / "damaged", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    result = command(
        *("--model", str(folder), "--reference", str(folders.reference), "--prompt", "Hello", "parallel.tp=2")
    )
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "model-00002-of-00002.safetensors" in lines[0]
