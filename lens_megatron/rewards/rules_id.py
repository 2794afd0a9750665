"""Which rules a judgement was made by, so that a kept one is not taken for what they would say now."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from lens_megatron import strict
from lens_megatron.rewards.config import RewardConfig, RewardRule


def rules_id(config: RewardConfig, source: str) -> str:
    """Of a source's rule and, for a shipped one, of its limits and the code that carries it out. A function or a server of
    the user's own is known by its name only."""
    rule = config.rule(source)
    if rule is None:
        return ""
    limits = (config.seconds, config.memory_mib, config.max_response_chars)
    shipped = "" if rule.custom else f"{_shipped_code()} {limits}"
    return _digest(repr(strict.to_tree(RewardRule, rule)) + shipped)


@cache
def _shipped_code() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _digest("".join(file.read_text(encoding="utf-8") for file in files) + version("math-verify"))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
