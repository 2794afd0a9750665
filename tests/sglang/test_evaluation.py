"""The whole row of Table 1 through a real SGLang server that `eval` starts: greedy, the words of the embedded engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lens_megatron import cli, strict
from lens_megatron.rollout.sglang_config import ServerConfig
from tests.data.tokenizers import byte_level
from tests.evaluation.small_benchmarks import write_benchmarks
from tests.test_score import save_model

from .server import LONGEST, cpu_config

pytestmark = pytest.mark.sglang


def answers(out: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    (path,) = (out / "answers").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {(line["set"], line["id"], line["index"]): line for line in lines}


def test_a_whole_row_by_a_server_that_is_started_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    save_model(model, len(byte_level(model)) + 7, max_position_embeddings=LONGEST)
    write_benchmarks(tmp_path / "data")
    server = strict.to_tree(ServerConfig, cpu_config())
    words = ["eval", str(model), "--benchmarks", "all", "--data", str(tmp_path / "data"), "--limit", "2"]
    words += ["--samples", "1", "temperature=0", "max_response_tokens=8", "rewards.workers=1"]
    for engine, more in (("embedded", []), ("sglang", [f"server={yaml.safe_dump(server, default_flow_style=True)}"])):
        assert cli.main([*words, "--engine", engine, "--out", str(tmp_path / engine), *more]) == 0
        assert "AIME25" in capsys.readouterr().out
    ours, theirs = answers(tmp_path / "embedded"), answers(tmp_path / "sglang")
    assert len(ours) == 14 and ours.keys() == theirs.keys()
    different = [key for key in ours if ours[key]["response"] != theirs[key]["response"]]
    assert different == []
    assert len({line["response"] for line in ours.values()}) > 3  # or there was nothing to tell apart
