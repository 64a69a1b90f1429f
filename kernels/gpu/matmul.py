"""Quantised matrices times many tokens: what a prompt does.

Owns: dequantise-and-multiply by tensor cores, and its launches for one matrix and for the experts
that tokens are grouped by. Does not know: layers, routing, who filled the address table.

Operands are rounded to bfloat16, which has float32's range, and sums are float32.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from fomoe.kernels.gpu.moe import pointer, sigmoid
from fomoe.kernels.gpu.weights import GpuWeight
from fomoe.kernels.ops import MoeSpec

# Rows of x and of the matrix in a tile, chunks of a row at a time, warps. With 64 matrix rows
# gfx1100 spills 400 bytes a thread (Triton 3.7.1).
TILE_TOKENS, TILE_ROWS, TILE_CHUNKS, WARPS = 64, 32, 4, 8
# Loads go to registers: staged in shared memory they would need more of it than cards have.
STAGES = 1
# An expert has few tokens of a chunk: 512 tokens with top 10 of 512 experts give it ten.
EXPERT_TOKENS, EXPERT_ROWS = 32, 64


@triton.jit
def _rounded(x):
    """The nearest bfloat16, ties to even, as float32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, acc, EMULATE: tl.constexpr):
    """a @ b + acc, operands rounded to bfloat16. Triton's interpreter would cut them off and then
    multiply their bits: EMULATE does what devices do."""
    if EMULATE:
        return tl.dot(_rounded(a), _rounded(b), acc, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)


@triton.jit
def tile_product(
    x_rows, x_there, weights, rows,
    TYPE: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """float32 [M, N]: rows of x at pointers `x_rows` [M] (where `x_there`) times `rows` [N] of a
    matrix, stepping through the columns by CHUNKS chunks."""
    ALL: tl.constexpr = COLS // chunk_cols(TYPE)
    row = (weights + rows * row_bytes(TYPE, COLS))[:, None]
    k = tl.arange(0, 4)[None, None, :]
    M: tl.constexpr = x_rows.shape[0]
    N: tl.constexpr = rows.shape[0]
    acc = tl.zeros([M, N], tl.float32)
    for first in range(0, ALL, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[None, :]
        there = x_there[:, None, None] & (chunk < ALL)[:, :, None]
        chunk = tl.minimum(chunk, ALL - 1)
        words, more, low, high = load_chunk(row, chunk, TYPE)
        for half in tl.static_range(num_halves(TYPE)):
            a, b = high if half else low
            for i in tl.static_range(num_quads(TYPE)):
                col = quad_col(chunk, TYPE, i, half)[:, :, None] + k
                v = tl.load(x_rows[:, None, None] + col, there, 0.0)
                w = quad(words, more, TYPE, i, half)
                if not is_float(TYPE):
                    w = w * a[:, :, None] + b[:, :, None]
                v = v.reshape(M, CHUNKS * 4)
                acc = _dot(v, w.reshape(N, CHUNKS * 4).trans(), acc, EMULATE)
    return acc


@triton.jit
def matmul_kernel(
    x, x_stride, tokens, weights, num_rows, out, out_stride,
    TYPE: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out[t, r] (+)= weights[r] . x[t]; the grid is (tiles of rows, tiles of tokens)."""
    token = tl.program_id(1) * M + tl.arange(0, M)
    row = tl.program_id(0) * N + tl.arange(0, N)
    there = token < tokens
    rows = tl.minimum(row, num_rows - 1).to(tl.int64)
    x_rows = x + token.to(tl.int64) * x_stride
    y = tile_product(x_rows, there, weights, rows, TYPE, COLS, CHUNKS, EMULATE)
    at = out + token.to(tl.int64)[:, None] * out_stride + row[None, :]
    mask = there[:, None] & (row < num_rows)[None, :]
    if ADD:
        y += tl.load(at, mask, 0.0)
    tl.store(at, y, mask)


@triton.jit
def grouped_gate_up_kernel(
    h, h_stride, order, tiles, ends, table, act,
    GATE_TYPE: tl.constexpr, UP_TYPE: tl.constexpr, COLS: tl.constexpr, FF: tl.constexpr,
    TOP_K: tl.constexpr, GATE_CHUNKS: tl.constexpr, UP_CHUNKS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """As gate_up_kernel, for tiles of M picks of one expert; the grid is (tiles of ff, tiles)."""
    expert = tl.load(tiles + tl.program_id(1) * 2)
    if expert >= 0:
        gate_address = tl.load(table + expert * 3)
        if gate_address != 0:
            up_address = tl.load(table + expert * 3 + 1)
            place = tl.load(tiles + tl.program_id(1) * 2 + 1) + tl.arange(0, M)
            there = place < tl.load(ends + expert)
            pick = tl.load(order + place, there, 0)
            x_rows = h + (pick // TOP_K) * h_stride
            row = tl.program_id(0) * N + tl.arange(0, N)
            rows = tl.minimum(row, FF - 1).to(tl.int64)
            gate = pointer(gate_address)
            up = pointer(up_address)
            g = tile_product(x_rows, there, gate, rows, GATE_TYPE, COLS, GATE_CHUNKS, EMULATE)
            u = tile_product(x_rows, there, up, rows, UP_TYPE, COLS, UP_CHUNKS, EMULATE)
            at = act + pick[:, None] * FF + row[None, :]
            tl.store(at, g * sigmoid(g) * u, there[:, None] & (row < FF)[None, :])


@triton.jit
def grouped_down_kernel(
    act, order, tiles, ends, table, out,
    TYPE: tl.constexpr, HIDDEN: tl.constexpr, FF: tl.constexpr, CHUNKS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """As down_kernel, for tiles of M picks of one expert; the grid is (tiles of hidden, tiles)."""
    expert = tl.load(tiles + tl.program_id(1) * 2)
    if expert >= 0:
        address = tl.load(table + expert * 3 + 2)
        if address != 0:
            place = tl.load(tiles + tl.program_id(1) * 2 + 1) + tl.arange(0, M)
            there = place < tl.load(ends + expert)
            pick = tl.load(order + place, there, 0)
            row = tl.program_id(0) * N + tl.arange(0, N)
            rows = tl.minimum(row, HIDDEN - 1).to(tl.int64)
            down = pointer(address)
            y = tile_product(act + pick * FF, there, down, rows, TYPE, FF, CHUNKS, EMULATE)
            at = out + pick[:, None] * HIDDEN + row[None, :]
            tl.store(at, y, there[:, None] & (row < HIDDEN)[None, :])


def matmul(x: Any, weight: GpuWeight, out: Any, *, add: bool = False) -> None:
    """out = x @ weight.T, or += with `add`; float32 [tokens, cols] and [tokens, rows], rows of both
    contiguous, columns a multiple of 32."""
    tokens, cols = x.shape
    assert weight.cols == cols
    assert cols % 32 == 0, cols
    assert out.shape == (tokens, weight.rows)
    assert x.stride(1) == 1
    assert out.stride(1) == 1
    matmul_kernel[(triton.cdiv(weight.rows, TILE_ROWS), triton.cdiv(tokens, TILE_TOKENS))](
        x, x.stride(0), tokens, weight.data, weight.rows, out, out.stride(0),
        TYPE=weight.type.name, COLS=cols, CHUNKS=tile_chunks(weight.type.name),
        M=TILE_TOKENS, N=TILE_ROWS, ADD=add, EMULATE=_interpreted(x),
        num_warps=WARPS, num_stages=STAGES, **OPTIONS,
    )  # fmt: skip


def _interpreted(x: Any) -> bool:
    return bool(x.device.type == "cpu")


def tile_chunks(type_name: str) -> int:
    """Chunks of a tile: quads of four columns each make the depth of a product, 16 at least."""
    return max(TILE_CHUNKS, 32 // int(chunk_cols(type_name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Picks sorted by expert, on the device: `order` int64 [picks] the picks' numbers, `ends` int64
    [experts] where an expert's end, `tiles` int64 [n, 2] (expert or -1, first place in order)."""

    order: Any
    ends: Any
    tiles: Any


def group(ids: Any, num_experts: int) -> Groups:
    """Groups of ids int32 [tokens, top_k]; nothing is waited for.

    The number of tiles is the most that any routing could need, so that it needs not be known.
    """
    flat = ids.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    ends = torch.cumsum(counts, 0)
    tile_counts = (counts + EXPERT_TOKENS - 1) // EXPERT_TOKENS
    tile_ends = torch.cumsum(tile_counts, 0)
    # Each of the picks or experts adds at most one tile to those that are full.
    most = flat.numel() // EXPERT_TOKENS + min(num_experts, flat.numel())
    tile = torch.arange(most, device=ids.device)
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp_(max=num_experts - 1)
    nth = tile - (tile_ends - tile_counts)[expert]
    first = (ends - counts)[expert] + nth * EXPERT_TOKENS
    used = tile < tile_ends[-1]
    return Groups(order=order, ends=ends, tiles=torch.stack([expert.where(used, -1), first], 1))


def grouped_gate_up(spec: MoeSpec, h: Any, groups: Groups, table: Any, act: Any) -> None:
    """As moe.gate_up, for many tokens."""
    assert h.stride(1) == 1
    picks = groups.order.numel()
    assert act.shape == (picks, spec.ff)
    assert act.is_contiguous()
    gate, up = spec.gate_type.name, spec.up_type.name
    grouped_gate_up_kernel[(triton.cdiv(spec.ff, EXPERT_ROWS), len(groups.tiles))](
        h, h.stride(0), groups.order, groups.tiles, groups.ends, table, act,
        GATE_TYPE=gate, UP_TYPE=up, COLS=spec.hidden, FF=spec.ff, TOP_K=picks // len(h),
        GATE_CHUNKS=tile_chunks(gate), UP_CHUNKS=tile_chunks(up),
        M=EXPERT_TOKENS, N=EXPERT_ROWS, EMULATE=_interpreted(act), num_warps=WARPS,
        num_stages=STAGES, **OPTIONS,
    )  # fmt: skip


def grouped_down(spec: MoeSpec, act: Any, groups: Groups, table: Any, out: Any) -> None:
    """As moe.down, for many tokens."""
    picks = groups.order.numel()
    assert act.shape == (picks, spec.ff)
    assert out.shape == (picks, spec.hidden)
    assert act.is_contiguous()
    assert out.is_contiguous()
    name = spec.down_type.name
    grouped_down_kernel[(triton.cdiv(spec.hidden, EXPERT_ROWS), len(groups.tiles))](
        act, groups.order, groups.tiles, groups.ends, table, out,
        TYPE=name, HIDDEN=spec.hidden, FF=spec.ff, CHUNKS=tile_chunks(name),
        M=EXPERT_TOKENS, N=EXPERT_ROWS, EMULATE=_interpreted(act), num_warps=WARPS,
        num_stages=STAGES, **OPTIONS,
    )  # fmt: skip
