"""Reading rows: every format gives the same rows, and a bad row is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lens_megatron.data.files import find_files
from lens_megatron.data.rows import Message, Row, read_rows
from lens_megatron.errors import UsageError

OURS = [
    {"prompt": "What is 2+2?", "answer": "4", "source": "sums", "id": "a"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}], "answer": 2},
    {"prompt": "Wie groß?", "answer": 1.5, "id": 7},
]
VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"split": "train", "index": i},
    }
    for i in range(3)
]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def without_place(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(row.messages, row.answer, row.source) for row in rows]


def test_our_schema(tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path / "sums.jsonl", [OURS[0], "", *OURS[1:]]))
    assert [row.id for row in rows] == ["a", "sums/3", "7"]
    assert rows[0].messages == (Message("user", "What is 2+2?"),)
    assert rows[1].messages == (Message("system", "Be brief."), Message("user", "1+1?"))
    assert [row.question for row in rows] == ["What is 2+2?", "1+1?", "Wie groß?"]
    assert [row.answer for row in rows] == ["4", "2", "1.5"]
    assert [row.source for row in rows] == ["sums", "", ""]
    assert rows[1].where == f"{tmp_path}/sums.jsonl:3"


def test_verls_schema_in_every_format(tmp_path: Path) -> None:
    expected = without_place(read_rows(jsonl(tmp_path / "a.jsonl", VERL)))
    assert expected[2] == ((Message("user", "question 2"),), "2", "openai/gsm8k")

    table = pa.Table.from_pylist(VERL)
    pq.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "saved").mkdir()  # as datasets' save_to_disk writes it
    with (
        pa.OSFile(str(tmp_path / "saved/data-00000-of-00001.arrow"), "wb") as out,
        pa.ipc.new_stream(out, table.schema) as w,
    ):
        w.write_table(table)
    (tmp_path / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    for source in ("b.parquet", "saved"):
        assert without_place(read_rows(str(tmp_path / source))) == expected
    assert read_rows(str(tmp_path / "b.parquet"))[1].id == "b/2"


def test_folders_give_the_files_of_a_split_in_order(tmp_path: Path) -> None:
    for name in ("data/train-00001-of-00002", "data/train-00000-of-00002", "data/test-00000-of-00001"):
        jsonl(tmp_path / f"{name}.jsonl", [])
    names = [path.name for path in find_files(str(tmp_path), "train")]
    assert names == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    with pytest.raises(UsageError, match=r"no files of split 'validation'; it has test, train"):
        find_files(str(tmp_path), "validation")
    jsonl(tmp_path / "plain/b.jsonl", [])
    jsonl(tmp_path / "plain/a.jsonl", [])
    assert [path.name for path in find_files(str(tmp_path / "plain"), "train")] == ["a.jsonl", "b.jsonl"]


def test_columns_of_other_names(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"problem": "1+1?", "solution": "2", "prompt": "other"}])
    (row,) = read_rows(source, prompt_key="problem", answer_key="solution")
    assert (row.question, row.answer) == ("1+1?", "2")


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{not json", r"x.jsonl:2: not JSON"),
        ("[1, 2]", r"x.jsonl:2: expected a JSON object, found list"),
        ({"prompt": "p"}, r"x.jsonl:2: no answer: 'answer' is missing; it has prompt"),
        ({"prompt": "p", "answer": None}, r"x.jsonl:2: no answer"),
        ({"prompt": "p", "answer": "  "}, r"x.jsonl:2: 'answer' is empty"),
        ({"prompt": "p", "answer": True}, r"x.jsonl:2: 'answer' should be text or a number, found bool"),
        ({"prompt": "p", "answer": ["4"]}, r"x.jsonl:2: 'answer' should be text or a number, found list"),
        ({"problem": "p", "answer": "4"}, r"x.jsonl:2: no 'prompt'; it has answer, problem"),
        ({"prompt": " ", "answer": "4"}, r"x.jsonl:2: 'prompt' should end with a question"),
        ({"prompt": [], "answer": "4"}, r"x.jsonl:2: 'prompt' should be text or a list"),
        ({"prompt": [{"role": "human", "content": "p"}], "answer": "4"}, r"x.jsonl:2: message 0 .* role 'human'"),
        ({"prompt": [{"role": "user", "content": 3}], "answer": "4"}, r"x.jsonl:2: message 0 .* text as content"),
        ({"prompt": "p", "answer": "4", "id": "a"}, r"x.jsonl:2: id 'a' was already used at .*x.jsonl:1"),
        ({"prompt": "p", "reward_model": {}, "answer": None}, r"x.jsonl:2: no answer: 'reward_model.ground_truth'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_rows(jsonl(tmp_path / "x.jsonl", [OURS[0], bad]))


def test_a_bad_parquet_row_is_named(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}]), tmp_path / "y.parquet"
    )
    with pytest.raises(UsageError, match=r"y.parquet row 2: no answer"):
        read_rows(str(tmp_path / "y.parquet"))


def test_unreadable_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_text("nothing of the kind")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "gro\xdf"}\n')
    (tmp_path / "nodata").mkdir()
    for name, message in [
        ("empty.jsonl", "data set is empty"),
        ("broken.parquet", "not a Parquet file"),
        ("latin.jsonl", "latin.jsonl:1: not UTF-8"),
        ("nodata", "no .jsonl or .parquet"),
        ("missing.jsonl", "no such file"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_rows(str(tmp_path / name))
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    with pytest.raises(UsageError, match=r"not from \.csv"):
        read_rows(str(tmp_path / "a.csv"))


def test_a_hub_id_is_read_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(repo: str, repo_type: str, allow_patterns: list[str]) -> str:
        assert (repo, repo_type) == ("owner/name", "dataset")
        return str(tmp_path / "hub")

    jsonl(tmp_path / "hub/data/train-0.jsonl", OURS)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert len(read_rows("owner/name")) == 3

    def offline(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match="owner/name: no such file, and the hub did not give it"):
        read_rows("owner/name")


@pytest.mark.parametrize("planted", [[[3, 3]], [[0, 99]], [[-1, 2]], [[1]], [[0.0, 2]], "2", 7])
def test_planted_noise_outside_the_question_is_refused(planted: Any, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "What is 2+2?", "answer": "4", "planted": planted}])
    with pytest.raises(UsageError, match=r"a\.jsonl:1: 'planted'"):
        read_rows(source)


def test_planted_noise_is_read(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "What is 2+2?", "answer": "4", "planted": [[0, 4], [5, 7]]}])
    assert read_rows(source)[0].planted == ((0, 4), (5, 7))
