"""Two checkpoints of either format compared: configuration, names, shapes, bits; then what they compute, layer by layer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.forward import states, weights_of
from checkpoints_tools.sources import HfSource, MegatronSource, open_source
from checkpoints_tools.streaming import BLOCK_BYTES, default_workers
from lens_megatron.errors import UsageError
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.model_spec import ModelSpec

# Long enough that a wrong stretch of RoPE shows.
PROBE = (
    "A train leaves the first station at 8:15 and travels 240 km at a constant speed; a second one leaves an hour later "
    "and arrives at the same moment, because it is 20 km/h faster. How fast is each? Let v be the speed of the first in "
    "km/h. Then 240/v - 240/(v + 20) = 1, so 4800 = v^2 + 20v, whose positive root is v = 60. Check: 4 hours against 3."
)
_PROBE_TOKENS = 96  # without a tokenizer
_SHOWN = 10
Source = HfSource | MegatronSource


def verify(a: Path, b: Path, text: str | None, tolerance: float, logits: bool = True) -> dict[str, Any]:
    """Plain values, fit for JSON; `equal` says it all."""
    first, second = open_source(a), open_source(b)
    result: dict[str, Any] = {"a": str(first.folder), "b": str(second.folder)}
    result["config"] = _config_differences(first.spec, second.spec)
    shapes_a, shapes_b = hf_shapes(first.spec), hf_shapes(second.spec)
    result["only_in_a"] = [name for name in shapes_a if name not in shapes_b]
    result["only_in_b"] = [name for name in shapes_b if name not in shapes_a]
    both = [name for name in shapes_a if name in shapes_b]
    result["shapes"] = [
        {"name": name, "a": list(shapes_a[name]), "b": list(shapes_b[name])}
        for name in both
        if shapes_a[name] != shapes_b[name]
    ]
    alike = [name for name in both if shapes_a[name] == shapes_b[name]]
    with ThreadPoolExecutor(default_workers()) as pool:
        compared = list(pool.map(lambda name: _compare(name, shapes_a[name], first, second), alike))
    result["tensors"] = len(alike)
    result["dtypes"] = [one["name"] for one in compared if one["dtype_a"] != one["dtype_b"]]
    result["values"] = [one for one in compared if one["differing"]]
    same = not any(result[kind] for kind in ("config", "only_in_a", "only_in_b", "shapes", "dtypes", "values"))
    result["logits"] = None
    if logits and not (result["only_in_a"] or result["only_in_b"] or result["shapes"]):
        result["logits"] = _compare_states(first, second, text, tolerance)
        same = same and result["logits"]["parted_at"] is None
    result["equal"] = same
    return result


def describe(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people: what differs first, the verdict last."""
    for one in result["config"]:
        yield f"config: {one['key']} is {one['a']!r} in A, {one['b']!r} in B"
    for place in ("only_in_a", "only_in_b"):
        if result[place]:
            yield f"{len(result[place])} tensors {place.replace('_', ' ')}: {', '.join(result[place][:_SHOWN])}"
    for one in result["shapes"][:_SHOWN]:
        yield f"shape: {one['name']} is {one['a']} in A, {one['b']} in B"
    if result["dtypes"]:
        yield f"dtype: {len(result['dtypes'])} tensors differ in dtype, {result['dtypes'][0]} for one"
    for one in result["values"][:_SHOWN]:
        yield f"values: {one['name']}: {one['differing']:,} of {one['elements']:,} differ, at most by {one['max']:.3g}"
    if len(result["values"]) > _SHOWN:
        yield f"values: and {len(result['values']) - _SHOWN} more tensors"
    found = result["logits"]
    if found is not None:
        last = found["differences"][-1]
        if found["parted_at"] is None:
            yield f"logits: equal within {found['tolerance']:g} ({found['tokens']} tokens, at most {last['difference']:.2g})"
        else:
            parted = next(one for one in found["differences"] if one["after"] == found["parted_at"])
            yield (
                f"logits: they part at {found['parted_at']} (relative difference {parted['difference']:.3g}, "
                f"allowed {found['tolerance']:g}); the logits differ by {last['difference']:.3g}"
            )
    tensors = f"{result['tensors']} tensors compared bit by bit"
    yield f"{'equal' if result['equal'] else 'DIFFERENT'}: {tensors}: {result['a']} and {result['b']}"


def _config_differences(a: ModelSpec, b: ModelSpec) -> list[dict[str, Any]]:
    """max_positions aside, which decides neither tensors nor arithmetic."""
    tree_a, tree_b = dataclasses.asdict(a), dataclasses.asdict(b)
    return [
        {"key": key, "a": tree_a[key], "b": tree_b[key]}
        for key in tree_a
        if tree_a[key] != tree_b[key] and key != "max_positions"
    ]


def _compare(name: str, shape: tuple[int, ...], first: Source, second: Source) -> dict[str, Any]:
    dtype_a, dtype_b = first.dtype(name), second.dtype(name)
    row_elements = max(1, torch.Size(shape[1:]).numel())
    step = max(1, BLOCK_BYTES // (row_elements * dtype_a.itemsize))
    differing, largest = 0, 0.0
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        rows_a, rows_b = first.rows(name, start, stop).contiguous(), second.rows(name, start, stop).contiguous()
        if dtype_a == dtype_b and torch.equal(rows_a.view(torch.uint8), rows_b.view(torch.uint8)):
            continue
        if dtype_a == dtype_b:
            bits = (rows_a.view(torch.uint8) != rows_b.view(torch.uint8)).view(*rows_a.shape, -1)
            differing += int(bits.any(-1).sum())
        else:
            differing += int((rows_a.double() != rows_b.double()).sum())
        distance = (rows_a.double() - rows_b.double()).abs().nan_to_num(nan=float("inf"))
        largest = max(largest, float(distance.clamp(max=1e300).max()))
    return {
        "name": name,
        "elements": torch.Size(shape).numel(),
        "differing": differing,
        "max": largest,
        "dtype_a": dtype_a.name,
        "dtype_b": dtype_b.name,
    }


def _compare_states(first: Source, second: Source, text: str | None, tolerance: float) -> dict[str, Any]:
    tokens = _probe(first, second, text)
    differences = []
    parted_at = None
    streams = zip(states(weights_of(first), tokens), states(weights_of(second), tokens), strict=True)
    for (after, state_a), (_, state_b) in streams:
        size = max(float(state_a.abs().max()), 1e-30)
        difference = float((state_a - state_b).abs().max()) / size
        difference = difference if difference < float("inf") else 1e300  # NaN and infinity differ from everything
        differences.append({"after": after, "difference": difference})
        if parted_at is None and difference > tolerance:
            parted_at = after
    return {"tokens": len(tokens), "tolerance": tolerance, "parted_at": parted_at, "differences": differences}


def _probe(first: Source, second: Source, text: str | None) -> list[int]:
    for source in (first, second):
        folder = source.folder if isinstance(source, HfSource) else source.folder / "hf"
        file = folder / "tokenizer.json"
        if file.is_file():
            from tokenizers import Tokenizer

            tokens: list[int] = Tokenizer.from_file(str(file)).encode(text or PROBE).ids
            if tokens and max(tokens) < source.spec.vocab_size:
                return tokens
            raise UsageError(f"{file}: gives tokens outside the model's {source.spec.vocab_size} words, or none")
    if text is not None:
        raise UsageError("--text: neither checkpoint has a tokenizer.json; leave it out to probe with random tokens")
    return [random.Random(number).randrange(first.spec.vocab_size) for number in range(_PROBE_TOKENS)]
