"""The `data` section of a run, and of supervised training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class SupervisedDataConfig:
    """`data:` of SFT.yaml: rows with a prompt and the response to learn. Keys as those of a run, where they are the same."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    train: str
    prompts_per_step: int = 128
    max_prompt_tokens: int = 512
    shuffle: bool = True
    split: str = "train"
    template: str | None = None
    prompt_key: str = "prompt"
    response_key: str = "response"

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1 or self.max_prompt_tokens < 1:
            raise ValueError("prompts_per_step and max_prompt_tokens are at least 1")


@dataclass(frozen=True)
class DataConfig:
    """train               a .jsonl or .parquet file, a folder of them, a folder written by datasets' save_to_disk, or a
                        Hugging Face hub id.
    split               which split of a folder or hub id that has several.
    template            "chat" (the tokenizer's chat template), a text with {problem}, or the name of a shipped model, for its;
                        null: the model's own.
    prompt_key, ...     names of the columns, where they are not the usual ones.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    train: str
    prompts_per_step: int = 128
    max_prompt_tokens: int = 512
    shuffle: bool = True
    split: str = "train"
    template: str | None = None
    prompt_key: str = "prompt"
    answer_key: str = "answer"

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1 or self.max_prompt_tokens < 1:
            raise ValueError("prompts_per_step and max_prompt_tokens are at least 1")
