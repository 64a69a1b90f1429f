"""Gated delta-net: convolution, the recurrence token by token or by chunks, gated norm.

Owns: the kernels and their launches. Does not know: projections, segments (steps.py has tables).

Chunked form (fomoe-native's too): with G the running sum of log decays inside a chunk and
D_ts = exp(G_t - G_s), A = strictly_lower(diag(beta) K K^T . D) and T = (I + A)^-1 diag(beta), the
chunk writes V' = T (V - diag(exp G) K S0), reads diag(exp G) Q S0 + P V' with P = lower(Q K^T . D),
and leaves S1 = exp(G_last) S0 + (diag(exp(G_last - G)) K)^T V'. T and P need no state: they are
computed for all chunks at once, the rest chunk after chunk.

Products over a head's dimensions are sums over pieces of it, loaded one after the other, and it is
the products that are divided by the lengths of K's and Q's rows: whole rows in registers, each as
the two bfloat16 that a product takes, spill hundreds of bytes a thread.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return,assignment"

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
    """What one chunk and head needs beside the state: solved [tile, part of tile, V head] of T and
    P [CHUNK, CHUNK], one over the lengths of k and q, and G [CHUNK]. Grid: tiles, V heads,
    PER_TILE."""
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(tiles + 4 * tile)
    length = tl.load(tiles + 4 * tile + 1)
    offset = tl.load(tiles + 4 * tile + 2) + part * CHUNK
    if offset < length:
        t = tl.arange(0, CHUNK)
        inside = offset + t < length
        row = (start + offset + t).to(tl.int64)
        q_rows = mixed + row * ld_mixed + _key_head(head, K_HEADS, V_HEADS, TILED) * D
        products = tl.zeros((CHUNK, CHUNK), tl.float32)
        scores = tl.zeros((CHUNK, CHUNK), tl.float32)
        k_squares = tl.zeros((CHUNK,), tl.float32)
        q_squares = tl.zeros((CHUNK,), tl.float32)
        for piece in range(PIECES):
            i = piece * PIECE + tl.arange(0, PIECE)
            there = inside[:, None] & (i < D)[None, :]
            q = tl.load(q_rows[:, None] + i[None, :], mask=there, other=0.0)
            k = tl.load(q_rows[:, None] + K_HEADS * D + i[None, :], mask=there, other=0.0)
            k_squares += tl.sum(k * k, 1)
            q_squares += tl.sum(q * q, 1)
            products = tl.dot(k, tl.trans(k), products, input_precision=PRECISION)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        k_unit = 1.0 / tl.sqrt(k_squares + eps)
        q_unit = 1.0 / (tl.sqrt(q_squares + eps) * tl.sqrt(float(D)))
        rate = sigmoid(tl.load(beta + row * ld_beta + head, mask=inside, other=0.0))
        rate = tl.where(inside, rate, 0.0)
        g = _chunk_decay(alpha, dt_bias, a, row, inside, ld_alpha, head)
        below, upto = t[:, None] > t[None, :], t[:, None] >= t[None, :]
        decay = tl.exp(tl.where(upto, g[:, None] - g[None, :], 0.0)) * k_unit[None, :]
        scores = tl.where(upto, scores * q_unit[:, None] * decay, 0.0)
        # inverse - I by forward substitution, row after row
        inverse = tl.where(below, -(rate * k_unit)[:, None] * products * decay, 0.0)
        for n in range(2, CHUNK):
            own = tl.sum(tl.where(t[:, None] == n, inverse, 0.0), 0)
            own += tl.sum(own[:, None] * inverse, 0)
            inverse = tl.where(t[:, None] == n, own[None, :], inverse)
        inverse += tl.where(t[:, None] == t[None, :], 1.0, 0.0)
        chunk = ((tile * PER_TILE + part) * V_HEADS + head).to(tl.int64)
        to = solved + chunk * (CHUNK * (2 * CHUNK + 3))
        square = t[:, None] * CHUNK + t[None, :]
        tl.store(to + square, inverse * rate[None, :])
        tl.store(to + CHUNK * CHUNK + square, scores)
        to += 2 * CHUNK * CHUNK
        tl.store(to + t, k_unit)
        tl.store(to + CHUNK + t, q_unit)
        tl.store(to + 2 * CHUNK + t, g)


@triton.jit
def _chosen(pieces, number, PIECES: tl.constexpr):
    """Piece `number` of a tuple, which the compiler cannot know: it would unroll the loop over the
    pieces, and load all of them at once."""
    found = pieces[0]
    for n in tl.static_range(1, PIECES):
        found = tl.where(number == n, pieces[n], found)
    return found


@triton.jit
def _replaced(pieces, number, piece, PIECES: tl.constexpr):
    """The tuple with another piece `number`."""
    result = ()
    for n in tl.static_range(PIECES):
        result = result + (tl.where(number == n, piece, pieces[n]),)
    return result


@triton.jit
def chunks_kernel(
    mixed, states, segments, solved, out, ld_mixed, ld_out,
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
    state += head.to(tl.int64) * D * D
    t, i = tl.arange(0, CHUNK), tl.arange(0, PIECE)
    j = block * BLOCK_V + tl.arange(0, BLOCK_V)
    s = ()  # of pieces [PIECE (of k), BLOCK_V]
    for n in tl.static_range(PIECES):
        state_at = state + j[None, :] * D + (n * PIECE + i)[:, None]
        state_there = (n * PIECE + i < D)[:, None] & (j < D)[None, :]
        s = s + (tl.load(state_at, mask=state_there, other=0.0),)
    key_at = _key_head(head, K_HEADS, V_HEADS, TILED) * D
    for offset in range(0, length, CHUNK):
        inside = offset + t < length
        own = mixed + (start + offset + t).to(tl.int64) * ld_mixed
        chunk = ((first_tile * PER_TILE + offset // CHUNK) * V_HEADS + head).to(tl.int64)
        ready = solved + chunk * (CHUNK * (2 * CHUNK + 3))
        square = t[:, None] * CHUNK + t[None, :]
        k_unit = tl.load(ready + 2 * CHUNK * CHUNK + t)
        q_unit = tl.load(ready + 2 * CHUNK * CHUNK + CHUNK + t)
        g = tl.load(ready + 2 * CHUNK * CHUNK + 2 * CHUNK + t)
        known = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        result = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        for piece in range(PIECES):
            own_s = _chosen(s, piece, PIECES)
            at = own[:, None] + (key_at + piece * PIECE + i)[None, :]
            there = inside[:, None] & (piece * PIECE + i < D)[None, :]
            q = tl.load(at, mask=there, other=0.0)
            k = tl.load(at + K_HEADS * D, mask=there, other=0.0)
            known = tl.dot(k, own_s, known, input_precision=PRECISION)
            result = tl.dot(q, own_s, result, input_precision=PRECISION)
        values = inside[:, None] & (j < D)[None, :]
        v = tl.load(
            own[:, None] + (2 * K_HEADS * D + head * D + j)[None, :], mask=values, other=0.0
        )
        v -= known * (tl.exp(g) * k_unit)[:, None]
        written = tl.dot(tl.load(ready + square), v, input_precision=PRECISION)
        scores = tl.load(ready + CHUNK * CHUNK + square)
        result *= (tl.exp(g) * q_unit)[:, None]
        result = tl.dot(scores, written, result, input_precision=PRECISION)
        to = out + (start + offset + t).to(tl.int64)[:, None] * ld_out + (head * D + j)[None, :]
        tl.store(to, result, mask=values)
        last = tl.min(g)  # log decays are not positive
        written *= (tl.exp(last - g) * k_unit)[:, None]
        for piece in range(PIECES):
            own_s = _chosen(s, piece, PIECES)
            at = own[None, :] + (K_HEADS * D + key_at + piece * PIECE + i)[:, None]
            there = inside[None, :] & (piece * PIECE + i < D)[:, None]
            k = tl.load(at, mask=there, other=0.0)
            own_s = tl.dot(k, written, own_s * tl.exp(last), input_precision=PRECISION)
            s = _replaced(s, piece, own_s, PIECES)
    for n in tl.static_range(PIECES):
        state_at = state + j[None, :] * D + (n * PIECE + i)[:, None]
        state_there = (n * PIECE + i < D)[:, None] & (j < D)[None, :]
        tl.store(state_at, s[n], mask=state_there)


@dataclass(frozen=True, slots=True)
class DeltaScratch:
    """mixed: float32 [tokens, conv_dim], what the convolution gave. solved: float32, what
    solve_kernel makes of the chunks of long segments."""

    mixed: torch.Tensor
    solved: torch.Tensor


def solved_floats(spec: DeltaSpec, max_tokens: int, num_segments: int) -> int:
    """Floats of DeltaScratch.solved for steps of that size."""
    num_chunks = (max_tokens // TILE + num_segments) * TILE // CHUNK
    return num_chunks * CHUNK * (2 * CHUNK + 3) * spec.v_heads


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
            mixed, states, t.long, scratch.solved, out, mixed.stride(0), out.stride(0),
            **chunked, BLOCK_V=block_v,
        )  # fmt: skip
    gated_norm(out, z, norm, spec.v_heads, spec.eps)
