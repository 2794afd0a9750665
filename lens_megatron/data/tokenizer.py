"""The model's tokenizer, its fit to the model, and the tokens that end a response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lens_megatron.errors import UsageError

# Checkpoints pad their embedding; a tokenizer of another family is further off than that.
PADDED_ENTRIES = 1024
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(model)
    # transformers 5 would make an empty tokenizer of the kind that config.json names
    if folder.is_dir() and not any((folder / name).exists() for name in _VOCABULARIES):
        raise UsageError(f"{model} has no tokenizer (tokenizer.json): copy it from the model it was made from")
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{model}: no tokenizer that transformers can load ({str(error).splitlines()[0]})") from None


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuses a tokenizer of another model by its size."""
    size = max(tokenizer.get_vocab().values()) + 1
    if size > vocab_size or vocab_size - size > PADDED_ENTRIES:
        raise UsageError(
            f"{tokenizer.name_or_path}: the tokenizer has {size} tokens, the model {vocab_size}: "
            "they do not belong together"
        )


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens of structure, not of text: those with a role, and those that are only marked special (Llama 3's headers)."""
    marked = (token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    return frozenset((*tokenizer.all_special_ids, *marked))


class TokenPieces:
    """The text that each token adds after the one before it: together they read like the whole text.

    Word-level tokenizers put spaces between tokens, so a token alone does not tell; what a pair adds does. Remembered,
    because a step shows every token of every prompt.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[tuple[int, ...], str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        return [self._piece(before, token) for before, token in pairwise((None, *ids)) if token is not None]

    def _piece(self, before: int | None, token: int) -> str:
        alone = self._text((token,))
        if before is None:
            return alone
        first, both = self._text((before,)), self._text((before, token))
        return both[len(first) :] if both.startswith(first) else alone

    def _text(self, ids: tuple[int, ...]) -> str:
        if ids not in self._texts:
            self._texts[ids] = self._tokenizer.decode(list(ids))
        return self._texts[ids]


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What ends a response: the tokenizer's end token, its family's ends of turns, and generation_config.json's."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    ids |= {tokenizer.get_vocab()[token] for token in TURN_ENDS if token in tokenizer.get_vocab()}
    config = Path(tokenizer.name_or_path) / "generation_config.json"
    if config.is_file():
        listed = json.loads(config.read_text()).get("eos_token_id") or []
        ids |= set(listed if isinstance(listed, list) else [listed])
    if not ids:
        raise UsageError(f"{tokenizer.name_or_path}: the tokenizer names no end-of-text token")
    return tuple(sorted(ids))
