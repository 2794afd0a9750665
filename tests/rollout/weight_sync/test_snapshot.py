"""A restarted server is brought back from a proved version only."""

from __future__ import annotations

from pathlib import Path

import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout.sglang_server import ServerAddress
from lens_megatron.rollout.weight_sync.snapshot import Snapshots, version_folder, write_proof


def test_no_proof_no_server(tmp_path: Path) -> None:
    address = ServerAddress("s", "http://127.0.0.1:9", None, 1)
    version_folder(tmp_path, 3).mkdir()
    write_proof(version_folder(tmp_path, 3), 3, [1, 2], [-1.0], 1e-4)
    with pytest.raises(RunError, match="no snapshot of version 4"):
        Snapshots(tmp_path, 1.0).resync(address, 4)
    version_folder(tmp_path, 4).mkdir()  # written, and never proved
    with pytest.raises(RunError, match="no snapshot of version 4"):
        Snapshots(tmp_path, 1.0).resync(address, 4)
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9"):  # nobody there
        Snapshots(tmp_path, 1.0).resync(address, 3)
