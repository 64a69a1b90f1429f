"""Every kernel compiled for cards that are not here, and what the result says of it.

Owns: the list of kernels with the shapes of a large model, and the reading of registers, spills
and loads from the machine code. Does not know: how kernels are launched.

    python -m fomoe.kernels.gpu.compile sm_90 gfx1200     prints a table; --json the same as JSON

Triton's interpreter must be off (no TRITON_INTERPRET).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fomoe.kernels.gpu import embed, matmul, matvec, moe
from fomoe.kernels.gpu.compile_layers import layer_kernels
from fomoe.kernels.gpu.kernel import Kernel
from fomoe.kernels.gpu.launch import OPTIONS, row_shape

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_120": GPUTarget("cuda", 120, 32),  # RTX 5090
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1200": GPUTarget("hip", "gfx1200", 32),  # RX 9060 XT
}
HIDDEN, FF, TOP_K = 4096, 1024, 10  # Qwen3.5-397B
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "IQ4_XS", "MXFP4", "F16", "BF16", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the machine code of a kernel says. Bytes and registers are those of one thread, but for
    `shared_bytes`; `loads` counts the load instructions from device memory by their bytes."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide: bool
    loads: dict[int, int] = field(default_factory=dict)


# Types whose blocks are a multiple of 16 bytes. The others' words are loaded from the next lower
# multiple of four and shifted; AMD's cards load 16 bytes from there all the same.
WIDE = frozenset(("Q4_K", "Q5_K", "F16", "BF16", "F32"))


def kernels(arch: str) -> list[Kernel]:
    """Every kernel, with each type that it is written for in at least one of them."""
    made = [_matvec(name, HIDDEN, arch) for name in TYPES]
    made += [_gate_up("Q4_K", arch), _down("Q4_K", arch), _down("Q6_K", arch), _combine()]
    made += [_matmul(name) for name in ("Q4_K", "Q6_K", "F16")]
    made += [_grouped_gate_up("Q4_K"), _grouped_down("Q6_K"), _embed("Q4_K")]
    return [*made, *layer_kernels(arch)]


def _matvec(name: str, cols: int, arch: str) -> Kernel:
    shape = row_shape(name, cols, arch)
    return Kernel(
        name=f"matvec {name}",
        function=matvec.matvec_kernel,
        arguments={
            "x": "*fp32", "x_stride": "i32", "tokens": "i32",
            **{f"w{i}": "*u8" for i in range(4)}, **{f"o{i}": "*fp32" for i in range(4)},
            **{f"s{i}": "i32" for i in range(4)}, **{f"n{i}": "i32" for i in range(4)},
        },
        constants={
            "TYPE": name, "COLS": cols, "ROWS": shape.rows, "LANES": shape.lanes, "TOKENS": 1,
            "ADD": False,
        },
        warps=shape.warps,
        wide=name in WIDE,
    )  # fmt: skip


def _gate_up(name: str, arch: str) -> Kernel:
    shape = row_shape(name, HIDDEN, arch)
    return Kernel(
        name=f"gate_up {name}",
        function=moe.gate_up_kernel,
        arguments={"h": "*fp32", "h_stride": "i32", "ids": "*i32", "table": "*i64", "act": "*fp32"},
        constants={
            "GATE_TYPE": name, "UP_TYPE": name, "COLS": HIDDEN, "FF": FF, "TOP_K": TOP_K,
            "ROWS": shape.rows, "LANES": shape.lanes,
        },
        warps=shape.warps,
        wide=name in WIDE,
    )  # fmt: skip


def _down(name: str, arch: str) -> Kernel:
    shape = row_shape(name, FF, arch)
    return Kernel(
        name=f"down {name}",
        function=moe.down_kernel,
        arguments={"act": "*fp32", "ids": "*i32", "table": "*i64", "out": "*fp32"},
        constants={
            "TYPE": name, "HIDDEN": HIDDEN, "FF": FF, "ROWS": shape.rows, "LANES": shape.lanes,
        },
        warps=shape.warps,
        wide=name in WIDE,
    )  # fmt: skip


def _combine() -> Kernel:
    return Kernel(
        name="combine",
        function=moe.combine_kernel,
        arguments={
            "x": "*fp32", "x_stride": "i32", "out": "*fp32", "weights": "*fp32",
            "shared": "*fp32", "shared_stride": "i32", "gate": "*fp32", "gate_stride": "i32",
        },
        constants={
            "HIDDEN": HIDDEN, "TOP_K": TOP_K, "HAS_SHARED": True, "HAS_GATE": True, "BLOCK": 1024,
        },
        warps=4,
        wide=True,
    )  # fmt: skip


def _matmul(name: str) -> Kernel:
    return Kernel(
        name=f"matmul {name}",
        function=matmul.matmul_kernel,
        arguments={
            "x": "*fp32", "x_stride": "i32", "tokens": "i32", "weights": "*u8", "num_rows": "i32",
            "out": "*fp32", "out_stride": "i32",
        },
        constants={
            "TYPE": name, "COLS": HIDDEN, "CHUNKS": matmul.tile_chunks(name),
            "M": matmul.TILE_TOKENS, "N": matmul.TILE_ROWS, "ADD": False, "EMULATE": False,
        },
        warps=matmul.WARPS,
        stages=matmul.STAGES,
        wide=False,
    )  # fmt: skip


def _grouped_gate_up(name: str) -> Kernel:
    chunks = matmul.tile_chunks(name)
    return Kernel(
        name=f"grouped gate_up {name}",
        function=matmul.grouped_gate_up_kernel,
        arguments={
            "h": "*fp32", "h_stride": "i32", "order": "*i64", "tiles": "*i64", "ends": "*i64",
            "table": "*i64", "act": "*fp32",
        },
        constants={
            "GATE_TYPE": name, "UP_TYPE": name, "COLS": HIDDEN, "FF": FF, "TOP_K": TOP_K,
            "GATE_CHUNKS": chunks, "UP_CHUNKS": chunks, "M": matmul.EXPERT_TOKENS,
            "N": matmul.EXPERT_ROWS, "EMULATE": False,
        },
        warps=matmul.WARPS,
        stages=matmul.STAGES,
        wide=False,
    )  # fmt: skip


def _grouped_down(name: str) -> Kernel:
    return Kernel(
        name=f"grouped down {name}",
        function=matmul.grouped_down_kernel,
        arguments={
            "act": "*fp32", "order": "*i64", "tiles": "*i64", "ends": "*i64", "table": "*i64",
            "out": "*fp32",
        },
        constants={
            "TYPE": name, "HIDDEN": HIDDEN, "FF": FF, "CHUNKS": matmul.tile_chunks(name),
            "M": matmul.EXPERT_TOKENS, "N": matmul.EXPERT_ROWS, "EMULATE": False,
        },
        warps=matmul.WARPS,
        stages=matmul.STAGES,
        wide=False,
    )  # fmt: skip


def _embed(name: str) -> Kernel:
    return Kernel(
        name=f"embed {name}",
        function=embed.embed_kernel,
        arguments={"rows": "*u8", "out": "*fp32", "ld_out": "i32"},
        constants={"TYPE": name, "COLS": HIDDEN, "LANES": embed.LANES},
        warps=embed.WARPS,
        wide=name in WIDE,
    )


def compile_kernel(kernel: Kernel, target: str) -> Compiled:
    """Compiles for a target that needs not be here, and reads the machine code."""
    names = kernel.function.arg_names
    signature = {name: kernel.arguments.get(name, "constexpr") for name in names}
    # What the launcher finds out by itself: pointers and row strides are multiples of 16.
    aligned = [
        i
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n.endswith("_stride") or n.startswith("ld_")
    ]
    source = ASTSource(
        fn=kernel.function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, **OPTIONS}
    made = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_amdgcn if target.startswith("gfx") else _read_cubin
    registers, spill_bytes, loads = read(made.asm)
    return Compiled(
        kernel=kernel.name,
        target=target,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=int(made.metadata.shared),
        wide=kernel.wide,
        loads=loads,
    )


def _read_cubin(asm: Any) -> tuple[int, int, dict[int, int]]:
    """Registers, bytes of stack (spills: the kernels have no arrays) and loads by bytes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (registers,), (stack,) = re.findall(r"REG:(\d+)", text), re.findall(r"STACK:(\d+)", text)
    loads: dict[int, int] = {}
    for count, bits in re.findall(r"ld\.global\S*?\.(?:v(\d)\.)?b(\d+)\b", asm["ptx"]):
        size = int(count or 1) * int(bits) // 8
        loads[size] = loads.get(size, 0) + 1
    return int(registers), int(stack), loads


def _read_amdgcn(asm: Any) -> tuple[int, int, dict[int, int]]:
    text = asm["amdgcn"]
    (registers,) = re.findall(r"\.vgpr_count:\s*(\d+)", text)
    (private,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
    loads: dict[int, int] = {}
    load = r"^\s+(?:global|buffer|flat)_load_(?:d16_)?(?:hi_)?[bui](\d+)"
    for bits in re.findall(load, text, re.MULTILINE):
        loads[int(bits) // 8] = loads.get(int(bits) // 8, 0) + 1
    return int(registers), int(private), loads


def table(results: Sequence[Compiled]) -> str:
    """One line a kernel and target."""
    lines = [
        f"{'kernel':<22}{'target':<9}{'registers':>9}{'spilled':>9}{'shared':>8}  loads by bytes"
    ]
    for r in results:
        loads = ", ".join(f"{size}: {r.loads[size]}" for size in sorted(r.loads, reverse=True))
        lines.append(
            f"{r.kernel:<22}{r.target:<9}{r.registers:>9}{r.spill_bytes:>9}"
            f"{r.shared_bytes:>8}  {loads}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel, and read the result")
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--only", action="append", metavar="NAME", help="a kernel; may be repeated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    results = [
        compile_kernel(kernel, target)
        for target in options.targets
        for kernel in kernels(target)
        if options.only is None or kernel.name in options.only
    ]
    if options.json:
        json.dump([asdict(r) for r in results], sys.stdout, indent=1)
    else:
        print(table(results))


if __name__ == "__main__":
    main()
