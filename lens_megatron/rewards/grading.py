"""A file of golden answers and predictions, judged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_megatron import strict
from lens_megatron.errors import UsageError
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rewards.pool import RewardPool
from lens_megatron.rewards.worker_process import Request

Row = dict[str, Any]


def read_pairs(path: Path) -> list[Row]:
    """Rows with "gold" and "prediction"; whatever else they hold is kept."""
    rows = [_checked(where, row) for where, row in strict.read_json_lines(path)]
    if not rows:
        raise UsageError(f"{path}: no rows")
    return rows


def _checked(where: str, row: Row) -> Row:
    for key, kinds in (("gold", (str, int, float)), ("prediction", (str, int, float, type(None)))):
        if key not in row:
            raise UsageError(f"{where}: no {key!r}; it has {', '.join(sorted(row)) or 'nothing'}")
        if isinstance(row[key], bool) or not isinstance(row[key], kinds):
            raise UsageError(f"{where}: {key!r} should be text or a number, found {type(row[key]).__name__}")
    return row


def grade_rows(rows: Sequence[Row], config: RewardConfig) -> list[Row]:
    """Every row with "reward" and "verdict" added, and "note" where there is something to say."""
    with RewardPool(config) as pool:
        judged = pool.grade_all(
            Request(
                id=str(row.get("id", f"row {number}")),
                source=str(row.get("source", "")),
                answer=str(row["gold"]),
                response="" if row["prediction"] is None else str(row["prediction"]),
            )
            for number, row in enumerate(rows, 1)
        )
    return [
        {**row, "reward": judgement.reward, "verdict": judgement.verdict}
        | ({"note": judgement.note} if judgement.note else {})
        for row, judgement in zip(rows, judged, strict=True)
    ]


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "count": len(rows),
        "reward": math.fsum(row["reward"] for row in rows) / len(rows),
        "verdicts": dict(sorted(Counter(row["verdict"] for row in rows).items())),
    }
