"""Gated delta-net: convolution, the recurrence token by token or by chunks, gated norm.

Owns: the kernels and their launches. Does not know: projections, segments (steps.py has tables).

Chunked form (fomoe-native's too): with G the running sum of log decays inside a chunk and
D_ts = exp(G_t - G_s), A = strictly_lower(diag(beta) K K^T . D) and T = (I + A)^-1 diag(beta), the
chunk writes V' = T (V - diag(exp G) K S0), reads diag(exp G) Q S0 + lower(Q K^T . D) V', and leaves
S1 = exp(G_last) S0 + (diag(exp(G_last - G)) K)^T V'. T needs no state: it is computed for all
chunks at once, the rest chunk after chunk.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fomoe.kernels.gpu.norm import gated_norm, sigmoid
from fomoe.kernels.gpu.steps import TILE, Steps
from fomoe.kernels.ops import DeltaSpec

CHUNK_WARPS = 8
CHUNK = 32  # tokens; T takes CHUNK dependent steps, the state one pass a chunk
PIECE = 32  # of a head's dimensions
BLOCK_V = 32  # rows of a head's state that one program keeps in registers
_CONV_CHANNELS = 128


@triton.jit
def convolve_kernel(
    qkv, weight, states, parts, out, ld_in, ld_out,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, SPAN: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Causal convolution and silu of up to SPAN tokens of a segment from its offset on. Grid:
    parts, blocks of channels.

    The inputs before the segment are in its state. Only the part at offset 0 reads it, and writes
    the next one when it has: each thread its own channels.
    """
    part = tl.program_id(0)
    start = tl.load(parts + 4 * part)
    length = tl.load(parts + 4 * part + 1)
    # The third word of a short segment is 0: it is one part.
    offset = tl.load(parts + 4 * part + 2)
    number = tl.load(parts + 4 * part + 3)
    state = tl.load(states + 2 * number).to(tl.pointer_type(tl.float32))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < CHANNELS
    for base in range(offset, tl.minimum(offset + SPAN, length), BLOCK_T):
        t = base + tl.arange(0, BLOCK_T)
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for tap in tl.static_range(TAPS):
            at = t + tap - (TAPS - 1)  # at < 0: in the state
            ok = (t < length)[:, None] & inside[None, :]
            own = qkv + (start + at).to(tl.int64)[:, None] * ld_in + c[None, :]
            past = state + (at + TAPS - 1)[:, None] * CHANNELS + c[None, :]
            value = tl.load(own, mask=ok & (at >= 0)[:, None], other=0.0)
            value += tl.load(past, mask=ok & (at < 0)[:, None], other=0.0)
            total += value * tl.load(weight + c * TAPS + tap, mask=inside, other=0.0)[None, :]
        to = out + (start + t).to(tl.int64)[:, None] * ld_out + c[None, :]
        tl.store(to, total * sigmoid(total), mask=(t < length)[:, None] & inside[None, :])
    if offset == 0:
        tl.debug_barrier()
        for slot in tl.static_range(TAPS - 1):  # ascending: what is read lies after what is written
            at = length - (TAPS - 1) + slot
            if at >= 0:
                own = qkv + (start + at).to(tl.int64) * ld_in + c
                value = tl.load(own, mask=inside, other=0.0)
            else:
                value = tl.load(state + (at + TAPS - 1) * CHANNELS + c, mask=inside, other=0.0)
            tl.store(state + slot * CHANNELS + c, value, mask=inside)


@triton.jit
def _log_decay(alpha, dt_bias, a):
    x = alpha + dt_bias
    return a * tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _load_units(rows, D: tl.constexpr, inside, eps, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """Vectors [D] at pointers `rows` [CHUNK] divided by their lengths: [PIECES, CHUNK, PIECE].

    Products over D are made of pieces, so that a warp holds a piece and not whole vectors: a
    product over 128 at once spills thousands of bytes.
    """
    i = (tl.arange(0, PIECES) * PIECE)[:, None, None] + tl.arange(0, PIECE)[None, None, :]
    x = tl.load(rows[None, :, None] + i, mask=inside[None, :, None] & (i < D), other=0.0)
    squares = tl.sum(tl.sum(x * x, 2), 0)
    return x / tl.sqrt(squares + eps)[None, :, None]


@triton.jit
def _key_head(head, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, TILED: tl.constexpr):
    if TILED:
        return head % K_HEADS
    else:
        return head // (V_HEADS // K_HEADS)


@triton.jit
def steps_kernel(
    mixed, beta, alpha, dt_bias, a, states, segments, out,
    ld_mixed, ld_beta, ld_alpha, ld_out, eps,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, D: tl.constexpr, TILED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The delta rule token by token for BLOCK_V rows of one head's state. Grid: short segments,
    V heads, blocks of rows."""
    segment, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(segments + 4 * segment)
    length = tl.load(segments + 4 * segment + 1)
    number = tl.load(segments + 4 * segment + 3)
    state = tl.load(states + 2 * number + 1).to(tl.pointer_type(tl.float32))
    i, j = tl.arange(0, BLOCK_D), block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (j < D)[:, None] & (i < D)[None, :]
    at = state + head.to(tl.int64) * D * D + j[:, None] * D + i[None, :]
    s = tl.load(at, mask=inside, other=0.0)  # [BLOCK_V, BLOCK_D]
    key_at = _key_head(head, K_HEADS, V_HEADS, TILED) * D + i
    rate_a, bias = tl.load(a + head), tl.load(dt_bias + head)
    for t in range(length):
        row = (start + t).to(tl.int64)
        own = mixed + row * ld_mixed
        q = tl.load(own + key_at, mask=i < D, other=0.0)
        k = tl.load(own + K_HEADS * D + key_at, mask=i < D, other=0.0)
        v = tl.load(own + 2 * K_HEADS * D + head * D + j, mask=j < D, other=0.0)
        q = q / (tl.sqrt(tl.sum(q * q) + eps) * tl.sqrt(float(D)))
        k = k / tl.sqrt(tl.sum(k * k) + eps)
        rate = sigmoid(tl.load(beta + row * ld_beta + head))
        s *= tl.exp(_log_decay(tl.load(alpha + row * ld_alpha + head), bias, rate_a))
        delta = rate * (v - tl.sum(s * k[None, :], 1))
        s += delta[:, None] * k[None, :]
        result = tl.sum(s * q[None, :], 1)
        tl.store(out + row * ld_out + head * D + j, result, mask=j < D)
    tl.store(at, s, mask=inside)


@triton.jit
def _chunk_decay(alpha, dt_bias, a, row, inside, ld_alpha, head):
    """G [CHUNK] of rows; rows outside do not decay."""
    value = tl.load(alpha + row * ld_alpha + head, mask=inside, other=0.0)
    g = _log_decay(value, tl.load(dt_bias + head), tl.load(a + head))
    return tl.cumsum(tl.where(inside, g, 0.0), 0)


@triton.jit
def solve_kernel(
    mixed, beta, alpha, dt_bias, a, tiles, solved,
    ld_mixed, ld_beta, ld_alpha, eps,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, D: tl.constexpr, TILED: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, CHUNK: tl.constexpr, PER_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """T of one chunk and head: solved [tile, part of tile, V head, CHUNK, CHUNK]. Grid: tiles,
    V heads, PER_TILE."""
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(tiles + 4 * tile)
    length = tl.load(tiles + 4 * tile + 1)
    offset = tl.load(tiles + 4 * tile + 2) + part * CHUNK
    if offset < length:
        t = tl.arange(0, CHUNK)
        inside = offset + t < length
        row = (start + offset + t).to(tl.int64)
        key_at = (K_HEADS + _key_head(head, K_HEADS, V_HEADS, TILED)) * D
        k = _load_units(mixed + row * ld_mixed + key_at, D, inside, eps, PIECES, PIECE)
        rate = sigmoid(tl.load(beta + row * ld_beta + head, mask=inside, other=0.0))
        rate = tl.where(inside, rate, 0.0)
        g = _chunk_decay(alpha, dt_bias, a, row, inside, ld_alpha, head)
        below = t[:, None] > t[None, :]
        decay = tl.exp(tl.where(below, g[:, None] - g[None, :], 0.0))
        products = tl.sum(tl.dot(k, tl.permute(k, (0, 2, 1)), input_precision=PRECISION), 0)
        # inverse - I by forward substitution, row after row
        inverse = tl.where(below, -rate[:, None] * products * decay, 0.0)
        for n in range(2, CHUNK):
            own = tl.sum(tl.where(t[:, None] == n, inverse, 0.0), 0)
            own += tl.sum(own[:, None] * inverse, 0)
            inverse = tl.where(t[:, None] == n, own[None, :], inverse)
        inverse += tl.where(t[:, None] == t[None, :], 1.0, 0.0)
        to = solved + ((tile * PER_TILE + part) * V_HEADS + head).to(tl.int64) * CHUNK * CHUNK
        tl.store(to + t[:, None] * CHUNK + t[None, :], inverse * rate[None, :])


@triton.jit
def chunks_kernel(
    mixed, alpha, dt_bias, a, states, segments, solved, out,
    ld_mixed, ld_alpha, ld_out, eps,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, D: tl.constexpr, TILED: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    PER_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The delta rule by chunks for BLOCK_V rows of one head's state. Grid: long segments, V heads,
    blocks of rows. Formulas: at the top."""
    segment, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(segments + 4 * segment)
    length = tl.load(segments + 4 * segment + 1)
    first_tile = tl.load(segments + 4 * segment + 2)
    number = tl.load(segments + 4 * segment + 3)
    state = tl.load(states + 2 * number + 1).to(tl.pointer_type(tl.float32))
    t = tl.arange(0, CHUNK)
    j = block * BLOCK_V + tl.arange(0, BLOCK_V)
    i = (tl.arange(0, PIECES) * PIECE)[:, None, None] + tl.arange(0, PIECE)[None, :, None]
    state_at = state + head.to(tl.int64) * D * D + i + j[None, None, :] * D
    state_inside = (i < D) & (j < D)[None, None, :]
    s = tl.load(state_at, mask=state_inside, other=0.0)  # [PIECES, PIECE (of k), BLOCK_V]
    key_at = _key_head(head, K_HEADS, V_HEADS, TILED) * D
    for offset in range(0, length, CHUNK):
        inside = offset + t < length
        row = (start + offset + t).to(tl.int64)
        own = mixed + row * ld_mixed
        k = _load_units(own + K_HEADS * D + key_at, D, inside, eps, PIECES, PIECE)
        q = _load_units(own + key_at, D, inside, eps, PIECES, PIECE) / tl.sqrt(float(D))
        values = inside[:, None] & (j < D)[None, :]
        at = own[:, None] + (2 * K_HEADS * D + head * D + j)[None, :]
        v = tl.load(at, mask=values, other=0.0)
        g = _chunk_decay(alpha, dt_bias, a, row, inside, ld_alpha, head)
        grown = tl.exp(g)[:, None]
        chunk = (first_tile * PER_TILE + offset // CHUNK) * V_HEADS + head
        t_at = solved + chunk.to(tl.int64) * CHUNK * CHUNK + t[:, None] * CHUNK + t[None, :]
        known = tl.sum(tl.dot(k, s, input_precision=PRECISION), 0) * grown
        written = tl.dot(tl.load(t_at), v - known, input_precision=PRECISION)
        upto = t[:, None] >= t[None, :]
        decay = tl.exp(tl.where(upto, g[:, None] - g[None, :], 0.0))
        scores = tl.sum(tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION), 0)
        scores = tl.where(upto, scores * decay, 0.0)
        result = tl.sum(tl.dot(q, s, input_precision=PRECISION), 0) * grown
        result += tl.dot(scores, written, input_precision=PRECISION)
        to = out + row[:, None] * ld_out + (head * D + j)[None, :]
        tl.store(to, result, mask=values)
        last = tl.min(g)  # log decays are not positive
        faded = tl.broadcast_to(
            (written * tl.exp(last - g)[:, None])[None, :, :], (PIECES, CHUNK, BLOCK_V)
        )
        s = s * tl.exp(last)
        s += tl.dot(tl.permute(k, (0, 2, 1)), faded, input_precision=PRECISION)
    tl.store(state_at, s, mask=state_inside)


@dataclass(frozen=True, slots=True)
class DeltaScratch:
    """mixed: float32 [tokens, conv_dim], what the convolution gave. solved: float32, for the chunks
    of long segments."""

    mixed: torch.Tensor
    solved: torch.Tensor


def solved_floats(spec: DeltaSpec, max_tokens: int, num_segments: int) -> int:
    """Floats of DeltaScratch.solved for steps of that size."""
    return (max_tokens // TILE + num_segments) * TILE * CHUNK * spec.v_heads


def _precision(x: torch.Tensor) -> str:
    """How products round: each factor as two bfloat16, which keeps 16 bits of it, on the matrix
    units of every card. Float32 is spilled by the kilobyte; the interpreter has only that."""
    return "ieee" if x.device.type == "cpu" else "bf16x3"


def delta_net(
    spec: DeltaSpec,
    layer: int,
    qkv: torch.Tensor,
    z: torch.Tensor,
    beta: torch.Tensor,
    alpha: torch.Tensor,
    conv_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    norm: torch.Tensor,
    steps: Steps,
    scratch: DeltaScratch,
    out: torch.Tensor,
) -> None:
    """Ops.delta_net for the current step of `steps`."""
    t, states, mixed = steps.tables, steps.states(layer), scratch.mixed
    dim = spec.head_dim
    block_d = max(16, triton.next_power_of_2(dim))
    block_v = min(BLOCK_V, block_d)
    shape = dict(
        K_HEADS=spec.k_heads, V_HEADS=spec.v_heads, D=dim, TILED=spec.tiled,
    )  # fmt: skip
    parts = [(t.short, steps.num_short, steps.max_short), (t.tiles, steps.num_tiles, TILE)]
    for table, num_parts, span in parts:
        if num_parts:
            convolve_kernel[(num_parts, triton.cdiv(spec.conv_dim, _CONV_CHANNELS))](
                qkv, conv_weight, states, table, mixed, qkv.stride(0), mixed.stride(0),
                CHANNELS=spec.conv_dim, TAPS=spec.conv_kernel, SPAN=triton.next_power_of_2(span),
                BLOCK_T=min(16, triton.next_power_of_2(span)), BLOCK_C=_CONV_CHANNELS,
                num_warps=4,
            )  # fmt: skip
    if steps.num_short:
        steps_kernel[(steps.num_short, spec.v_heads, triton.cdiv(dim, block_v))](
            mixed, beta, alpha, dt_bias, a, states, t.short, out,
            mixed.stride(0), beta.stride(0), alpha.stride(0), out.stride(0), spec.eps,
            **shape, BLOCK_D=block_d, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip
    if steps.num_long:
        per_tile, piece = TILE // CHUNK, min(PIECE, block_d)
        chunked = shape | dict(
            PIECES=block_d // piece, PIECE=piece, CHUNK=CHUNK, PER_TILE=per_tile,
            PRECISION=_precision(out), num_warps=CHUNK_WARPS, num_stages=1,
        )  # fmt: skip
        solve_kernel[(steps.num_tiles, spec.v_heads, per_tile)](
            mixed, beta, alpha, dt_bias, a, t.tiles, scratch.solved,
            mixed.stride(0), beta.stride(0), alpha.stride(0), spec.eps,
            **chunked,
        )  # fmt: skip
        chunks_kernel[(steps.num_long, spec.v_heads, triton.cdiv(dim, block_v))](
            mixed, alpha, dt_bias, a, states, t.long, scratch.solved, out,
            mixed.stride(0), alpha.stride(0), out.stride(0), spec.eps,
            **chunked, BLOCK_V=block_v,
        )  # fmt: skip
    gated_norm(out, z, norm, spec.v_heads, spec.eps)
