"""The routed experts of a layer on the device: few tokens, straight from quantised slots.

Owns: the products of picked experts, found by a table of addresses on the device, and the weighted
sum. Does not know: who filled the table, routing, copies.

A pick is a (token, rank); its number is token * top_k + rank. A launch computes the picks whose
expert has an address in the table and leaves the others alone, so that what arrives later is
computed by a later launch, from another table, into the same outputs. Every pick has an output of
its own and `combine` sums them by rank: the sum does not depend on the order of arrival.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fomoe.kernels.gpu.launch import OPTIONS, arch_of, row_shape
from fomoe.kernels.gpu.matvec import dot_rows
from fomoe.kernels.ops import MoeSpec

# Columns of the address table, int64 [experts, 3]; 0 where the expert is not to be computed.
GATE, UP, DOWN = range(3)


@triton.jit
def pointer(address):
    """Bytes at a 16-byte aligned device address."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def _rows_of(address, first, num_rows, ROWS: tl.constexpr):
    """Pointer to a matrix in device memory, and ROWS of its rows that exist."""
    return pointer(address), tl.minimum(first + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)


@triton.jit
def sigmoid(x):
    z = tl.exp(-tl.abs(x))
    return tl.where(x < 0, z, 1.0) / (1.0 + z)


@triton.jit
def gate_up_kernel(
    h, h_stride, ids, table, act,
    GATE_TYPE: tl.constexpr, UP_TYPE: tl.constexpr, COLS: tl.constexpr, FF: tl.constexpr,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """act[pick] = silu(gate @ h) * (up @ h); the grid is (rows of ff, picks)."""
    first = tl.program_id(0) * ROWS
    pick = tl.program_id(1)
    entry = table + tl.load(ids + pick).to(tl.int64) * 3
    gate_address = tl.load(entry)
    if gate_address != 0:
        gate, rows = _rows_of(gate_address, first, FF, ROWS)
        up, rows = _rows_of(tl.load(entry + 1), first, FF, ROWS)
        x = h + (pick // TOP_K) * h_stride
        g = dot_rows(x, 0, 1, gate, rows, GATE_TYPE, COLS, LANES, 1)
        u = dot_rows(x, 0, 1, up, rows, UP_TYPE, COLS, LANES, 1)
        row = first + tl.arange(0, ROWS)[None, :]
        tl.store(act + pick.to(tl.int64) * FF + row, g * sigmoid(g) * u, row < FF)


@triton.jit
def down_kernel(
    act, ids, table, out,
    TYPE: tl.constexpr, HIDDEN: tl.constexpr, FF: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out[pick] = down @ act[pick]; the grid is (rows of hidden, picks)."""
    first = tl.program_id(0) * ROWS
    pick = tl.program_id(1)
    address = tl.load(table + tl.load(ids + pick).to(tl.int64) * 3 + 2)
    if address != 0:
        down, rows = _rows_of(address, first, HIDDEN, ROWS)
        y = dot_rows(act + pick.to(tl.int64) * FF, 0, 1, down, rows, TYPE, FF, LANES, 1)
        row = first + tl.arange(0, ROWS)[None, :]
        tl.store(out + pick.to(tl.int64) * HIDDEN + row, y, row < HIDDEN)


@triton.jit
def combine_kernel(
    x, x_stride, out, weights, shared, shared_stride, gate, gate_stride,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, HAS_SHARED: tl.constexpr, HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x[t] += sum over ranks of weight * out + sigmoid(gate) * shared; grid (columns, tokens)."""
    token = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = col < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for rank in range(TOP_K):
        pick = token * TOP_K + rank
        total += tl.load(weights + pick) * tl.load(out + pick * HIDDEN + col, there, 0.0)
    if HAS_SHARED:
        y = tl.load(shared + token * shared_stride + col, there, 0.0)
        if HAS_GATE:
            y *= sigmoid(tl.load(gate + token * gate_stride))
        total += y
    at = x + token * x_stride + col
    tl.store(at, tl.load(at, there, 0.0) + total, there)


def gate_up(spec: MoeSpec, h: Any, ids: Any, table: Any, act: Any) -> None:
    """act[pick] = silu(gate @ h[token]) * (up @ h[token]) for the picks that `table` has.

    h float32 [tokens, hidden], ids int32 [tokens, top_k], table int64 [num_experts, 3] of device
    addresses (gate, up, down; 16-byte aligned, 0: leave the pick alone), act float32
    [tokens * top_k, ff]; all on one device, contiguous but for h's rows.
    """
    assert h.shape[1] == spec.hidden
    assert h.stride(1) == 1
    _check(spec, ids, table)
    assert act.shape == (ids.numel(), spec.ff)
    assert act.is_contiguous()
    # One shape for both: they differ in type only in odd mixes.
    shape = row_shape(spec.gate_type.name, spec.hidden, arch_of(str(h.device)))
    gate_up_kernel[(triton.cdiv(spec.ff, shape.rows), ids.numel())](
        h, h.stride(0), ids, table, act,
        GATE_TYPE=spec.gate_type.name, UP_TYPE=spec.up_type.name, COLS=spec.hidden, FF=spec.ff,
        TOP_K=ids.shape[1], ROWS=shape.rows, LANES=shape.lanes, num_warps=shape.warps, **OPTIONS,
    )  # fmt: skip


def down(spec: MoeSpec, act: Any, ids: Any, table: Any, out: Any) -> None:
    """out[pick] = down @ act[pick] for the picks that `table` has; out float32
    [tokens * top_k, hidden], the others as for `gate_up`."""
    _check(spec, ids, table)
    assert act.shape == (ids.numel(), spec.ff)
    assert out.shape == (ids.numel(), spec.hidden)
    assert act.is_contiguous()
    assert out.is_contiguous()
    shape = row_shape(spec.down_type.name, spec.ff, arch_of(str(act.device)))
    down_kernel[(triton.cdiv(spec.hidden, shape.rows), ids.numel())](
        act, ids, table, out,
        TYPE=spec.down_type.name, HIDDEN=spec.hidden, FF=spec.ff, ROWS=shape.rows,
        LANES=shape.lanes, num_warps=shape.warps, **OPTIONS,
    )  # fmt: skip


def combine(
    x: Any, out: Any, weights: Any, shared: Any | None = None, shared_gate: Any | None = None
) -> None:
    """x[t] += sum over ranks of weights[t, rank] * out[pick], + shared[t] where there is one, times
    sigmoid(shared_gate[t]) where there is that.

    x and shared float32 [tokens, hidden], weights float32 [tokens, top_k], shared_gate [tokens, 1].
    """
    tokens, hidden = x.shape
    assert weights.is_contiguous()
    assert out.shape == (weights.numel(), hidden)
    assert out.is_contiguous()
    assert x.stride(1) == 1
    assert shared is None or shared.stride(1) == 1
    block = min(1024, triton.next_power_of_2(hidden))
    combine_kernel[(triton.cdiv(hidden, block), tokens)](
        x, x.stride(0), out, weights,
        x if shared is None else shared, 0 if shared is None else shared.stride(0),
        x if shared_gate is None else shared_gate,
        0 if shared_gate is None else shared_gate.stride(0),
        HIDDEN=hidden, TOP_K=weights.shape[1], HAS_SHARED=shared is not None,
        HAS_GATE=shared_gate is not None, BLOCK=block, num_warps=4, **OPTIONS,
    )  # fmt: skip


def _check(spec: MoeSpec, ids: Any, table: Any) -> None:
    assert table.shape == (spec.num_experts, 3)
    assert table.is_contiguous()
    assert ids.is_contiguous()
