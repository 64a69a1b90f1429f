"""How many rows and warps a program of a kernel gets.

Owns: the choice, by the type's chunks and the device. Does not know: what the kernels compute.

Rows share the activations in registers, so more of them mean fewer instructions a byte, but fewer
programs and more registers. Cards whose memory outruns their arithmetic take eight: about 5
instructions a weight are a third of what an RTX 5090 can issue while it streams Q4_K, and nearly
all of what an H100 can. Counted in the compiled code; `tools/gpu_check` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton

from fomoe.kernels.gpu.blocks import chunk_cols

# fp_fusion: a * b + c in one instruction; what Triton does by default changes with its version.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}

WARP = 32
MAX_WARPS = 4
DEFAULT_ROWS = 4
# The interpreter's time is that of its operations, however many rows they have.
ROWS_OF_ARCH: dict[str, int] = {"sm_80": 8, "sm_90": 8, "sm_100": 8, "cpu": 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """A program computes `rows` rows, `lanes` chunks of each at a time, with `warps` warps."""

    rows: int
    lanes: int
    warps: int


@cache
def arch_of(device: str) -> str:
    """sm_90, gfx1200, ... of a torch device; "cpu" under the interpreter."""
    import torch

    if torch.device(device).type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def row_shape(type_name: str, cols: int, arch: str) -> RowShape:
    """The shape for products of rows of `cols` columns with few tokens."""
    chunks = cols // int(chunk_cols(type_name))
    warps = min(MAX_WARPS, triton.next_power_of_2(-(-chunks // WARP)))
    return RowShape(rows=ROWS_OF_ARCH.get(arch, DEFAULT_ROWS), lanes=WARP * warps, warps=warps)
