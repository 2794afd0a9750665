"""The engine tests, on the embedded engine."""

from __future__ import annotations

import pytest

from lens_megatron.rollout.embedded import EmbeddedEngine

from . import tiny
from .engine_cases import Case, EngineCases


class TestEmbedded(EngineCases):
    @pytest.fixture
    def case(self) -> Case:
        engine = EmbeddedEngine(tiny.model(0, tied=False), slots=32)

        def weights(version: int, seed: int) -> None:
            engine.begin_update(version)
            engine.update({name: tensor.clone() for name, tensor in tiny.model(seed, tied=False).state_dict().items()})
            engine.end_update()

        return Case(engine, weights, limit=256)
