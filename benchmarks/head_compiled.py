"""The head's kernels compiled for Hopper, without one: registers, spills, shared memory, tensor-core instructions.

    python -m benchmarks.head_compiled [--json F]

It says what a kernel cannot do (two blocks a processor, say), not how fast it is. `benchmarks/gpu.py --parts tiles` does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_REGISTERS, _SHARED = 65_536, 227 * 1024  # of a processor of an H100 or H200


@dataclass(frozen=True)
class Compiled:
    kernel: str
    tile: str
    warps: int
    stages: int
    loads: str
    registers: int
    spilled_bytes: int
    shared_kib: int
    tensor_core_products: int  # instructions in the loop over the hidden size
    blocks_a_processor: int


def compiled(kernel: Any, tiles: Any, hidden: int = 4096) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        "HIDDEN": hidden,
        "BLOCK_T": tiles.tokens,
        "BLOCK_V": tiles.rows,
        "BLOCK_H": tiles.hidden,
        "GROUP": tiles.group,
        "DESCRIPTORS": tiles.descriptors,
        "PRECISION": "tf32",
        "ENTROPY": True,
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("hidden", "weight"):
            rows = tiles.tokens if name == "hidden" else tiles.rows
            return f"tensordesc<bf16[{rows},{tiles.hidden}]>" if tiles.descriptors else "*bf16"
        pointers = {"label": "*i64", "gradient": "*bf16", "scale": "fp32"}
        fp32 = ("partial", "log_total", "entropy", "label_scale", "entropy_scale")
        return pointers.get(name, "*fp32" if name in fp32 else "i32")

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, what) in enumerate(signature.items())
        if what.startswith("*") or name.endswith("stride")
    }
    built = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )
    ptx = built.asm["ptx"]
    said = _assembled(ptx)
    registers = int(re.findall(r"Used (\d+) registers", said)[-1])
    threads, shared = 32 * tiles.warps, int(built.metadata.shared)
    return Compiled(
        kernel=kernel.fn.__name__.removesuffix("_kernel"),
        tile=f"{tiles.tokens}x{tiles.rows}x{tiles.hidden}",
        warps=tiles.warps,
        stages=tiles.stages,
        loads="descriptors" if tiles.descriptors else "pointers",
        registers=registers,
        spilled_bytes=int(re.findall(r"(\d+) bytes spill stores", said)[-1]),
        shared_kib=shared // 1024,
        tensor_core_products=ptx.count("wgmma.mma_async"),
        blocks_a_processor=min(_REGISTERS // (registers * threads), _SHARED // shared),
    )


def _assembled(ptx: str) -> str:
    """What NVIDIA's assembler, which comes with triton, says of it."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            "--gpu-name=sm_90a",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def all_compiled() -> list[Compiled]:
    os.environ.pop("TRITON_INTERPRET", None)
    from benchmarks._gpu_heads import tile_candidates
    from lens_megatron.mcore import head_kernels

    kernels = (head_kernels.statistics_kernel, head_kernels.gradient_kernel)
    # tiles that differ in their order alone are the same kernel
    tiles = {(t.tokens, t.rows, t.hidden, t.warps, t.stages, t.descriptors): t for t in tile_candidates()}
    return [compiled(kernel, tile) for tile in tiles.values() for kernel in kernels]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="the head's kernels compiled for Hopper")
    parser.add_argument("--json", metavar="F")
    given = parser.parse_args(argv)
    from benchmarks._gpu_bench import table
    from benchmarks._machine import machine

    rows = [asdict(one) for one in all_compiled()]
    print(table(rows))
    if given.json:
        Path(given.json).write_text(json.dumps({**machine(), "target": "sm_90a", "kernels": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
