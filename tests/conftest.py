"""Shapes and types of the pure functions are checked at run time in the tests, at no cost in a run."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# before any test module imports them, and for good: tests are collected, and import, one after another
install_import_hook(["lens_megatron.algorithms", "lens_megatron.purification"], "beartype.beartype")

# without a GPU, Triton's kernels are interpreted: it decides that when anything first imports it
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a shared machine stalls now and then, which is no property of the code under test
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# a shell's background jobs ignore Ctrl-C, and so would every process that the tests start and interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
_BLOCKED = signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.fixture(autouse=True)
def signals_as_at_first() -> Iterator[None]:
    """A command that runs within a test, or in a fixture of a module, deals with signals for good. What it ignores or blocks
    would be ignored and blocked in every process that a later test starts, and no shell can trap what it was born ignoring."""
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, _BLOCKED)  # first: one that waits is still ignored
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """hf_folder(kind): a tiny HF checkpoint of that family, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        from tests.tiny_models import save_hf

        if kind not in made:
            made[kind] = save_hf(kind, tmp_path_factory.mktemp("hf") / kind)
        return made[kind]

    return get


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A conformance test that was skipped proves nothing: with `-m sglang` it fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.option.markexpr == "sglang" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
