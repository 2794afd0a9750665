"""The engine tests, on a real SGLang server. Two that share the work are in test_faults.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from lens_megatron.rollout.sglang_engine import SGLangEngine
from tests.rollout.engine_cases import Case, EngineCases

from .conftest import save_tiny
from .engines import give_weights
from .server import LONGEST

pytestmark = pytest.mark.sglang


class TestSGLang(EngineCases):
    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
        folders = {seed: tmp_path_factory.mktemp(f"seed{seed}") for seed in (0, 1)}
        for seed, folder in folders.items():
            save_tiny(seed, folder)
        return folders

    @pytest.fixture
    def case(self, one_engine: SGLangEngine, folders: dict[int, Path]) -> Case:
        def weights(version: int, seed: int) -> None:
            give_weights(one_engine, version, folders[seed])

        weights(0, 0)
        return Case(one_engine, weights, limit=LONGEST)
