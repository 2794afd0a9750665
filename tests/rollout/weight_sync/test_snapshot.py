"""A restarted server is brought back from a proved version of this very sync only; what older lives left is cleared away."""

from __future__ import annotations

from pathlib import Path

import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout.sglang_server import ServerAddress
from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.rollout.weight_sync.disk import DiskTransport
from lens_megatron.rollout.weight_sync.probe import Probe, bound_for
from lens_megatron.rollout.weight_sync.snapshot import (
    Snapshots,
    forget_snapshots,
    snapshot_folder,
    version_folder,
    write_proof,
)

PROBE = Probe((1, 2), (-1.0,), bound_for(None, fp32=True, mixture=False))
ADDRESS = ServerAddress("s", "http://127.0.0.1:9", None, 1)


def test_no_proof_no_server(tmp_path: Path) -> None:
    version_folder(tmp_path, 3).mkdir()
    write_proof(version_folder(tmp_path, 3), "3.a", PROBE)
    with pytest.raises(RunError, match="no snapshot of version 4"):
        Snapshots(tmp_path, 1.0).resync(ADDRESS, 4, "4.a")
    version_folder(tmp_path, 4).mkdir()  # written, and never proved
    with pytest.raises(RunError, match="no snapshot of version 4"):
        Snapshots(tmp_path, 1.0).resync(ADDRESS, 4, "4.a")
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9"):  # nobody there
        Snapshots(tmp_path, 1.0).resync(ADDRESS, 3, "3.a")


def test_a_snapshot_of_another_life_of_the_run_is_not_taken(tmp_path: Path) -> None:
    version_folder(tmp_path, 3).mkdir()
    write_proof(version_folder(tmp_path, 3), "3.before", PROBE)
    with pytest.raises(RunError, match="no snapshot of version 3"):
        Snapshots(tmp_path, 1.0).resync(ADDRESS, 3, "3.now")


def test_runs_that_share_a_folder_have_parts_of_their_own(tmp_path: Path) -> None:
    shared = SyncConfig(folder=str(tmp_path / "shared"))
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    folders = [snapshot_folder(shared, run) for run in runs]
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path / "shared" for folder in folders)
    assert folders[2].name.startswith("other-")
    assert snapshot_folder(shared, runs[0]) == folders[0]
    for folder in folders[:2]:
        version_folder(folder, 3).mkdir(parents=True)
    forget_snapshots(folders[0])
    assert [version_folder(folder, 3).exists() for folder in folders[:2]] == [False, True]


@pytest.mark.parametrize(
    ("there", "newest", "kept"),
    [
        ([3, 4, 5], 5, [4, 5]),
        ([5, 7, 8], 5, [5]),
        ([3, 4, 5, 6, 7, 8], 5, [4, 5]),
        ([5, 6, 8], 6, [5, 6]),
        ([0], 0, [0]),
    ],
)
def test_the_version_just_written_and_the_one_before_are_kept(
    tmp_path: Path, there: list[int], newest: int, kept: list[int]
) -> None:
    """After resuming from a checkpoint there may be versions above it."""
    for version in there:
        version_folder(tmp_path, version).mkdir()
    DiskTransport(tmp_path, tmp_path)._forget_old(newest)
    assert sorted(tmp_path.iterdir()) == [version_folder(tmp_path, version) for version in kept]
