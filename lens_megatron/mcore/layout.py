"""Which ranks hold what. A layout that cannot work is refused with the reason before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lens_megatron.errors import UsageError
from lens_megatron.model_spec import ModelSpec


@dataclass(frozen=True)
class ParallelConfig:
    """`parallel:` of RUN.yaml. Data parallelism is what remains of the world after tp x pp x cp."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline stages
    vpp: int = 1  # virtual stages on each pipeline rank (interleaved schedule)
    cp: int = 1  # context parallel
    ep: int = 1  # expert parallel
    etp: int | None = None  # tensor parallel inside an expert; default: 1 with expert parallelism, tp without
    dp: int | None = None  # default: whatever the number of processes leaves; 1 when this command starts them
    sp: bool | None = None  # sequence parallel; default: on when tp > 1
    overlap_grad_reduce: bool = True  # gradients of data-parallel ranks are summed while backward still runs, on CUDA
    ends_count_as_layers: bool = False  # embedding and head each take a layer's place in the pipeline split

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (got {value})")

    @property
    def sequence_parallel(self) -> bool:
        return self.tp > 1 if self.sp is None else self.sp and self.tp > 1

    @property
    def expert_tp(self) -> int:
        if self.etp is not None:
            return self.etp
        return 1 if self.ep > 1 else self.tp

    @property
    def model_ranks(self) -> int:
        """Processes that hold one copy of the model's activations: the unit that data parallelism repeats."""
        return self.tp * self.pp * self.cp

    @property
    def processes(self) -> int:
        """How many processes to start when nobody has started any."""
        if self.dp is not None:
            return self.model_ranks * self.dp
        expert_ranks = self.ep * self.expert_tp * self.pp
        return math.lcm(self.model_ranks, expert_ranks)


def sequence_unit(cp: int) -> int:
    """Each context-parallel rank holds two chunks of a sequence."""
    return 2 * cp if cp > 1 else 1


def pack_unit(cp: int, tp: int) -> int:
    """Every tensor-parallel rank holds as many tokens of a pack."""
    return math.lcm(sequence_unit(cp), cp * tp)


def padding_reserved(cp: int, tp: int) -> int:
    """Tokens of a pack's budget that its own padding may take, beside that of its sequences."""
    return pack_unit(cp, tp) - sequence_unit(cp)


def check_budget(key: str, budget: int, longest: int, layout: ParallelConfig) -> None:
    """`budget` must hold a sequence of `longest` tokens. Known before a run starts: the last prompts must not end it."""
    unit = sequence_unit(layout.cp)
    least = -(-longest // unit) * unit + padding_reserved(layout.cp, layout.tp)
    if budget < least:
        padded = f" and the padding of tp={layout.tp} cp={layout.cp}" if least > longest else ""
        raise UsageError(f"{key}: {budget} tokens cannot hold a sequence of {longest}{padded}; set at least {least}")


_VOCAB_MULTIPLE = 128


def padded_vocab_size(spec: ModelSpec, tp: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds the same number of rows.

    The multiple does not depend on tp (when tp divides 128), so that a checkpoint loads in another layout.
    """
    multiple = math.lcm(_VOCAB_MULTIPLE, tp)
    return -(-spec.vocab_size // multiple) * multiple


def check_layout(spec: ModelSpec, layout: ParallelConfig, world_size: int) -> None:
    """Raise UsageError, with what would be right, unless `layout` can hold `spec` on `world_size` processes."""
    if layout.sp and layout.tp == 1:
        _refuse("sp", "sequence parallelism splits what tensor parallelism repeats: it needs tp > 1, or leave sp out")
    # what tp cuts; a value offered to the user must divide all of it (kv_heads divides heads)
    cut = {"attention heads": spec.heads, "key/value heads": spec.kv_heads}
    if spec.moe is None:
        cut["MLP columns"] = spec.ffn_size
    elif layout.ep == 1 and layout.etp is None:
        cut["columns of an expert"] = spec.moe.expert_ffn_size
    for what, count in cut.items():
        _divides("tp", layout.tp, what, count, math.gcd(*cut.values()))
    if spec.moe is None:
        if layout.ep > 1 or layout.etp not in (None, 1):
            _refuse("ep", "this model has no experts: leave ep and etp out")
    else:
        _divides("ep", layout.ep, "experts", spec.moe.experts)
        _divides("etp", layout.expert_tp, "columns of an expert", spec.moe.expert_ffn_size)
        if layout.ep == 1 and layout.expert_tp != layout.tp:
            # Megatron-Core sums expert gradients over the experts' own data-parallel ranks only when ep > 1
            _refuse("etp", f"without expert parallelism etp must be tp={layout.tp}: leave it out")
        if layout.tp > 1 and not layout.sequence_parallel:
            _refuse("sp", "experts with tp > 1 need sequence parallelism: set parallel.sp=true or leave it out")
    if layout.vpp > 1 and layout.pp == 1:
        _refuse("vpp", "virtual stages interleave pipeline stages: they need pp > 1")
    slots = spec.layers + (2 if layout.ends_count_as_layers else 0)
    stages = layout.pp * layout.vpp
    if slots % stages:
        what = f"{spec.layers} layers" + (" + embedding + head" if layout.ends_count_as_layers else "")
        other = spec.layers + 2 if not layout.ends_count_as_layers else spec.layers
        hint = (
            f"; parallel.ends_count_as_layers={str(not layout.ends_count_as_layers).lower()} would fit"
            if other % stages == 0
            else f"; pp x vpp may be {_choices(slots)}"
        )
        _refuse("pp", f"pp x vpp = {stages} does not divide {what}{hint}")
    if world_size % layout.model_ranks:
        _refuse(
            "tp",
            f"tp x pp x cp = {layout.model_ranks} does not divide the {world_size} processes; "
            f"start a multiple of {layout.model_ranks}",
        )
    dp = world_size // layout.model_ranks
    if layout.dp is not None and layout.dp != dp:
        _refuse(
            "dp",
            f"dp={layout.dp} needs {layout.dp * layout.model_ranks} processes, there are {world_size}; left out, all are used",
        )
    expert_ranks = layout.ep * layout.expert_tp * layout.pp
    if world_size % expert_ranks:
        _refuse("ep", f"ep x etp x pp = {expert_ranks} does not divide the {world_size} processes")


def _divides(key: str, value: int, what: str, count: int, fits: int | None = None) -> None:
    """`fits`: whose divisors are offered instead, when `value` must divide more than `count`."""
    if count % value:
        _refuse(key, f"{key}={value} does not divide the {count} {what}; {key} may be {_choices(fits or count)}")


def _choices(count: int, most: int = 64) -> str:
    return "one of " + ", ".join(str(n) for n in range(1, most + 1) if count % n == 0)


def _refuse(key: str, reason: str) -> None:
    raise UsageError(f"parallel.{key}: {reason}")
