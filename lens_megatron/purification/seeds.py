"""Random choices that depend on the run, the step and the prompt, and on nothing else.

Not on the order in which rollouts finished, the number of ranks or what was drawn before: a resumed run chooses as
the uninterrupted one would have, with no generator state to save.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def seed_for(run_seed: int, step: int, prompt_id: str, purpose: str) -> int:
    """64 bits. `purpose` keeps choices about one prompt independent of each other."""
    # sha256 and not hash(), which Python salts anew in every process
    text = json.dumps([run_seed, step, prompt_id, purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def uniform(seed: int) -> float:
    """One number in [0, 1)."""
    return random.Random(seed).random()


def choose(items: Sequence[T], count: int, seed: int) -> tuple[T, ...]:
    """`count` of the items, every subset equally likely, in their given order."""
    if not 0 <= count <= len(items):
        raise ValueError(f"cannot choose {count} of {len(items)}")
    # random() is the one method whose sequence Python promises to keep between versions; sample() is not
    generator = random.Random(seed)
    keys = [generator.random() for _ in items]
    chosen = sorted(sorted(range(len(items)), key=keys.__getitem__)[:count])
    return tuple(items[place] for place in chosen)
