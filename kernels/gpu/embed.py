"""Rows of the embedding, expanded on the device.

Owns: the kernel and its launch. Does not know: tokens, where the rows were.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fomoe.kernels.gpu.blocks import (
    chunk_cols,
    is_float,
    load_chunk,
    num_halves,
    num_quads,
    quad,
    quad_col,
    row_bytes,
)
from fomoe.kernels.gpu.launch import OPTIONS
from fomoe.kernels.table import QuantType

LANES, WARPS = 64, 2


@triton.jit
def embed_kernel(
    rows, out, ld_out, TYPE: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """out[t] = rows[t], rows being uint8 [tokens, row bytes]. Grid: tokens, blocks of LANES
    chunks."""
    CHUNKS: tl.constexpr = COLS // chunk_cols(TYPE)
    token = tl.program_id(0).to(tl.int64)
    chunk = (tl.program_id(1) * LANES + tl.arange(0, LANES))[None, :]
    there = (chunk < CHUNKS)[:, :, None]
    chunk = tl.minimum(chunk, CHUNKS - 1)
    row = rows + (token + tl.zeros([1, 1], tl.int64)) * row_bytes(TYPE, COLS)
    words, more, low, high = load_chunk(row, chunk, TYPE)
    k = tl.arange(0, 4)[None, None, :]
    for half in tl.static_range(num_halves(TYPE)):
        a, b = high if half else low
        for i in tl.static_range(num_quads(TYPE)):
            value = quad(words, more, TYPE, i, half)
            if not is_float(TYPE):
                value = value * a[:, :, None] + b[:, :, None]
            col = quad_col(chunk, TYPE, i, half)[:, :, None] + k
            tl.store(out + token * ld_out + col, value, there)


def embed(type_: QuantType, rows: torch.Tensor, out: torch.Tensor) -> None:
    """out float32 [T, cols] of rows uint8 [T, row bytes], both on the device."""
    tokens, cols = out.shape
    assert rows.shape == (tokens, type_.row_bytes(cols))
    assert rows.is_contiguous()
    assert cols % 32 == 0, cols
    assert out.stride(1) == 1
    blocks = triton.cdiv(cols // int(chunk_cols(type_.name)), LANES)
    embed_kernel[(tokens, blocks)](
        rows, out, out.stride(0), TYPE=type_.name, COLS=cols, LANES=LANES, num_warps=WARPS,
        **OPTIONS,
    )  # fmt: skip
