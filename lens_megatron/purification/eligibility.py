"""Which tokens of a prompt may be deleted. They are also the ones that gamma counts.

Shapes: T tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Bool
from torch import Tensor

from lens_megatron.purification.config import Scope
from lens_megatron.types import Prompt


def eligible_tokens(prompt: Prompt, special_ids: Collection[int], scope: Scope) -> Bool[Tensor, " T"]:
    """True where a token may go.

    Scope `question` keeps the template and the system prompt whole; `prompt` is the literal |x|, without what the
    tokenizer calls special. Position 0 is never eligible: the model gives no probability to a first token, so Eq. 1
    has no score for it, and a count that included it could not be met.
    """
    tokens = len(prompt.tokens)
    start, end = prompt.question
    if not 0 <= start <= end <= tokens:
        raise ValueError(f"prompt {prompt.id!r}: question span {prompt.question} is outside its {tokens} tokens")
    first, last = (start, end) if scope == "question" else (0, tokens)
    return torch.tensor(
        [t > 0 and first <= t < last and prompt.tokens[t] not in special_ids for t in range(tokens)], dtype=torch.bool
    )
