"""Softmax attention over the paged cache: one-token rows split over the context, and tiles of many.

Owns: the kernels and their launches: per-head norms, RoPE and append; rows; tiles. Does not know:
segments (steps.py has their tables), projections.

A row (decode) is computed by SPLITS programs a KV head, each of a stretch of the context, for all
the query heads that share it, and combined after: the launch is the same at any length.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fomoe.kernels.gpu.launch import arch_of
from fomoe.kernels.gpu.norm import sigmoid
from fomoe.kernels.gpu.rope import rotate
from fomoe.kernels.gpu.steps import TILE, Steps
from fomoe.kernels.ops import AttentionSpec, KvCache

BLOCK_H = 8  # heads that one program prepares


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """`keys` at a time, loads of so many `stages` of them under way; warps of a row's stretch;
    query rows of a part of a tile, and its warps."""

    keys: int = 32
    stages: int = 2
    row_warps: int = 4
    tile_rows: int = 32
    tile_warps: int = 8


def blocks_of(arch: str, cache_bytes: int) -> Blocks:
    """For elements of a cache of so many bytes. With heads of 256 more keys or rows spill
    registers, or take more shared memory than the 64 KiB that AMD's cards have. RDNA 3 (gfx11)
    holds the factors of its products twice: what fits elsewhere spills some 330 bytes a thread
    there. Products of float32 are sums of each thread's own: as blocks of float16 they spill 2 to 6
    KB a thread, as these none, but for AMD's cards, where it is 430 bytes."""
    if cache_bytes == 4:
        return Blocks(keys=16, stages=1, row_warps=8, tile_rows=16, tile_warps=16)
    if arch.startswith("gfx11"):
        return Blocks(keys=16, stages=1, tile_warps=16)
    return Blocks()


@triton.jit
def _prepare_heads(
    source, to, here, norm, cos, sin,
    eps, D: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate heads [D] at pointers `source` [heads, 1], where `here`. The three parts are
    loaded and stored by the same threads, so `to` may be the source."""
    half: tl.constexpr = ROPE // 2
    pair, rest = tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    in_pair, in_rest = here & (pair < half), here & (rest < D - ROPE)
    first = tl.load(source + pair, mask=in_pair, other=0.0)
    second = tl.load(source + half + pair, mask=in_pair, other=0.0)
    third = tl.load(source + ROPE + rest, mask=in_rest, other=0.0)
    if NORMED:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(third * third, 1)
        factor = 1.0 / tl.sqrt(squares / D + eps)[:, None]
        first *= factor * tl.load(norm + pair, mask=pair < half, other=0.0)
        second *= factor * tl.load(norm + half + pair, mask=pair < half, other=0.0)
        third *= factor * tl.load(norm + ROPE + rest, mask=rest < D - ROPE, other=0.0)
    first, second = rotate(first, second, cos, sin, pair, pair < half)
    kind = to.dtype.element_ty
    tl.store(to + pair, first.to(kind), mask=in_pair)
    tl.store(to + half + pair, second.to(kind), mask=in_pair)
    tl.store(to + ROPE + rest, third.to(kind), mask=in_rest)


@triton.jit
def prepare_kernel(
    q, k, v, q_norm, k_norm, cos, sin, positions, page_starts, pages, k_cache, v_cache,
    ld_q, ld_k, ld_v, page_tokens, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, Q_WIDTH: tl.constexpr,
    ROPE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, Q_NORMED: tl.constexpr, K_NORMED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate q in place and k into the cache; copy v there. Grid: rows, blocks of BLOCK_H
    heads of q, then of k, then of v."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    cos += row * (ROPE // 2)
    sin += row * (ROPE // 2)
    if block < Q_BLOCKS:
        head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
        at = q + row * ld_q + head * Q_WIDTH
        _prepare_heads(at, at, head < HEADS, q_norm, cos, sin, eps, D, ROPE, HALF, REST, Q_NORMED)
    else:
        head = ((block - Q_BLOCKS) % KV_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
        position = tl.load(positions + row)
        page = tl.load(pages + tl.load(page_starts + row) + position // page_tokens).to(tl.int64)
        to = ((page * KV_HEADS + head) * page_tokens + position % page_tokens) * D
        if block < Q_BLOCKS + KV_BLOCKS:
            _prepare_heads(
                k + row * ld_k + head * D, k_cache + to, head < KV_HEADS, k_norm, cos, sin,
                eps, D, ROPE, HALF, REST, K_NORMED,
            )  # fmt: skip
        else:
            d = tl.arange(0, BLOCK_D)[None, :]
            inside = (head < KV_HEADS) & (d < D)
            value = tl.load(v + row * ld_v + head * D + d, mask=inside, other=0.0)
            tl.store(v_cache + to + d, value.to(v_cache.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    q, k_cache, v_cache, pages, kv_head, begin, end, last, page_tokens, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend q [ROWS, BLOCK_D], in the cache's type, to the keys [begin, end); row i sees those up
    to last[i] (ROWS). Returns the running maximum and sum [ROWS] and the sums [ROWS, BLOCK_D]."""
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for at in range(begin, end, BLOCK_N):
        key = at + n
        page = tl.load(pages + key // page_tokens, mask=key < end, other=0).to(tl.int64)
        token = ((page * KV_HEADS + kv_head) * page_tokens + key % page_tokens) * D
        inside = (key < end)[:, None] & (d < D)[None, :]
        keys = tl.load(k_cache + token[:, None] + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        seen = (key[None, :] <= last[:, None]) & (key < end)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(highest - safe)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v_cache + token[:, None] + d[None, :], mask=inside, other=0.0)
        part = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        sums = sums * shrink[:, None] + part
        highest = new
    return highest, total, sums


@triton.jit
def rows_kernel(
    q, k_cache, v_cache, rows, positions, page_starts, pages, sums_out, range_out,
    ld_q, page_tokens, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, Q_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One stretch of one row's context for the heads of one KV head. Grid: rows, KV heads, SPLITS.

    sums_out [rows, heads, SPLITS, D], range_out [rows, heads, SPLITS, 2]: maximum and sum.
    """
    number, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + number).to(tl.int64)
    position = tl.load(positions + row)
    stretch = tl.cdiv(tl.cdiv(position + 1, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * stretch
    end = tl.minimum(begin + stretch, position + 1)
    g, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    head = kv_head * GROUP + g
    query = tl.load(q + row * ld_q + head[:, None] * Q_WIDTH + d[None, :], mask=inside, other=0.0)
    last = tl.full((ROWS,), 0, tl.int32) + position
    highest, total, sums = _attend(
        query.to(k_cache.dtype.element_ty), k_cache, v_cache, pages + tl.load(page_starts + row),
        kv_head, begin, end, last, page_tokens, scale, KV_HEADS, D, ROWS, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    part = (number * KV_HEADS * GROUP + head).to(tl.int64) * SPLITS + split
    tl.store(sums_out + part[:, None] * D + d[None, :], sums, mask=inside)
    tl.store(range_out + 2 * part, highest, mask=g < GROUP)
    tl.store(range_out + 2 * part + 1, total, mask=g < GROUP)


@triton.jit
def combine_kernel(
    sums, ranges, q, rows, out, ld_q, ld_out,
    HEADS: tl.constexpr, D: tl.constexpr, Q_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Join the stretches of one head of one row, and gate it. Grid: rows, heads."""
    number, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + number).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    part = (number * HEADS + head).to(tl.int64) * SPLITS + s
    highest = tl.load(ranges + 2 * part, mask=s < SPLITS, other=float("-inf"))
    total = tl.load(ranges + 2 * part + 1, mask=s < SPLITS, other=0.0)
    share = tl.exp(highest - tl.max(highest))
    inside = (s < SPLITS)[:, None] & (d < D)[None, :]
    values = tl.load(sums + part[:, None] * D + d[None, :], mask=inside, other=0.0)
    result = tl.sum(values * share[:, None], 0) / tl.sum(total * share)
    if GATED:
        gate = tl.load(q + row * ld_q + head * Q_WIDTH + D + d, mask=d < D, other=0.0)
        result *= sigmoid(gate)
    tl.store(out + row * ld_out + head * D + d, result, mask=d < D)


@triton.jit
def tiles_kernel(
    q, k_cache, v_cache, tiles, positions, page_starts, pages, out,
    ld_q, ld_out, page_tokens, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, Q_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One head of ROWS consecutive rows of a tile. Grid: tiles, heads, parts of a tile."""
    tile, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(tiles + 4 * tile)
    length = tl.load(tiles + 4 * tile + 1)
    offset = tl.load(tiles + 4 * tile + 2) + tl.program_id(2) * ROWS
    if offset >= length:
        return
    m, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    row = (start + offset + m).to(tl.int64)
    inside = (offset + m < length)[:, None] & (d < D)[None, :]
    at = row[:, None] * ld_q + head * Q_WIDTH + d[None, :]
    query = tl.load(q + at, mask=inside, other=0.0)
    first = tl.load(positions + start + offset)
    end = first + tl.minimum(ROWS, length - offset)
    own_pages = pages + tl.load(page_starts + start)
    _, total, sums = _attend(
        query.to(k_cache.dtype.element_ty), k_cache, v_cache, own_pages, head // GROUP, 0, end,
        first + m, page_tokens, scale, KV_HEADS, D, ROWS, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    result = sums / total[:, None]
    if GATED:
        result *= sigmoid(tl.load(q + at + D, mask=inside, other=0.0))
    tl.store(out + row[:, None] * ld_out + head * D + d[None, :], result, mask=inside)


@dataclass(frozen=True, slots=True)
class AttentionScratch:
    """Partial results of rows: float32 [rows, heads, splits, D] and [rows, heads, splits, 2]."""

    sums: torch.Tensor
    ranges: torch.Tensor
    splits: int


def attend(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cache: KvCache,
    steps: Steps,
    scratch: AttentionScratch,
    out: torch.Tensor,
) -> None:
    """Ops.attention for the current step of `steps`."""
    t, dim, group = steps.tables, spec.head_dim, spec.heads // spec.kv_heads
    width = 2 * dim if spec.gated else dim
    block_d = max(16, triton.next_power_of_2(dim))
    cos, sin = steps.rope(spec.rope_dims, spec.rope_base)
    blocks = blocks_of(arch_of(str(q.device)), cache.k.element_size())
    num_blocks = triton.cdiv(spec.heads, BLOCK_H) + 2 * triton.cdiv(spec.kv_heads, BLOCK_H)
    prepare_kernel[(len(q), num_blocks)](
        q, k, v, q_norm, k_norm, cos, sin, t.positions, t.page_starts, t.pages, cache.k, cache.v,
        q.stride(0), k.stride(0), v.stride(0), cache.page_tokens, spec.eps,
        HEADS=spec.heads, KV_HEADS=spec.kv_heads, D=dim, Q_WIDTH=width, ROPE=spec.rope_dims,
        HALF=triton.next_power_of_2(spec.rope_dims // 2),
        REST=triton.next_power_of_2(max(1, dim - spec.rope_dims)), BLOCK_D=block_d,
        BLOCK_H=BLOCK_H, Q_NORMED=q_norm is not None, K_NORMED=k_norm is not None, num_warps=4,
    )  # fmt: skip
    if steps.num_rows:
        splits = scratch.splits
        rows_kernel[(steps.num_rows, spec.kv_heads, splits)](
            q, cache.k, cache.v, t.rows, t.positions, t.page_starts, t.pages, scratch.sums,
            scratch.ranges, q.stride(0), cache.page_tokens, spec.scale,
            KV_HEADS=spec.kv_heads, GROUP=group, D=dim, Q_WIDTH=width,
            ROWS=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d, SPLITS=splits,
            BLOCK_N=blocks.keys, num_warps=blocks.row_warps, num_stages=blocks.stages,
        )  # fmt: skip
        combine_kernel[(steps.num_rows, spec.heads)](
            scratch.sums, scratch.ranges, q, t.rows, out, q.stride(0), out.stride(0),
            HEADS=spec.heads, D=dim, Q_WIDTH=width, BLOCK_D=block_d, SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits), GATED=spec.gated, num_warps=4,
        )  # fmt: skip
    if steps.num_tiles:
        tiles_kernel[(steps.num_tiles, spec.heads, TILE // blocks.tile_rows)](
            q, cache.k, cache.v, t.tiles, t.positions, t.page_starts, t.pages, out,
            q.stride(0), out.stride(0), cache.page_tokens, spec.scale,
            KV_HEADS=spec.kv_heads, GROUP=group, D=dim, Q_WIDTH=width,
            ROWS=blocks.tile_rows, BLOCK_D=block_d, BLOCK_N=blocks.keys, GATED=spec.gated,
            num_warps=blocks.tile_warps, num_stages=blocks.stages,
        )  # fmt: skip
