"""What an HF folder has besides weights: configs, tokenizer, template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lens_megatron.folder_note import NOTE, note_bytes
from lens_megatron.mcore.hf_index import COMPANIONS
from lens_megatron.mcore.stored_dtypes import Dtype


def companions_of(folder: Path, dtype: Dtype | None, template: str | None = None) -> dict[str, bytes]:
    return {name: read() for name, read in companion_readers(folder, dtype, template).items()}


def companion_readers(folder: Path, dtype: Dtype | None, template: str | None = None) -> dict[str, Callable[[], bytes]]:
    """The files by name, read when asked for; config.json with its dtype changed when the weights' is. `template`: that the
    weights were trained with, whatever the folder's own were."""
    files: dict[str, Callable[[], bytes]] = {
        name: (folder / name).read_bytes for name in COMPANIONS if (folder / name).is_file()
    }
    if dtype is not None and (given := files.get("config.json")) is not None:
        files["config.json"] = lambda: config_bytes(json.loads(given()), dtype)
    if template is not None:
        files[NOTE] = lambda: note_bytes(template)
    return files


def config_bytes(config: Mapping[str, Any], dtype: Dtype) -> bytes:
    """transformers 4 reads `torch_dtype`, 5 reads `dtype` too: whichever is there is set, else the older."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    changed = {**config, **dict.fromkeys(keys, dtype.name)}
    return (json.dumps(changed, indent=2) + "\n").encode()
