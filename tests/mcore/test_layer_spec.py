"""Which modules the layers are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def test_a_transformer_engine_that_does_not_import_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for another torch it is installed, and Megatron-Core goes on without it: so must the layers."""
    from lens_megatron.mcore.layer_spec import transformer_engine_available

    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not transformer_engine_available()
    from lens_megatron.mcore import layer_spec

    monkeypatch.setattr(layer_spec, "HAVE_TE", True)
    assert transformer_engine_available()
