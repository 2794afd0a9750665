"""The doctor on machines that are described, not present: GPU box, NGC container, PyPI's apex, broken installs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.cli import main
from lens_megatron.doctor import Finding, can_train, diagnose
from lens_megatron.machine import GIB, Machine, Output, installed_version, module_place, run_command

CPU_TORCH = {"cuda_build": None, "cuda": False, "devices": [], "nccl": None, "gloo": True}
H100 = ["NVIDIA H100 80GB HBM3", 85_000_000_000, [9, 0]]
GPU_TORCH = {"cuda_build": "13.0", "cuda": True, "devices": [H100] * 2, "nccl": [2, 28, 3], "gloo": True}
SMI = "NVIDIA H100 80GB HBM3, 81559, 80994, 580.65.06\nNVIDIA H100 80GB HBM3, 81559, 40000, 580.65.06"

LAPTOP = {"torch": "2.13.0+cpu", "megatron-core": "0.16.1", "transformers": "5.17.0", "psutil": "7.2.2"}


def machine(
    packages: dict[str, str],
    torch: dict[str, Any] | Output = CPU_TORCH,
    programs: dict[str, Output] | None = None,
    places: dict[str, Path] | None = None,
    **other: Any,
) -> Machine:
    """`programs`: what each answers, by name; python is asked for torch's facts and to import Transformer Engine."""
    programs = programs or {}

    def run(command: Sequence[str]) -> Output | None:
        if command[0] == sys.executable:
            if "transformer_engine" in command[-1]:
                return programs.get("import transformer_engine", Output(True, ""))
            return torch if isinstance(torch, Output) else Output(True, json.dumps(torch))
        return programs.get(command[0])

    described = Machine(
        python_version=(3, 11),
        system="linux",
        version=packages.get,
        place=(places or {}).get,
        run=run,
        free_memory=lambda: 64 * GIB,
        free_disk=lambda folder: 500 * GIB,
        open_files=lambda: 65536,
        shared_memory=lambda: 16 * GIB,
        rdma=list,
    )
    return replace(described, **other)


def findings(described: Machine) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(described, Path("/runs"))}


def test_a_laptop_trains_and_learns_what_is_missing() -> None:
    found = findings(machine(LAPTOP))
    assert can_train(list(found.values()))
    assert found["torch"].found == "2.13.0+cpu, CPU build"
    for name in ("GPU", "NCCL", "Transformer Engine", "NVIDIA apex", "sglang", "nemo-run", "Slurm"):
        assert found[name].status == "missing"
    assert "never `pip install apex`" in found["NVIDIA apex"].advice
    assert "sglang==0.5.21" in found["sglang"].advice
    assert found["Transformer Engine"].advice == "needs a GPU"


@pytest.mark.parametrize(
    ("change", "culprit", "advice"),
    [
        ({"torch": None}, "torch", "torch>=2.11"),
        ({"torch": "2.10.0"}, "torch", "torch>=2.11"),
        ({"megatron-core": None}, "megatron-core", ">=0.16,<0.17"),
        ({"megatron-core": "0.17.0"}, "megatron-core", ">=0.16,<0.17"),
        ({"transformers": "4.57.1"}, "transformers", ">=5"),
        ({"psutil": None}, "psutil", "pip install psutil"),
    ],
)
def test_what_training_cannot_do_without(change: dict[str, str | None], culprit: str, advice: str) -> None:
    packages = {name: version for name, version in {**LAPTOP, **change}.items() if version is not None}
    found = findings(machine(packages))
    assert [finding.name for finding in found.values() if finding.blocks] == [culprit]
    assert not can_train(list(found.values()))
    assert advice in found[culprit].advice


def test_old_python_and_broken_torch() -> None:
    assert findings(machine(LAPTOP, python_version=(3, 9)))["Python"].blocks
    broken = Output(False, "Traceback ...\nImportError: libcudart.so.13: cannot open shared object file")
    torch = findings(machine(LAPTOP, torch=broken))["torch"]
    assert torch.blocks
    assert "libcudart.so.13" in torch.found
    assert findings(machine(LAPTOP, torch={**CPU_TORCH, "gloo": False}))["torch"].blocks


def test_torch_two_eleven_is_new_enough_although_it_sorts_before_two_nine() -> None:
    assert not findings(machine({**LAPTOP, "torch": "2.11.0"}))["torch"].blocks
    assert findings(machine({**LAPTOP, "torch": "2.9.1"}))["torch"].blocks


def test_ngc_container(tmp_path: Path) -> None:
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    packages = {
        **LAPTOP,
        "torch": "2.11.0a0+nv25.11",
        "transformer-engine": "2.9.0",
        "apex": "0.1",
        "triton": "3.5.0",
    }
    found = findings(
        machine(
            packages,
            torch=GPU_TORCH,
            programs={"nvidia-smi": Output(True, SMI)},
            places={"apex": tmp_path / "apex", "amp_C": tmp_path / "amp_C.so"},
            rdma=lambda: ["mlx5_0", "mlx5_1"],
        )
    )
    for name in ("torch", "GPU", "NCCL", "Transformer Engine", "NVIDIA apex", "triton", "RDMA"):
        assert (found[name].status, found[name].advice) == ("ok", ""), name
    assert found["GPU"].found == "2 x NVIDIA H100 80GB HBM3, 80 GiB each, 39-79 free, driver 580.65.06"
    assert found["NCCL"].found == "2.28.3"


def test_the_apex_of_pypi_is_recognised_without_importing_it(tmp_path: Path) -> None:
    place = tmp_path / "apex"
    (place / "lib").mkdir(parents=True)
    (place / "__init__.py").write_text("raise SystemExit('imported')")
    finding = findings(machine({**LAPTOP, "apex": "0.9.10.dev0"}, places={"apex": place}))["NVIDIA apex"]
    assert finding.status == "wrong"
    assert "0.9.10.dev0" in finding.found
    assert finding.advice.startswith("pip uninstall apex")


def test_apex_of_nvidia_without_its_kernels(tmp_path: Path) -> None:
    (tmp_path / "optimizers").mkdir()
    finding = findings(machine({**LAPTOP, "apex": "0.1"}, places={"apex": tmp_path}))["NVIDIA apex"]
    assert finding.status == "wrong"
    assert "without its CUDA extensions" in finding.found


def test_gpu_box_with_the_wrong_torch() -> None:
    programs = {"nvidia-smi": Output(True, SMI)}
    found = findings(machine(LAPTOP, programs=programs))
    assert found["GPU"].status == "wrong"
    assert "torch is a CPU build" in found["GPU"].found
    assert can_train(list(found.values()))  # on CPU
    hidden = {**GPU_TORCH, "cuda": False, "devices": [], "nccl": None}
    assert "CUDA_VISIBLE_DEVICES" in findings(machine(LAPTOP, torch=hidden, programs=programs))["GPU"].advice
    v100 = {**GPU_TORCH, "devices": [["Tesla V100", 32_000_000_000, [7, 0]]]}
    assert "no bf16 on Tesla V100" in findings(machine(LAPTOP, torch=v100, programs=programs))["GPU"].found


def test_gpu_whose_driver_does_not_answer_or_says_not_available() -> None:
    failed = {"nvidia-smi": Output(False, "NVIDIA-SMI has failed because it couldn't communicate with the driver.")}
    assert findings(machine(LAPTOP, programs=failed))["GPU"].status == "wrong"
    unknown = {"nvidia-smi": Output(True, "NVIDIA GB10, [N/A], [N/A], 580.95.05")}
    assert "unknown GiB each" in findings(machine(LAPTOP, torch=GPU_TORCH, programs=unknown))["GPU"].found


def test_transformer_engine_that_does_not_import_or_is_untested() -> None:
    packages = {**LAPTOP, "transformer-engine": "2.10.0"}
    symbol = {"import transformer_engine": Output(False, "ImportError: undefined symbol: _ZN3c105Error")}
    finding = findings(machine(packages, torch=GPU_TORCH, programs=symbol))["Transformer Engine"]
    assert finding.status == "wrong"
    assert "undefined symbol" in finding.found
    newer = findings(machine({**packages, "transformer-engine": "2.12.0"}, torch=GPU_TORCH))["Transformer Engine"]
    assert (newer.status, "untested" in newer.advice) == ("ok", True)


def test_slurm_nemo_run_and_sglang() -> None:
    packages = {**LAPTOP, "nemo-run": "0.11.1", "leptonai": "0.46.0", "sglang": "0.5.21"}
    slurm = {
        "srun": Output(True, "slurm 24.05.4"),
        "sinfo": Output(True, "gpu*  4 nodes gpu:h100:8\ncpu   2 nodes (null)"),
    }
    found = findings(machine(packages, programs=slurm))
    assert found["Slurm"].found == "slurm 24.05.4: gpu* 4 nodes gpu:h100:8; cpu 2 nodes (null)"
    assert {found[name].status for name in ("Slurm", "nemo-run", "sglang")} == {"ok"}
    down = findings(machine(packages, programs={**slurm, "sinfo": Output(False, "Unable to contact slurm controller")}))
    assert (down["Slurm"].status, "Unable to contact" in down["Slurm"].found) == ("wrong", True)
    assert findings(machine({**packages, "leptonai": "0.47.0"}))["nemo-run"].status == "wrong"
    assert findings(machine({**packages, "sglang": "0.5.15"}))["sglang"].advice == "tested with 0.5.21"


def test_small_limits_are_named_with_the_cure() -> None:
    found = findings(
        machine(
            LAPTOP,
            free_memory=lambda: GIB,
            free_disk=lambda folder: 2 * GIB,
            open_files=lambda: 1024,
            shared_memory=lambda: 64 * 1024**2,
        )
    )
    cures = {"free memory": "close other", "free disk": "run_dir", "open files": "ulimit -n", "/dev/shm": "--shm-size"}
    for name, cure in cures.items():
        assert found[name].status == "wrong"
        assert cure in found[name].advice
    assert "/dev/shm" not in findings(machine(LAPTOP, shared_memory=lambda: None))


def test_questions_to_this_very_machine() -> None:
    assert installed_version("torch") is not None
    assert installed_version("no-such-distribution") is None
    place = module_place("lens_megatron")
    assert place is not None
    assert place.name == "lens_megatron"
    assert module_place("no_such_module") is None
    assert run_command(["no-such-program"]) is None
    assert run_command([sys.executable, "-c", "print('a')"]) == Output(True, "a")
    failed = run_command([sys.executable, "-c", "raise SystemExit('reason')"])
    assert failed == Output(False, "reason")
    slow = run_command([sys.executable, "-c", "import time; time.sleep(9)"], timeout_s=0.2)
    assert slow is not None
    assert not slow.ok
    assert "did not answer" in slow.text


def test_asking_for_a_module_executes_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert module_place("apex") == tmp_path / "apex"


def test_the_command_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file), "--dir", str(tmp_path)]) == 0
    assert "Training can run here." in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["can_train"] is True
    by_name = {finding["name"]: finding for finding in report["findings"]}
    torch_says = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    assert by_name["torch"]["found"].startswith(torch_says.stdout.strip())


def test_the_command_exits_1_when_nothing_could_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {name: version for name, version in LAPTOP.items() if name != "megatron-core"}
    monkeypatch.setattr("lens_megatron.doctor.Machine", lambda: machine(without))
    assert main(["doctor"]) == 1
    assert "Training cannot run here: megatron-core" in capsys.readouterr().out
