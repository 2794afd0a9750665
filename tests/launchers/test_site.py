"""SITE.yaml: strict, and refused before anything is queued."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launchers.site import SiteConfig, load_site, split_overrides
from lens_megatron import strict
from lens_megatron.errors import UsageError
from tests.launchers.jobs import ROOT, SITES


@pytest.mark.parametrize("path", sorted(SITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sites_load(path: Path) -> None:
    assert load_site(path).account == "my-account"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: gpu", "unknown key 'partion'; did you mean 'partition'"),
        ("servers: {imag: x}", "unknown key 'servers.imag'; did you mean 'servers.image'"),
        ("time: 4 hours", "'4 hours' is not"),
        ("gpus_per_node: 0", "set ranks_per_node"),
        ("{gpus_per_node: 4, ranks_per_node: 8}", "8 ranks do not find a GPU each"),
        ("{image: x.sqsh, mounts: [/data]}", "'/data' is not FROM:TO"),
        ("mounts: ['/a:/b']", "without a container nothing is mounted"),
        ("env: {'A-B': c}", "'A-B' is no name of a variable"),
        ("sbatch: {partition: gpu}", "partition is decided by 'partition'"),
        ("sbatch: {--signal: B:USR1@30}", "--signal is decided by 'end_notice_s'"),
        ("end_notice_s: 100000", "Slurm takes 0 to 65535"),
        ("nodes: 0", "nodes must be at least 1"),
        ("time: '11'", "time: 11 is over at once"),
        ("{time: '00:01:30', end_notice_s: 60}", "notice of its end comes end_notice_s 60 s before it"),
        ("{mem: 64G, sbatch: {mem_per_gpu: 8G}}", "sbatch: mem_per_gpu and mem: 64G both say how much memory"),
        ("{time: 0-01, end_notice_s: 3540}", "time: 0-01 is over at once"),
    ],
)
def test_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_site(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "memory"),
    [
        ({}, "0"),
        ({"exclusive": False}, None),
        ({"mem": None}, None),
        ({"mem": 0, "exclusive": False}, "0"),
        ({"mem": "200G"}, "200G"),
        ({"sbatch": {"--mem-per-gpu": "8G"}}, None),
        ({"sbatch": {"mem": 0}}, None),
    ],
)
def test_memory(keys: dict[str, Any], memory: str | None) -> None:
    """Whole nodes with all of their memory, unless the site says otherwise."""
    assert SiteConfig(**keys).memory == memory


@pytest.mark.parametrize("time", ["12", "11:30", "0:12:00", "0-1", "0-0:12", "0-0:11:01", "1-00:00:00", "0"])
def test_times_with_room_before_the_notice(time: str) -> None:
    """Slurm's six forms, of which 12 minutes and more are more than 600 s and a minute; 0 is no limit."""
    assert load_site(None, [f'time="{time}"']).time == time


def test_every_key_is_read_and_documented() -> None:
    code = "".join(path.read_text() for path in (ROOT / "launchers").glob("*.py") if path.name != "site.py")
    table = (ROOT / "docs" / "slurm.md").read_text().partition("## SITE.yaml")[2].partition("\n## ")[0]
    documented = {
        name: default
        for names, default in re.findall(r"^\| (`.*?`) \| `(.*?)` \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    defaults = strict.to_tree(SiteConfig, SiteConfig())
    for name, value in defaults.items():
        name_ = {"ranks_per_node": "slots_per_node", "servers": "servers_place", "mem": "memory"}.get(name, name)
        assert re.search(rf"(site|place)\.{name_}\b", code), name
        assert strict.parse_yaml(documented.pop(name), name) == value, name
    assert not documented


def test_overrides_are_told_apart() -> None:
    run, site = split_overrides(["steps=3", "site.time=01:00:00", "site.env.A=b"])
    assert run == ["steps=3"] and site == ["time=01:00:00", "env.A=b"]
    changed = load_site(None, site)
    assert (changed.time, changed.env) == ("01:00:00", {"A": "b"})
