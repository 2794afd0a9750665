# Every target does all its set-up: a fresh clone needs only Python >= 3.10 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One BLAS thread a process: tests run several processes on few cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1
# The tests start a thousand processes: without bytecode each compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart install test test-long test-sglang test-slurm lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	@touch $@

# Toy task, base model, GRPO and LENS on two processes, and a report to look at.
quickstart: install
	$(BIN)/lens-megatron quickstart --dir runs/quickstart

# By two workers, a file each: much of the time one process starts. A plain `pytest` does the same, one after the other.
# Pages are looked at in a browser: without chromium, and not root on Debian to install it, those tests are skipped.
test: install
	$(BIN)/python -m tests.reporting.chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Whole runs, started, killed, stalled, resumed: the minutes that keep `make test` under twenty. By two workers: a run waits
# more than it computes.
test-long: install
	$(BIN)/python -m pytest -m long -n 2 --dist worksteal

# The real SGLang server, on CPU, in an environment of its own outside the checkout (LENS_SGLANG_VENV names another).
# By two workers: much of the time one process starts. tests/sglang/conftest.py says which files share servers.
test-sglang: install
	$(BIN)/python -m tests.sglang.venv
	$(BIN)/python -m pytest -m sglang -n 2 --durations=15 tests/sglang

# A real Slurm of two nodes on this machine, started by the tests. It needs root; otherwise they are skipped and say why.
test-slurm: $(VENV)/.slurm
	$(BIN)/python -m tests.slurm.packages
	$(BIN)/python -m pytest -rs --durations=15 -m "slurm or not slurm" tests/launchers tests/slurm

$(VENV)/.slurm: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev,slurm]'
	@touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache
