"""`lens-megatron grade`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lens_megatron.cli import main
from tests.rewards.pairs import PAIRS


def _write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_back_with_reward_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = PAIRS[::9]
    file = _write(tmp_path / "in.jsonl", [{"gold": g, "prediction": p, "extra": k} for k, g, p, _ in chosen])
    out = tmp_path / "out.json"
    assert main(["grade", str(file), "--json", str(out)]) == 0
    tree = json.loads(out.read_text())
    assert [row["reward"] for row in tree["rows"]] == [float(right) for *_, right in chosen]
    assert [row["extra"] for row in tree["rows"]] == [kind for kind, *_ in chosen]
    assert tree["verdicts"]["correct"] == sum(right for *_, right in chosen)
    assert tree["reward"] == pytest.approx(sum(right for *_, right in chosen) / len(chosen))

    capsys.readouterr()
    assert main(["grade", str(file)]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == tree["rows"]
    assert f"{len(chosen)} judged" in printed.err

    lines = tmp_path / "out.jsonl"
    assert main(["grade", str(file), "--json", str(lines)]) == 0
    assert [json.loads(line) for line in lines.read_text().splitlines()] == tree["rows"]


def test_numbers_nothing_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"gold": 5, "prediction": 5.0}, {"gold": 5, "prediction": None}, {"gold": "5", "prediction": "5.2"}]
    file = _write(tmp_path / "in.jsonl", rows)
    assert main(["grade", str(file), "default.kind=numeric", "default.tolerance=0.1", "workers=1"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["verdict"] for row in printed] == ["correct", "unparsable", "correct"]
    assert printed[1]["note"] == "no answer"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("{", "in.jsonl:1: not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"gold": "1"}', "no 'prediction'"),
        ('{"gold": ["1"], "prediction": "1"}', "text or a number"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_files_that_cannot_be_graded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    assert main(["grade", str(tmp_path / "in.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and message in error and len(error.splitlines()) == 1


def test_a_file_that_is_not_there_and_a_setting_that_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grade", str(tmp_path / "missing.jsonl")]) == 2
    file = _write(tmp_path / "in.jsonl", [{"gold": "1", "prediction": "1"}])
    assert main(["grade", str(file), "worker=3"]) == 2
    assert "did you mean 'workers'" in capsys.readouterr().err
