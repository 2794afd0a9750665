from __future__ import annotations

from pathlib import Path

from lens_megatron.data.tokenizer import special_ids
from tests.data.tokenizers import byte_level


def test_tokens_that_are_only_marked_special_are_special(tmp_path: Path) -> None:
    """As Llama 3's headers: without a role, and not in `all_special_ids`, but no text that a prompt could do without."""
    tokenizer = byte_level(tmp_path)
    structure = {tokenizer.convert_tokens_to_ids(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert structure - set(tokenizer.all_special_ids)
    assert special_ids(tokenizer) == structure
