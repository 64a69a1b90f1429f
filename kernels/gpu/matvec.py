"""Quantised matrices times a few tokens: what decoding does.

Owns: the product of rows with activations, and its launch for up to four matrices of one input.
Does not know: layers, norms, experts' addresses.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from fomoe.kernels.gpu.blocks import block_bytes, sub_block
from fomoe.kernels.gpu.weights import GpuWeight

MAX_TOKENS = 8
MAX_MATRICES = 4


@triton.jit
def dot_rows(
    x, x_stride, tokens, weights, rows,
    TYPE: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """float32 [TOKENS, ROWS]: x [tokens, COLS] times the given rows of a matrix.

    `weights` points to uint8, 16-byte aligned; `rows` int64 [ROWS] must exist. Steps through the
    columns by BLOCKS of 256.
    """
    NUM_BLOCKS: tl.constexpr = (COLS + 255) // 256
    ROW_BYTES: tl.constexpr = COLS // 32 * block_bytes(TYPE) // 8
    lane = tl.arange(0, 32)
    token = tl.arange(0, TOKENS)[:, None, None]
    row = (weights + rows * ROW_BYTES)[:, None, None]
    acc = tl.zeros([TOKENS, ROWS, BLOCKS, 32], tl.float32)
    for first in range(0, NUM_BLOCKS, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        for j in tl.static_range(8):
            col = block[None, :, None] * 256 + j * 32 + lane[None, None, :]
            v = tl.load(x + token * x_stride + col, (col < COLS) & (token < tokens), 0.0)
            w = sub_block(row, block[None, :, None], lane[None, None, :], TYPE, j, COLS // 32)
            acc += v[:, None, :, :] * w[None, :, :, :]
    return tl.sum(tl.sum(acc, 3), 2)


@triton.jit
def matvec_kernel(
    x, x_stride, tokens,
    w0, w1, w2, w3, o0, o1, o2, o3, s0, s1, s2, s3, n0, n1, n2, n3,
    TYPE: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """o[t, r] (+)= w[r] . x[t] for up to four matrices, one after the other in the grid.

    Matrix i has ni rows, its output rows lie si floats apart; those that are not there have n = 0.
    """
    first = tl.program_id(0) * ROWS
    p0 = tl.cdiv(n0, ROWS) * ROWS
    p1 = p0 + tl.cdiv(n1, ROWS) * ROWS
    p2 = p1 + tl.cdiv(n2, ROWS) * ROWS
    w = tl.where(first < p0, w0, tl.where(first < p1, w1, tl.where(first < p2, w2, w3)))
    o = tl.where(first < p0, o0, tl.where(first < p1, o1, tl.where(first < p2, o2, o3)))
    s = tl.where(first < p0, s0, tl.where(first < p1, s1, tl.where(first < p2, s2, s3)))
    n = tl.where(first < p0, n0, tl.where(first < p1, n1, tl.where(first < p2, n2, n3)))
    begin = tl.where(first < p0, 0, tl.where(first < p1, p0, tl.where(first < p2, p1, p2)))
    row = first - begin + tl.arange(0, ROWS)
    rows = tl.minimum(row, n - 1).to(tl.int64)
    y = dot_rows(x, x_stride, tokens, w, rows, TYPE, COLS, ROWS, BLOCKS, TOKENS)
    token = tl.arange(0, TOKENS)[:, None]
    out = o + token * s + row[None, :]
    mask = (token < tokens) & (row < n)[None, :]
    if ADD:
        y += tl.load(out, mask, 0.0)
    tl.store(out, y, mask)


def matvec(x: Any, weights: Sequence[GpuWeight], outs: Sequence[Any], *, add: bool = False) -> None:
    """outs[i] = x @ weights[i].T, or += with `add`, for x float32 [tokens <= 8, cols].

    Any number of matrices of any supported type; those of one type share a launch. Columns must be
    a multiple of 32. Rows of x and outs are contiguous.
    """
    by_type: dict[str, list[tuple[GpuWeight, Any]]] = {}
    for weight, out in zip(weights, outs, strict=True):
        by_type.setdefault(weight.type.name, []).append((weight, out))
    for group in by_type.values():
        for i in range(0, len(group), MAX_MATRICES):
            _launch(x, group[i : i + MAX_MATRICES], add)


def _launch(x: Any, group: Sequence[tuple[GpuWeight, Any]], add: bool) -> None:
    tokens, cols = x.shape
    assert 0 < tokens <= MAX_TOKENS, tokens
    assert cols % 32 == 0, cols
    assert x.stride(1) == 1
    assert all(w.cols == cols and o.shape == (tokens, w.rows) for w, o in group)
    assert all(o.stride(1) == 1 for _, o in group)
    blocks = min(16, triton.next_power_of_2(-(-cols // 256)))
    block_rows = max(4, 64 // blocks)
    padded = [*group, *[group[0]] * (MAX_MATRICES - len(group))]
    rows = [w.rows for w, _ in group] + [0] * (MAX_MATRICES - len(group))
    matvec_kernel[(sum(-(-n // block_rows) for n in rows),)](
        x, x.stride(0), tokens,
        *(w.data for w, _ in padded), *(o for _, o in padded), *(o.stride(0) for _, o in padded),
        *rows,
        TYPE=group[0][0].type.name, COLS=cols, ROWS=block_rows, BLOCKS=blocks,
        TOKENS=triton.next_power_of_2(tokens), ADD=add, num_warps=4,
    )  # fmt: skip
