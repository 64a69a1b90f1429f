"""Words of memory in registers: loads at any alignment, four at a time, and their halves.

Owns: how bytes become 32-bit words of a lane, and how those are joined. Does not know: what the
bits mean.
"""

# Device code: tensors of the caller's shapes have no types here.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split4(x):
    """[R, C, 4] as four [R, C]; no data moves."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1], 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def load4(p):
    """Four words at 16-byte aligned p [R, C]."""
    words = p.to(tl.pointer_type(tl.uint32))[:, :, None] + tl.arange(0, 4)[None, None, :]
    return _split4(tl.load(words))


@triton.jit
def load2(p):
    """Two words at 8-byte aligned p [R, C]."""
    words = p.to(tl.pointer_type(tl.uint32))[:, :, None] + tl.arange(0, 2)[None, None, :]
    return tl.split(tl.load(words))


@triton.jit
def _funnel(low, high, shift):
    return (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> shift.to(tl.uint64)).to(tl.uint32)


@triton.jit
def load4_unaligned(p):
    """Four words at p [R, C] of any alignment, from five aligned ones: those that they lie in."""
    address = p.to(tl.int64, bitcast=True)
    words = (address & -4).to(tl.pointer_type(tl.uint32), bitcast=True)
    last = ((address + 15) & -4).to(tl.pointer_type(tl.uint32), bitcast=True)
    shift = (address & 3) * 8
    w0 = tl.load(words)
    w1 = tl.load(words + 1)
    w2 = tl.load(words + 2)
    w3 = tl.load(words + 3)
    w4 = tl.load(last)
    return (
        _funnel(w0, w1, shift),
        _funnel(w1, w2, shift),
        _funnel(w2, w3, shift),
        _funnel(w3, w4, shift),
    )


@triton.jit
def load_u16(p):
    return tl.load(p.to(tl.pointer_type(tl.uint16))).to(tl.uint32)


@triton.jit
def from_half(bits):
    """The float32 of the low 16 bits, read as float16."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def shift4(words, shift):
    w0, w1, w2, w3 = words
    return w0 >> shift, w1 >> shift, w2 >> shift, w3 >> shift


@triton.jit
def join4(x0, x1, x2, x3):
    """Four [R, C] as [R, C, 4]; no data moves."""
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return joined.reshape(x0.shape[0], x0.shape[1], 4)


@triton.jit
def halves(first, second):
    """The 16-bit halves of two words, low ones first: uint16 [R, C, 4]."""
    return join4(first, first >> 16, second, second >> 16).to(tl.uint16)
