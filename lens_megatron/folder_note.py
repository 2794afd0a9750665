"""What an HF folder that lens-megatron wrote says besides its model: the template that the weights were trained with.

A file of its own, which transformers and SGLang do not look at; config.json and the tokenizer's files stay what they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lens_megatron import strict

NOTE = "lens_megatron.json"


@dataclass(frozen=True)
class FolderNote:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    template: str

    def __post_init__(self) -> None:
        check_template(self.template)


def check_template(template: str) -> None:
    if template != "chat" and template.count("{problem}") != 1:
        raise ValueError(f"template must be `chat`, or hold {{problem}} exactly once (got {template!r})")


def noted_template(folder: Path) -> str | None:
    """None: nobody has left a note."""
    file = folder / NOTE
    if not file.exists():
        return None
    return strict.build(FolderNote, strict.read_json(file), str(file)).template


def note_bytes(template: str) -> bytes:
    return (json.dumps({"template": template}, indent=2) + "\n").encode()
