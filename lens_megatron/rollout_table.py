"""What a step's rollouts are stored as: one row a rollout, in Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow

RolloutOrigin = Literal["success", "failure", "purified", "purified_failure", "removed", "unused"]


@dataclass(frozen=True)
class RolloutRow:
    """One rollout, with everything needed to explain it later.

    step: from 1, as in metrics.jsonl and in the file's name.
    origin: its place in G (rescue.Origin), or `removed` (a failure that made room), or `unused` (rolled out under x',
    but not taken).  trained: whether the update saw it.  prompt_tokens: x; prompt_pieces: the text of each.
    proximal_logprobs: pi_old under roll_tokens; null where it was not scored: not trained on, or equal to pi_theta of the
    training pass (update.reuse_logprobs).
    """

    step: int
    prompt_id: str
    source: str
    answer: str
    question: str
    index: int
    purified: bool
    origin: RolloutOrigin
    trained: bool
    prompt_tokens: Sequence[int]
    prompt_pieces: Sequence[str]
    scores: Sequence[float | None]
    deleted: Sequence[int]
    roll_tokens: Sequence[int]
    response: Sequence[int]
    response_text: str
    reward: float
    success: bool
    finish: str
    advantage: float | None
    weight: float | None
    behaviour_logprobs: Sequence[float]
    proximal_logprobs: Sequence[float] | None
    weight_version: int


ROLLOUT_COLUMNS = tuple(field.name for field in fields(RolloutRow))


def rollout_table(rows: Iterable[RolloutRow]) -> pyarrow.Table:
    import pyarrow as pa

    rows = list(rows)
    tokens, numbers = pa.list_(pa.int32()), pa.list_(pa.float32())
    kinds: dict[str, pyarrow.DataType] = {
        **dict.fromkeys(("step", "index", "weight_version"), pa.int64()),
        **dict.fromkeys(
            ("prompt_id", "source", "answer", "question", "origin", "response_text", "finish"), pa.string()
        ),
        **dict.fromkeys(("purified", "trained", "success"), pa.bool_()),
        **dict.fromkeys(("reward", "advantage", "weight"), pa.float64()),
        **dict.fromkeys(("prompt_tokens", "deleted", "roll_tokens", "response"), tokens),
        **dict.fromkeys(("scores", "behaviour_logprobs", "proximal_logprobs"), numbers),
        "prompt_pieces": pa.list_(pa.string()),
    }
    columns: dict[str, pyarrow.Array] = {}
    for name in ROLLOUT_COLUMNS:
        # rollouts of a prompt share its lists: each is converted once
        first: dict[int, int] = {}
        values: list[Any] = []
        places = []
        for row in rows:
            value = getattr(row, name)
            place = first.setdefault(id(value), len(values))
            if place == len(values):
                values.append(value)
            places.append(place)
        if kinds[name] == pa.string():
            values = [_storable(value) for value in values]
        elif name == "prompt_pieces":
            values = [[_storable(piece) for piece in pieces] for pieces in values]
        if name in ("response", "behaviour_logprobs", "proximal_logprobs") and all(
            value is not None for value in values
        ):
            array = _flat_lists(values, kinds[name])
        else:
            array = pa.array(values, type=kinds[name])
        columns[name] = array if len(values) == len(rows) else array.take(pa.array(places, pa.int64()))
    return pa.table(columns)


def _flat_lists(values: Sequence[Sequence[float]], kind: pyarrow.DataType) -> pyarrow.Array:
    """pa.array for long lists without gaps, several times as fast: a step may hold a million tokens."""
    import numpy as np
    import pyarrow as pa

    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    # not kind.value_type.to_pandas_dtype(): it imports pandas in pyarrow before 26
    dtype = np.int32 if kind.value_type == pa.int32() else np.float32
    numbers = np.fromiter(chain.from_iterable(values), dtype, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers), type=kind)


def _storable(text: str) -> str:
    """A tokenizer may yield half a surrogate pair, which no UTF-8 file can hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
