"""What the tests with a real SGLang server share; other folders import these fixtures by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_schema import IN_PLACE_ARGUMENTS
from lens_megatron.rollout.sglang_server import UNSYNCED, ServerProcess
from tests import tiny_models
from tests.distributed.pool import WorkerPool
from tests.rollout import tiny

from .engines import sglang_engine
from .server import LONGEST, cpu_config, servers

# files whose tests share session-wide servers: `make test-sglang` has two workers, and one of them runs them all
TOGETHER = (
    {"test_conformance.py", "test_engines.py", "test_spoiled_answers.py"},
    {"test_weight_sync.py", "test_weight_sync_faults.py"},
)


def worker_scope(node: str) -> str:
    """What one worker runs whole: a file, or all files that share servers."""
    file = node.partition("::")[0]
    together = [files for files in TOGETHER if Path(file).name in files]
    return " ".join(sorted(together[0])) if together else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return worker_scope(nodeid)

    return ByServers(config, log)


def save_tiny(seed: int, folder: Path) -> None:
    net = tiny.model(seed, tied=False)
    net.config.max_position_embeddings = LONGEST  # its rotary embedding has no limit of its own
    net.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/rollout/tiny.model(0), untied, as an HF folder with room for longer responses."""
    folder = tmp_path_factory.mktemp("sglang") / "model"
    save_tiny(0, folder)
    return folder


@pytest.fixture(scope="session")
def real_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for the whole session: whoever changes its weights puts them back."""
    config = cpu_config(args={"context_length": LONGEST})  # told, so that an engine that knows no model refuses by it
    with servers(tiny_folder, tmp_path_factory.mktemp("logs"), config=config) as (server,):
        yield server


@pytest.fixture(scope="session")
def one_engine(real_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """An engine of the session's server, which it does not own; whoever uses it gives it weights first."""
    folder = tmp_path_factory.mktemp("key")
    (folder / "key").write_text(real_server.api_key)
    limits = {"control_timeout_s": 60.0, "silence_s": 60.0, "start_timeout_s": 10.0}
    config = ServerConfig(urls=(real_server.url,), api_key_file=str(folder / "key"), **limits)
    with sglang_engine(folder, folder, config) as engine:
        yield engine


@pytest.fixture(scope="session")
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def client(real_server: ServerProcess, loop: EventLoop, tiny_folder: Path) -> Iterator[SGLangClient]:
    """Of the session's server, with the weights that it was started with."""
    client = SGLangClient(real_server.url, real_server.api_key, timeout_s=60.0)
    if loop.run(client.weight_version()) != UNSYNCED:
        loop.run(client.update_weights_from_disk(str(tiny_folder), UNSYNCED))
    yield client
    loop.run(client.close())


# of weight sync: trainer's ranks, and two servers that the tests of faults use up at the end


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With an inner size that SGLang's CPU engine does not pad, so that its checksums can be compared."""
    place = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models._SHAPE, "intermediate_size", 64)
        patch.setitem(tiny_models._SHAPE, "max_position_embeddings", LONGEST)
        tiny_models.save_hf("qwen3", place / "qwen3")
        model = tiny_models.hf_model("qwen3_tied", seed=3)
        model.to(torch.bfloat16).save_pretrained(place / "tied_bf16")
    return {path.name: path for path in place.iterdir()}


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    # they may be given weights in place, which is one more thing to do with them
    config = cpu_config(args=IN_PLACE_ARGUMENTS)
    with servers(folders["qwen3"], tmp_path_factory.mktemp("logs"), count=2, config=config) as started:
        yield started
