"""What rank 0 tells its rollout process about servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lens_megatron.config import load_run
from lens_megatron.errors import UsageError
from lens_megatron.host import _of_the_servers
from lens_megatron.rollout.sglang_supervised import FOLDER
from lens_megatron.run_folder import RunFolder


@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
def test_only_servers_of_this_machine_must_fit_on_its_gpus(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of 8 GPUs: those of a launched job are on the other one, or on both, where supervisors start them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    tree: dict[str, Any] = {"model": "m", "run_dir": str(tmp_path / "run"), "data": {"train": "t.jsonl"}}
    tree |= {"steps": 1, "placement": placement, "algorithm": {"preset": "grpo"}}
    tree["rollout"] = {"engine": "sglang", "n": 4, "max_response_tokens": 8, "servers": 4, "server": {"tp": 4}}
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    config = load_run(tmp_path / "run.yaml", [])
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(UsageError, match=r"rollout\.servers: 4 of 4 GPUs .* this machine has 8"):
        _of_the_servers(config, folder)
    monkeypatch.setenv(FOLDER, str(tmp_path / "servers"))
    assert _of_the_servers(config, folder)["servers"] == 4
    folder.close()
