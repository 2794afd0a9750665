"""What this machine has, which features that allows, and what to install for the rest. Changes nothing."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lens_megatron.machine import GIB, Machine

# ok: there and usable.  missing: not there.  wrong: there, but unusable or harmful.
Status = Literal["ok", "missing", "wrong"]

TORCH_MINIMUM = (2, 11)
MEGATRON_CORE = (0, 16)
TRANSFORMERS = 5
SGLANG_TESTED = "0.5.21"
# the range that megatron-core 0.16 itself declares (its `dev` extra)
TRANSFORMER_ENGINE = ((2, 9), (2, 12))
OLDEST_CAPABILITY = (8, 0)  # bf16 arithmetic needs this compute capability

# One child process imports torch, so that a broken driver or library ends that process and not this one.
_TORCH_QUESTIONS = """
import json, torch
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "cuda_build": torch.version.cuda,
    "cuda": cuda,
    "devices": [[d.name, d.total_memory, [d.major, d.minor]] for d in devices],
    "nccl": list(torch.cuda.nccl.version()) if cuda and torch.distributed.is_nccl_available() else None,
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
}))
"""


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    found: str
    enables: str
    advice: str = ""  # what to install or change; empty when nothing is to do
    essential: bool = False  # nothing trains without it, not even on CPU

    @property
    def blocks(self) -> bool:
        return self.essential and self.status != "ok"


def diagnose(machine: Machine | None = None, folder: Path | None = None) -> list[Finding]:
    """`folder`: where runs will be written (its disk is looked at)."""
    machine = machine or Machine()
    torch_facts = _torch_facts(machine)
    return [
        _python(machine),
        _torch(machine, torch_facts),
        _megatron_core(machine),
        _transformers(machine),
        _psutil(machine),
        *_gpu(machine, torch_facts),
        _transformer_engine(machine, torch_facts),
        _apex(machine),
        _package(
            machine,
            "triton",
            "the fused head kernel (token log-probs without logits; unmeasured on a GPU)",
            "comes with CUDA torch",
        ),
        _package(
            machine, "nv-grouped-gemm", "grouped expert GEMM without Transformer Engine", "pip install nv-grouped-gemm"
        ),
        _sglang(machine),
        _nemo_run(machine),
        _slurm(machine),
        *_resources(machine, folder or Path.cwd()),
    ]


def can_train(findings: list[Finding]) -> bool:
    return not any(finding.blocks for finding in findings)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _python(machine: Machine) -> Finding:
    found = ".".join(str(part) for part in machine.python_version)
    good = machine.python_version >= (3, 10)
    advice = "" if good else "use Python 3.10, 3.11 or 3.12"
    return Finding("Python", "ok" if good else "wrong", found, "everything", advice, essential=True)


def _torch_facts(machine: Machine) -> dict[str, Any]:
    """What torch says of itself; {"error": ...} when it does not import; {} when it is not installed."""
    if machine.version("torch") is None:
        return {}
    output = machine.run([sys.executable, "-c", _TORCH_QUESTIONS])
    if output is None or not output.ok:
        return {"error": _last_line(output.text if output else "no python to ask")}
    facts: dict[str, Any] = json.loads(_last_line(output.text))
    return facts


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else "no message"


def _torch(machine: Machine, facts: dict[str, Any]) -> Finding:
    wanted = ".".join(str(part) for part in TORCH_MINIMUM)
    version = machine.version("torch")
    enables = "everything; gloo between processes on CPU"
    if version is None:
        return Finding("torch", "missing", "", enables, f"pip install 'torch>={wanted}'", essential=True)
    if "error" in facts:
        found = f"{version}, does not import: {facts['error']}"
        return Finding("torch", "wrong", found, enables, "reinstall torch for this machine", essential=True)
    found = f"{version}, {'CUDA ' + facts['cuda_build'] if facts['cuda_build'] else 'CPU build'}"
    if _numbers(version) < TORCH_MINIMUM:
        return Finding("torch", "wrong", found, enables, f"pip install 'torch>={wanted}'", essential=True)
    if not facts["gloo"]:
        advice = "this build has no gloo: install torch from pytorch.org"
        return Finding("torch", "wrong", found, enables, advice, essential=True)
    return Finding("torch", "ok", found, enables, essential=True)


def _megatron_core(machine: Machine) -> Finding:
    version = machine.version("megatron-core")
    enables = "the sharded model: TP, SP, PP, CP, EP, distributed optimizer"
    install = "pip install 'megatron-core>=0.16,<0.17' (without its [dev] extra, which pins other packages)"
    if version is None:
        return Finding("megatron-core", "missing", "", enables, install, essential=True)
    good = _numbers(version)[:2] == MEGATRON_CORE
    return Finding(
        "megatron-core", "ok" if good else "wrong", version, enables, "" if good else install, essential=True
    )


def _transformers(machine: Machine) -> Finding:
    version = machine.version("transformers")
    enables = "tokenizers, and the check of loaded weights against the HF model"
    install = "pip install 'transformers>=5,<6'"
    if version is None:
        return Finding("transformers", "missing", "", enables, install, essential=True)
    good = _numbers(version)[0] == TRANSFORMERS
    return Finding("transformers", "ok" if good else "wrong", version, enables, "" if good else install, essential=True)


def _psutil(machine: Machine) -> Finding:
    version = machine.version("psutil")
    enables = "checkpoints: without it megatron-core's checkpoint writer hangs for ever"
    if version is None:
        return Finding("psutil", "missing", "", enables, "pip install psutil", essential=True)
    return Finding("psutil", "ok", version, enables, essential=True)


def _gpu(machine: Machine, facts: dict[str, Any]) -> list[Finding]:
    enables = "bf16 training; without one everything still runs, small, on CPU"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    output = machine.run(query)
    if output is None:
        return [
            Finding("GPU", "missing", "no nvidia-smi", enables),
            Finding("NCCL", "missing", "", "collectives between GPUs", "comes with a CUDA build of torch"),
        ]
    if not output.ok:
        return [Finding("GPU", "wrong", _last_line(output.text), enables, "repair the NVIDIA driver")]
    rows = [[cell.strip() for cell in line.split(",")] for line in output.text.splitlines() if line.strip()]
    names = sorted({row[0] for row in rows})
    found = f"{len(rows)} x {' / '.join(names)}"
    found += f", {_gib_range(rows, 1)} GiB each, {_gib_range(rows, 2)} free, driver {rows[0][3]}"
    nccl = facts.get("nccl")
    nccl_finding = Finding(
        "NCCL",
        "ok" if nccl else "missing",
        ".".join(str(part) for part in nccl) if nccl else "",
        "collectives between GPUs",
        "" if nccl else "comes with a CUDA build of torch",
    )
    if facts and "error" not in facts and not facts["cuda"]:
        why = "torch is a CPU build" if not facts["cuda_build"] else "torch sees no device"
        advice = (
            "install a CUDA build of torch"
            if not facts["cuda_build"]
            else "driver older than torch's CUDA, or CUDA_VISIBLE_DEVICES is empty"
        )
        return [Finding("GPU", "wrong", f"{found}; {why}", enables, advice), nccl_finding]
    old = [name for name, _, capability in facts.get("devices", []) if tuple(capability) < OLDEST_CAPABILITY]
    if old:
        advice = "use cards of compute capability 8.0 or newer (A100, H100, ...)"
        return [Finding("GPU", "wrong", f"{found}; no bf16 on {old[0]}", enables, advice), nccl_finding]
    return [Finding("GPU", "ok", found, enables), nccl_finding]


def _gib_range(rows: list[list[str]], column: int) -> str:
    """nvidia-smi reports MiB, and "[N/A]" where the driver does not know."""
    amounts = sorted({round(int(row[column]) / 1024) for row in rows if row[column].isdigit()})
    if not amounts:
        return "unknown"
    return str(amounts[0]) if len(amounts) == 1 else f"{amounts[0]}-{amounts[-1]}"


def _transformer_engine(machine: Machine, facts: dict[str, Any]) -> Finding:
    enables = "fused attention with CP, fused norms, grouped experts, FP8; without it plain torch modules"
    version = machine.version("transformer-engine") or machine.version("transformer_engine")
    lowest, too_high = TRANSFORMER_ENGINE
    wanted = f">={lowest[0]}.{lowest[1]},<{too_high[0]}.{too_high[1]}"
    install = f"pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]{wanted}', or an NGC container"
    if version is None:
        return Finding("Transformer Engine", "missing", "", enables, install if facts.get("cuda") else "needs a GPU")
    output = machine.run([sys.executable, "-c", "import transformer_engine.pytorch"])
    if output is not None and not output.ok:
        # usually an "undefined symbol": built against another torch
        found = f"{version}, does not import: {_last_line(output.text)}"
        return Finding("Transformer Engine", "wrong", found, enables, f"rebuild it against this torch: {install}")
    if not lowest <= _numbers(version)[:2] < too_high:
        advice = f"megatron-core 0.16 declares {wanted}; another version may work, untested"
        return Finding("Transformer Engine", "ok", version, enables, advice)
    return Finding("Transformer Engine", "ok", version, enables)


def _apex(machine: Machine) -> Finding:
    """PyPI's `apex` is a web toolkit that shares NVIDIA's name. Told apart by files; importing it would run it."""
    enables = "fused Adam and gradient clipping where Transformer Engine is missing"
    place = machine.place("apex")
    if place is None:
        advice = "optional: build github.com/NVIDIA/apex with its CUDA extensions; never `pip install apex`"
        return Finding("NVIDIA apex", "missing", "", enables, advice)
    if not (place / "optimizers").is_dir():
        found = f"another package named apex ({machine.version('apex') or 'unknown version'}): PyPI's web toolkit"
        advice = "pip uninstall apex: it is not NVIDIA's, and megatron-core imports whatever has the name"
        return Finding("NVIDIA apex", "wrong", found, enables, advice)
    version = machine.version("apex") or "unknown version"
    if machine.place("amp_C") is None:
        found = f"{version}, without its CUDA extensions"
        return Finding("NVIDIA apex", "wrong", found, enables, "rebuild it with its CUDA extensions, or uninstall it")
    return Finding("NVIDIA apex", "ok", version, enables)


def _package(machine: Machine, name: str, enables: str, advice: str) -> Finding:
    version = machine.version(name)
    if version is None:
        return Finding(name, "missing", "", enables, advice)
    return Finding(name, "ok", version, enables)


def _sglang(machine: Machine) -> Finding:
    enables = "the SGLang rollout engine (the trainer itself talks to it over HTTP and does not import it)"
    version = machine.version("sglang")
    if version is None:
        advice = f"in an environment of its own: pip install sglang=={SGLANG_TESTED} (docs/install.md)"
        return Finding("sglang", "missing", "not in this environment", enables, advice)
    if version != SGLANG_TESTED:
        return Finding("sglang", "ok", version, enables, f"tested with {SGLANG_TESTED}")
    return Finding("sglang", "ok", version, enables)


def _nemo_run(machine: Machine) -> Finding:
    enables = "`lens-megatron launch`: local, Slurm, scaling studies"
    install = "pip install 'nemo-run==0.11.1' 'leptonai<0.47'"
    version = machine.version("nemo-run") or machine.version("nemo_run")
    if version is None:
        return Finding("nemo-run", "missing", "", enables, install)
    lepton = machine.version("leptonai")
    if lepton is not None and _numbers(lepton)[:2] >= (0, 47):
        found = f"{version} with leptonai {lepton}: import nemo_run fails"
        return Finding("nemo-run", "wrong", found, enables, install)
    return Finding("nemo-run", "ok", version, enables)


def _slurm(machine: Machine) -> Finding:
    enables = "`lens-megatron launch slurm`"
    version = machine.run(["srun", "--version"])
    if version is None:
        return Finding("Slurm", "missing", "no srun", enables, "run on a login node, or launch locally")
    partitions = machine.run(["sinfo", "--noheader", "--format=%P %D nodes %G"])
    if partitions is None or not partitions.ok:
        why = "no sinfo" if partitions is None else _last_line(partitions.text)
        return Finding("Slurm", "wrong", f"{_last_line(version.text)}; {why}", enables, "the controller must answer")
    summary = "; ".join(" ".join(line.split()) for line in partitions.text.splitlines()[:4])
    return Finding("Slurm", "ok", f"{_last_line(version.text)}: {summary}", enables)


def _resources(machine: Machine, folder: Path) -> list[Finding]:
    findings = []
    memory = machine.free_memory()
    if memory is not None:
        enough = memory >= 4 * GIB
        advice = "" if enough else "close other programs: the toy run and the tests want 4 GiB"
        findings.append(
            Finding("free memory", "ok" if enough else "wrong", f"{memory / GIB:.1f} GiB", "offload; CPU runs", advice)
        )
    disk = machine.free_disk(folder)
    enough = disk >= 10 * GIB
    advice = "" if enough else "checkpoints take 18 bytes a parameter: choose run_dir on a larger disk"
    found = f"{disk / GIB:.1f} GiB in {folder}"
    findings.append(Finding("free disk", "ok" if enough else "wrong", found, "checkpoints and rollouts", advice))
    files = machine.open_files()
    enough = files >= 4096
    shown = "unlimited" if files == sys.maxsize else str(files)
    advice = "" if enough else "ulimit -n 65536"
    findings.append(Finding("open files", "ok" if enough else "wrong", shown, "many workers and connections", advice))
    shared = machine.shared_memory()
    if shared is not None:
        enough = shared >= GIB
        advice = "" if enough else "start the container with --shm-size=16g or --ipc=host"
        enables = "NCCL within a node, data workers"
        findings.append(Finding("/dev/shm", "ok" if enough else "wrong", f"{shared / GIB:.1f} GiB", enables, advice))
    if machine.system == "linux":
        devices = machine.rdma()
        enables = "NCCL between nodes at full speed"
        findings.append(Finding("RDMA", "ok" if devices else "missing", ", ".join(devices), enables))
    return findings
