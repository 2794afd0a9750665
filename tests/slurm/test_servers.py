"""SGLang servers on a node of their own, found by the trainer through the run folder."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import pytest

from lens_megatron import strict
from lens_megatron.rollout.sglang_config import ServerConfig
from tests.loop.runs import metrics, rollouts
from tests.sglang import venv
from tests.sglang.server import cpu_config
from tests.slurm.conftest import Launcher

pytestmark = pytest.mark.slurm


def test_trainer_and_server_on_a_node_each(launcher: Launcher) -> None:
    """The real server on CPU: started by its node's supervisor, given new weights over the network, ended with the job."""
    if not venv.is_built():
        pytest.skip("SGLang's environment is not built here: make test-sglang builds it")
    server = strict.to_tree(ServerConfig, cpu_config())
    rollout = {
        "n": 4,
        "max_response_tokens": 12,
        "engine": "sglang",
        "servers": 1,
        "server": server,
        "sync": {"transport": "distributed", "fallback": "none", "bucket_mib": 0.02, "timeout_s": 60.0},
    }
    handle = launcher.submit(steps=2, parallel={"tp": 1}, placement="disaggregated", rollout=rollout)
    status = launcher.ended(handle)
    assert status.state == "done", (status, launcher.logs())
    assert launcher.cluster.job(handle.jobs[0])["NumNodes"] == "2"
    lines = metrics(launcher.run_dir)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["sync/probe_diff_max"] < 1e-4 and line["logprob_diff_max"] < 1e-4
        assert line["sync/servers"] == 1 and line["sync/changed_tensors"] > 0.9
    for step in (1, 2):
        assert {row.weight_version for row in rollouts(launcher.run_dir, step)} == {step - 1}
    (request,) = launcher.run_dir.glob("launch/servers.*/sglang_0.request")
    assert request.stat().st_mode & 0o077 == 0, "others can read the server's key"
    key = json.loads(request.read_text())["settings"]["api-key"]
    assert key and key not in (launcher.run_dir / "launch" / "sbatch.sh").read_text()
    url = urlsplit(json.loads(request.with_suffix(".state").read_text())["url"])
    assert url.hostname and url.port

    def ended() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((url.hostname, url.port)) != 0

    launcher.until(ended, "end of the server")
