"""Everything that can be wrong with a folder of safetensors is found from headers; folders are written whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_megatron.errors import UsageError
from lens_megatron.mcore import hf_files
from lens_megatron.mcore.hf_files import HfFolder, write_hf_folder

SHAPES: dict[str, tuple[int, ...]] = {"a": (6, 4), "b": (3,), "c": (5, 4)}
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """a, b in the first shard, c in the second."""
    all_ = tensors()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": all_["a"], "b": all_["b"]}, tmp_path / first)
    save_file({"c": all_["c"]}, tmp_path / second)
    index = {"metadata": {}, "weight_map": {"a": first, "b": first, "c": second}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def refusal(folder: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> str:
    with pytest.raises(UsageError) as error:
        HfFolder(folder).check(shapes)
    assert str(folder) in str(error.value), "says where"
    assert "\n" not in str(error.value)
    return str(error.value)


def cut(path: Path, bytes_: int) -> None:
    os.truncate(path, bytes_)


def test_good_folders(one_file: Path, sharded: Path) -> None:
    for folder in (one_file, sharded):
        source = HfFolder(folder)
        source.check(SHAPES)
        assert source.names() == ["a", "b", "c"]
        assert source.dtype("a").name == "float32"
        for name, tensor in tensors().items():
            assert torch.equal(source.read(name), tensor)
            assert source.shape(name) == SHAPES[name]


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    words = refusal(sharded)
    assert "model-00002-of-00002.safetensors: missing" in words
    assert "download it again" in words


@pytest.mark.parametrize("kept", ["all but one byte", "header only", "half the header", "4 bytes", "nothing"])
def test_truncated_shard(sharded: Path, kept: str) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    whole = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    cut(path, {"all but one byte": whole - 1, "header only": header, "half the header": header // 2}.get(kept, 0))
    if kept == "4 bytes":
        path.write_bytes(b"\x08\0\0\0")
    words = refusal(sharded)
    assert path.name in words
    assert "download it again" in words
    if kept == "all but one byte":
        assert f"truncated: {whole - 1:,} bytes, its header promises {whole:,}" in words


def test_a_longer_file_than_promised(one_file: Path) -> None:
    with (one_file / "model.safetensors").open("ab") as file:
        file.write(b"rest")
    refusal(one_file)


HEADERS: dict[str, bytes] = {
    "not JSON": b"{not json!",
    "not text": b"\xff\xfe\x80" * 8,
    "a list": b"[1, 2, 3]",
    "entries without offsets": b'{"a": {"dtype": "F32"}}',
    "entries that are numbers": b'{"a": 3}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_garbage_header(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors" in refusal(tmp_path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "not a safetensors file" in refusal(tmp_path)


INDEXES: dict[str, str] = {
    "not JSON": "{",
    "no weight_map": '{"metadata": {}}',
    "a list": "[]",
    "weight_map is a list": '{"weight_map": ["a"]}',
}


@pytest.mark.parametrize("text", INDEXES.values(), ids=INDEXES)
def test_garbage_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert "not a safetensors index" in refusal(sharded)


def test_index_that_names_a_tensor_its_shard_lacks(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["d"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    assert "has no tensor d" in refusal(sharded)


def test_missing_tensors(one_file: Path) -> None:
    assert "no tensor d, which" in refusal(one_file, {**SHAPES, "d": (1,)})
    assert "no tensor d and 1 others" in refusal(one_file, {**SHAPES, "d": (1,), "e": (1,)})


def test_wrong_shape(one_file: Path) -> None:
    words = refusal(one_file, {**SHAPES, "a": (4, 6)})
    assert "a has shape (6, 4), config.json says (4, 6)" in words


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_not_plain_floats(tmp_path: Path, dtype: Any) -> None:
    save_file({**tensors(), "a": torch.zeros(6, 4).to(dtype)}, tmp_path / "model.safetensors")
    words = refusal(tmp_path)
    assert "a is stored as" in words
    assert "F32, F16 or BF16 is needed" in words


def test_more_tensors_than_asked_for_do_not_matter(tmp_path: Path) -> None:
    save_file({**tensors(), "rotary.inv_freq": torch.arange(4)}, tmp_path / "model.safetensors")
    HfFolder(tmp_path).check(SHAPES)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    words = refusal(tmp_path)
    assert "pytorch_model.bin is a pickle, which is never loaded: save it as safetensors" in words


def test_no_folder_and_empty_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no safetensors files" in refusal(tmp_path)


def test_slices_are_read_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(40, 30)
    save_file({"w": whole, "v": torch.arange(7.0)}, tmp_path / "model.safetensors")
    asked: list[Any] = []

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def get_slice(self, name: str) -> Spy:
            self.view = self.file.get_slice(name)
            return self

        def __getitem__(self, item: Any) -> Tensor:
            asked.append(item)
            return self.view[item]

    real = hf_files.safe_open
    monkeypatch.setattr(hf_files, "safe_open", Spy)
    source = HfFolder(tmp_path)
    assert not asked
    assert torch.equal(source.read("w", 0, 10, 13), whole[10:13])
    assert torch.equal(source.read("w", 1, 4, 9), whole[:, 4:9])
    assert torch.equal(source.read("v", 0, 2, 5), torch.arange(2.0, 5.0))
    assert source.read("w", 0, 40, 40).shape == (0, 30)
    assert asked == [slice(10, 13), (slice(None), slice(4, 9)), slice(2, 5), slice(40, 40)]


def test_rows_of_a_big_tensor_cost_no_more_memory_than_the_rows(tmp_path: Path) -> None:
    """Peak resident memory of a process that reads 1/64 of a 128 MiB tensor."""
    save_file({"w": torch.zeros(1024, 32768)}, tmp_path / "model.safetensors")
    program = f"""
        import resource
        from pathlib import Path
        from lens_megatron.mcore.hf_files import HfFolder
        source = HfFolder(Path({str(tmp_path)!r}))
        source.read("w", 0, 0, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert source.read("w", 0, 512, 528).shape == (16, 32768)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout.split()[-1]) < 24 * 1024  # KiB


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (100, 2), (1, 3)])
def test_written_folders_are_read_back(tmp_path: Path, limit: int, files: int) -> None:
    companions = tmp_path / "from"
    companions.mkdir()
    (companions / "config.json").write_text("{}")
    (companions / "tokenizer.json").write_text("[]")
    (companions / "secret.bin").write_text("no")
    target = tmp_path / "deep" / "out"
    write_hf_folder(target, iter(tensors().items()), companions, max_shard_bytes=limit)
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(shards) == files
    assert {path.name for path in target.iterdir()} == {
        *shards,
        "config.json",
        "tokenizer.json",
        *([INDEX] if files > 1 else []),
    }
    assert [path.name for path in target.parent.iterdir()] == ["out"], "nothing partial stays"
    if files > 1:
        index = json.loads((target / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors().values())
        assert shards == [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
        for name, shard in index["weight_map"].items():
            assert name in load_file(target / shard)
    source = HfFolder(target)
    source.check(SHAPES)
    for name, tensor in tensors().items():
        assert torch.equal(source.read(name), tensor)


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    write_hf_folder(tmp_path / "out", [("top", whole[:2]), ("turned", whole.t()), ("rest", whole[2:])])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["turned"], whole.t())
    assert torch.equal(torch.cat([written["top"], written["rest"]]), whole)


def test_an_existing_target_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    consumed: list[str] = []

    def stream() -> Any:
        consumed.append("read")
        yield from tensors().items()

    with pytest.raises(UsageError, match="exists already"):
        write_hf_folder(tmp_path / "out", stream())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert not consumed, "refused before any tensor is gathered"


def failing_stream() -> Any:
    yield "a", torch.ones(4)
    yield "b", torch.ones(4)
    raise RuntimeError("a rank died")


def test_a_stream_that_fails_leaves_no_folder_and_the_next_attempt_works(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_folder(tmp_path / "out", failing_stream(), max_shard_bytes=16)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    write_hf_folder(tmp_path / "out", tensors().items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors"}
    assert not (tmp_path / "out.partial").exists()


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL between shards: the name never appears."""
    program = f"""
        import time, torch
        from pathlib import Path
        from lens_megatron.mcore.hf_files import write_hf_folder

        def stream():
            for number in range(100):
                yield f"t{{number}}", torch.ones(1000)
                if number == 5:
                    time.sleep(600)

        write_hf_folder(Path({str(tmp_path / "out")!r}), stream(), max_shard_bytes=4000)
    """
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)])
    try:
        wait_for(lambda: len(list((tmp_path / "out.partial").glob("*.safetensors"))) >= 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    assert not (tmp_path / "out").exists()
    write_hf_folder(tmp_path / "out", tensors().items())
    HfFolder(tmp_path / "out").check(SHAPES)
