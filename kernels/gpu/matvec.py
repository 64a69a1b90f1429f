"""Quantised matrices times a few tokens: what decoding does.

Owns: the product of rows with activations, and its launch for up to four matrices of one input.
Does not know: layers, norms, experts' addresses.

A program's lanes lie along the columns, a chunk of 16 bytes each, so that a warp reads 512
neighbouring bytes; every lane holds its chunk of several rows, which share the activations. All
tensors of the inner loop have one layout: nothing goes through shared memory but the last sum.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from fomoe.kernels.gpu.launch import OPTIONS, arch_of, row_shape
from fomoe.kernels.gpu.weights import GpuWeight

MAX_TOKENS = 8
MAX_MATRICES = 4


@triton.jit
def dot_rows(
    x, x_stride, tokens, weights, rows,
    TYPE: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """float32 [TOKENS, R]: x [tokens, COLS] times rows [R] of a matrix.

    `weights` points to uint8, 16-byte aligned; `rows` are int64 and must exist. Rows of x lie
    `x_stride` floats apart, a multiple of four.
    """
    CHUNKS: tl.constexpr = COLS // chunk_cols(TYPE)
    row = (weights + rows * row_bytes(TYPE, COLS))[:, None]
    token = tl.arange(0, TOKENS)[:, None, None, None]
    k = tl.arange(0, 4)[None, None, None, :]
    acc = tl.zeros([TOKENS, rows.shape[0], LANES], tl.float32)
    for first in range(0, CHUNKS, LANES):
        chunk = first + tl.arange(0, LANES)[None, :]
        # A lane beyond the row reads its last chunk, times zeros.
        there = ((chunk < CHUNKS)[:, None, :, None]) & (token < tokens)
        chunk = tl.minimum(chunk, CHUNKS - 1)
        words, more, low, high = load_chunk(row, chunk, TYPE)
        for half in tl.static_range(num_halves(TYPE)):
            dot = tl.zeros([TOKENS, rows.shape[0], LANES, 4], tl.float32)
            total = tl.zeros([TOKENS, 1, LANES, 4], tl.float32)
            for i in tl.static_range(num_quads(TYPE)):
                col = quad_col(chunk, TYPE, i, half)[:, None, :, None]
                v = tl.load(x + token * x_stride + col + k, there, 0.0)
                dot += quad(words, more, TYPE, i, half)[None, :, :, :] * v
                total += v
            if is_float(TYPE):
                acc += tl.sum(dot, 3)
            else:
                a, b = high if half else low
                acc += a[None, :, :] * tl.sum(dot, 3) + b[None, :, :] * tl.sum(total, 3)
    return tl.sum(acc, 2)


@triton.jit
def matvec_kernel(
    x, x_stride, tokens,
    w0, w1, w2, w3, o0, o1, o2, o3, s0, s1, s2, s3, n0, n1, n2, n3,
    TYPE: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
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
    y = dot_rows(x, x_stride, tokens, w, rows, TYPE, COLS, LANES, TOKENS)
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
    type_name = group[0][0].type.name
    shape = row_shape(type_name, cols, arch_of(str(x.device)))
    padded = [*group, *[group[0]] * (MAX_MATRICES - len(group))]
    rows = [w.rows for w, _ in group] + [0] * (MAX_MATRICES - len(group))
    matvec_kernel[(sum(-(-n // shape.rows) for n in rows),)](
        x, x.stride(0), tokens,
        *(w.data for w, _ in padded), *(o for _, o in padded), *(o.stride(0) for _, o in padded),
        *rows,
        TYPE=type_name, COLS=cols, ROWS=shape.rows, LANES=shape.lanes,
        TOKENS=triton.next_power_of_2(tokens), ADD=add, num_warps=shape.warps, **OPTIONS,
    )  # fmt: skip
