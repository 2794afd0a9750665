"""The index that we write is the one that torch would have written."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import filesystem, metadata

from checkpoints_tools import index_writer
from lens_megatron.mcore import checkpoint_index
from lens_megatron.mcore.checkpoint_index import Chunk, Stored
from lens_megatron.mcore.stored_dtypes import BY_NAME

STORED = {
    "weight": Stored(
        BY_NAME["bfloat16"],
        (2, 5 << 33),
        (Chunk((0, 0), (1, 5 << 33), "a.distcp", 0, 7), Chunk((1, 0), (1, 5 << 33), "b.distcp", 1 << 40, 9)),
    ),
    "scalar": Stored(BY_NAME["float32"], (), (Chunk((), (), "a.distcp", 7, 3),)),
    "state/shard_0_é": Stored(None, (), (Chunk((), (), "a.distcp", 10, 1),)),
}


def torchs_own() -> metadata.Metadata:
    def entry(
        dtype: torch.dtype, size: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> object:
        chunks = [metadata.ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
        return metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=dtype), torch.Size(size), chunks)

    wide = (1, 5 << 33)
    return metadata.Metadata(
        {
            "weight": entry(torch.bfloat16, (2, 5 << 33), [((0, 0), wide), ((1, 0), wide)]),
            "scalar": entry(torch.float32, (), [((), ())]),
            "state/shard_0_é": metadata.BytesStorageMetadata(),
        },  # type: ignore[arg-type]
        storage_data={
            metadata.MetadataIndex("weight", (0, 0)): filesystem._StorageInfo("a.distcp", 0, 7),
            metadata.MetadataIndex("weight", (1, 0)): filesystem._StorageInfo("b.distcp", 1 << 40, 9),
            metadata.MetadataIndex("scalar", ()): filesystem._StorageInfo("a.distcp", 7, 3),
            metadata.MetadataIndex("state/shard_0_é"): filesystem._StorageInfo("a.distcp", 10, 1),
        },
        storage_meta=metadata.StorageMeta(),
    )


def test_torch_reads_what_it_would_have_written() -> None:
    assert pickle.loads(index_writer.to_bytes(STORED)) == torchs_own()


def test_both_are_read_alike(tmp_path: Path) -> None:
    for content in (index_writer.to_bytes(STORED), pickle.dumps(torchs_own())):
        (tmp_path / ".metadata").write_bytes(content)
        assert checkpoint_index.read(tmp_path) == STORED
