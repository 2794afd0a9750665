"""Which experts a rollout's tokens went to, on the way from the engine to the routers that replay them (mcore/routing.py).

A token of a model with 48 layers and 8 experts each has 384 numbers: they travel as bytes, in the smallest type that holds
them, and a prompt that changes moves a window over them and copies nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not at run time: types.py is light, and needs this
    import numpy as np
    from numpy.typing import NDArray

    from lens_megatron.model_spec import ModelSpec

OWN_CHOICE = -1  # in place of an expert: the model chooses for this token itself


@dataclass(frozen=True)
class Routers:
    """What a model's routers choose, and among how many."""

    layers: int
    experts: int
    topk: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Routers | None:
        """None: a dense model's."""
        moe = spec.moe
        return None if moe is None else cls(spec.layers, moe.experts, moe.experts_per_token)

    def complaint(self, experts: NDArray[np.integer]) -> str | None:
        """Why these rows [tokens, layers x K] cannot be this model's. An expert named twice would silently count once."""
        import numpy as np

        width = experts.shape[1]
        if width != self.layers * self.topk:
            return f"{width} a token, and {self.layers} layers x {self.topk} are this model's"
        if experts.min() < 0 or experts.max() >= self.experts:
            return f"one of a token is not of 0 to {self.experts - 1}"
        chosen = np.ascontiguousarray(experts.reshape(-1, self.topk).T)  # pairs: several times as fast as sorting
        if any((chosen[a] == chosen[b]).any() for a in range(self.topk) for b in range(a)):
            return "a token has one of them twice in a layer"
        return None


@dataclass(frozen=True)
class Routing:
    """A row a token, of all layers' experts one after another; what lies before and behind the rows the model routes itself."""

    data: bytes
    dtype: str
    width: int  # numbers a row
    skipped: int = 0  # rows
    first: int = 0  # token of the sequence that the first row which is not skipped belongs to

    @classmethod
    def of(cls, experts: NDArray[np.integer]) -> Routing:
        """[tokens, layers x K], or [tokens, layers, K]."""
        import numpy as np

        whole = experts.reshape(len(experts), math.prod(experts.shape[1:]))
        small = np.uint8 if whole.size == 0 or (whole.min() >= 0 and whole.max() < 256) else np.int16
        return cls(whole.astype(small).tobytes(), np.dtype(small).name, whole.shape[1])

    def experts(self) -> NDArray[np.integer]:
        """[tokens from `first` on, layers x K]; not to be written to."""
        import numpy as np

        return np.frombuffer(self.data, self.dtype).reshape(-1, self.width)[self.skipped :]

    def under(self, prompt: int, rolled: int) -> Routing:
        """Of a rollout sampled under `rolled` prompt tokens, for the same response under `prompt` others, which the model
        routes itself."""
        return replace(self, skipped=rolled, first=prompt)
