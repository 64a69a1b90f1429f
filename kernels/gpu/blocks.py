"""Blocks of every quantisation type, unpacked in registers.

Owns: what the bytes of a block mean (after ggml-common.h, as native/dequantize.c reads them). Does
not know: matrices, activations, who multiplies.

A row is cut into chunks of at most 16 bytes of codes: what one lane reads at once. The codes of a
chunk are handed out in quads, four neighbouring columns: quad i of the low nibbles (HIGH = 0) or
of the high ones, as float32 units u with value = a * u + b, where a and b belong to the chunk and
HIGH. Codes become floats by their place in the mantissa: 1.0 | code << (23 - bits) is
1 + code / 2^bits, exactly; converting integers runs at an eighth of that rate on consumer cards.
"""

# Device code: tensors of the caller's shapes have no types here.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from fomoe.kernels.gpu.words import (
    from_half,
    halves,
    join4,
    load2,
    load4,
    load4_unaligned,
    load_u16,
    shift4,
)
from fomoe.kernels.table import QUANT_TYPES

_TYPES = {t.name: t for t in QUANT_TYPES.values()}
_WIDE = ("F32", "F16", "BF16", "Q8_0")  # a code fills a byte or more


# ---- shapes of a type, at compile time ----


@triton.constexpr_function
def chunk_cols(type_name):
    """Columns of a chunk."""
    return {"F32": 4, "F16": 8, "BF16": 8, "Q8_0": 16}.get(type_name, 32)


@triton.constexpr_function
def num_halves(type_name):
    """2 where a byte holds two codes, low and high."""
    return 1 if type_name in _WIDE else 2


@triton.constexpr_function
def num_quads(type_name):
    """Quads of a half."""
    return {"F32": 1, "F16": 2, "BF16": 2}.get(type_name, 4)


@triton.constexpr_function
def is_float(type_name):
    """Whether the units are the values."""
    return type_name in ("F32", "F16", "BF16")


@triton.constexpr_function
def row_bytes(type_name, cols):
    """Bytes of a row of `cols` columns."""
    return _TYPES[type_name].row_bytes(cols)


@triton.constexpr_function
def block_bytes(type_name):
    """Bytes of a block; of a chunk where the type has no blocks."""
    return max(_TYPES[type_name].block_bytes, 16)


@triton.constexpr_function
def block_chunks(type_name):
    """Chunks of a block."""
    return {256: 8, 32: 2 if type_name == "Q8_0" else 1, 1: 1}[_TYPES[type_name].block_size]


# ---- chunks: the words of codes, more bits of them, factors of value = a * u + b ----


@triton.jit
def load_chunk(row, chunk, TYPE: tl.constexpr):
    """Chunk `chunk` [1, C] of rows at byte pointers `row` [R, 1].

    Returns (four words of codes, four words of further bits, (a, b) of the low half, (a, b) of the
    high half); what a type lacks repeats another entry.
    """
    PER: tl.constexpr = block_chunks(TYPE)
    p = row + (chunk // PER) * block_bytes(TYPE)
    part = chunk % PER
    if TYPE == "Q4_K":
        words = load4(p + 16 + part * 16)
        low, high = _k_factors(p, part // 2, 4)
        return words, words, low, high
    elif TYPE == "Q5_K":
        words = load4(p + 48 + part * 16)
        low, high = _k_factors(p, part // 2, 5)
        fifth = load4(p + 16 + (part % 2) * 16)
        shift = (part // 2 * 2).to(tl.uint32)
        return words, shift4(fifth, shift), low, high
    elif TYPE == "Q6_K":
        return _q6_k(p, part)
    elif TYPE == "IQ4_XS":
        return _iq4_xs(p, part)
    elif TYPE == "Q8_0":
        words = load4_unaligned(p + 2 + part * 16)
        low = from_half(load_u16(p)) * 256, from_half(load_u16(p)) * 0
        return words, words, low, low
    elif TYPE == "F32" or TYPE == "F16" or TYPE == "BF16":
        words = load4(p)
        one = tl.full([1, 1], 1.0, tl.float32), tl.full([1, 1], 0.0, tl.float32)
        return words, words, one, one
    else:
        return _block_of_32(p, TYPE)


@triton.jit
def _factors(scale, minimum, BITS: tl.constexpr):
    """a and b for value = scale * code - minimum."""
    a = scale * (1 << BITS)
    return a, -(a + minimum)


@triton.jit
def _k_factors(p, pair, BITS: tl.constexpr):
    """Of sub-blocks 2 * pair (low nibbles) and 2 * pair + 1 of Q4_K and Q5_K, whose eight scales
    and minima of 6 bits lie in 12 bytes."""
    both, s0, s1, s2 = load4(p)
    shift = ((pair & 1) * 16).to(tl.uint32)
    t0 = s0 >> shift
    t1 = s1 >> shift
    t2 = s2 >> shift
    first = pair < 2
    # Two bytes at once: those of the low and of the high nibbles.
    scales = tl.where(first, t0 & 0x3F3F, (t2 & 0x0F0F) | ((t0 >> 2) & 0x3030))
    minima = tl.where(first, t1 & 0x3F3F, ((t2 >> 4) & 0x0F0F) | ((t1 >> 2) & 0x3030))
    d = from_half(both)
    d_min = from_half(both >> 16)
    low = _factors(d * (scales & 255).to(tl.float32), d_min * (minima & 255).to(tl.float32), BITS)
    high = _factors(
        d * (scales >> 8 & 255).to(tl.float32), d_min * (minima >> 8 & 255).to(tl.float32), BITS
    )
    return low, high


@triton.jit
def _q6_k(p, part):
    """Part 4 h + 2 q + l: columns 128 h + 32 q + 16 l and those 64 further."""
    half = part // 4
    quarter = part // 2 % 2
    words = load4_unaligned(p + part * 16)
    upper = load4_unaligned(p + 128 + half * 32 + (part % 2) * 16)
    d = from_half(load_u16(p + 208))
    scales = p + 192 + half * 8 + part % 4
    low = tl.load(scales.to(tl.pointer_type(tl.int8))).to(tl.float32) * d
    high = tl.load(scales.to(tl.pointer_type(tl.int8)) + 4).to(tl.float32) * d
    return (
        words,
        shift4(upper, (quarter * 2).to(tl.uint32)),
        (low * 64, low * 0),
        (high * 64, high * 0),
    )


@triton.jit
def _iq4_xs(p, part):
    first, low4 = load2(p)
    w0, w1 = load2(p + 8 + part * 16)
    w2, w3 = load2(p + 16 + part * 16)
    low = (low4 >> (part * 4).to(tl.uint32)) & 15
    high = (first >> (16 + part * 2).to(tl.uint32)) & 3
    scale = from_half(first) * ((low | (high << 4)).to(tl.float32) - 32)
    both = scale * 256, scale * 0
    words = w0, w1, w2, w3
    return words, words, both, both


@triton.jit
def _block_of_32(p, TYPE: tl.constexpr):
    """Of 32 columns: codes in 16 bytes, 16 low nibbles and 16 high ones."""
    if TYPE == "MXFP4":
        e = tl.load(p).to(tl.uint32)
        bits = tl.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23)
        words = load4_unaligned(p + 1)
        both = bits.to(tl.float32, bitcast=True) * 256, tl.zeros_like(e).to(tl.float32)
        return words, words, both, both
    elif TYPE == "IQ4_NL":
        words = load4_unaligned(p + 2)
        scale = from_half(load_u16(p))
        both = scale * 256, scale * 0
        return words, words, both, both
    elif TYPE == "Q4_0":
        words = load4_unaligned(p + 2)
        scale = from_half(load_u16(p))
        both = _factors(scale, scale * 8, 4)
        return words, words, both, both
    elif TYPE == "Q4_1":
        words = load4_unaligned(p + 4)
        scale = from_half(load_u16(p))
        both = _factors(scale, -from_half(load_u16(p + 2)), 4)
        return words, words, both, both
    elif TYPE == "Q5_0":
        words = load4_unaligned(p + 6)
        scale = from_half(load_u16(p))
        both = _factors(scale, scale * 16, 5)
        return words, _spread_fifths(p + 2), both, both
    else:
        tl.static_assert(TYPE == "Q5_1", "no kernel reads this type")
        words = load4_unaligned(p + 8)
        scale = from_half(load_u16(p))
        both = _factors(scale, -from_half(load_u16(p + 2)), 5)
        return words, _spread_fifths(p + 4), both, both


@triton.jit
def _spread_fifths(qh):
    """32 fifth bits, in order of the columns, where those of Q5_K lie: bit 8 k of word i is that of
    low column 4 i + k, bit 8 k + 1 that of the high one."""
    bits = load_u16(qh) | (load_u16(qh + 2) << 16)
    return _spread(bits), _spread(bits >> 4), _spread(bits >> 8), _spread(bits >> 12)


@triton.jit
def _spread(bits):
    low = bits & 15
    high = (bits >> 16) & 15
    # The multiplications put copies 7 bits apart: bit k arrives at 8 k.
    return ((low * 0x00204081) & 0x01010101) | (((high * 0x00204081) & 0x01010101) << 1)


# ---- quads ----


@triton.jit
def quad_col(chunk, TYPE: tl.constexpr, I: tl.constexpr, HIGH: tl.constexpr):  # noqa: E741
    """The first column of quad I of the chunk's half."""
    if TYPE == "Q4_K" or TYPE == "Q5_K":
        return chunk // 2 * 64 + chunk % 2 * 16 + (32 * HIGH + 4 * I)
    elif TYPE == "Q6_K":
        return chunk // 4 * 128 + chunk % 4 * 16 + (64 * HIGH + 4 * I)
    else:
        return chunk * chunk_cols(TYPE) + (16 * HIGH + 4 * I)


@triton.jit
def quad(words, more, TYPE: tl.constexpr, I: tl.constexpr, HIGH: tl.constexpr):  # noqa: E741
    """Units of quad I of a half, float32 [R, C, 4]."""
    if TYPE == "F32":
        return join4(words[0], words[1], words[2], words[3]).to(tl.float32, bitcast=True)
    elif TYPE == "F16":
        return halves(words[2 * I], words[2 * I + 1]).to(tl.float16, bitcast=True).to(tl.float32)
    elif TYPE == "BF16":
        return halves(words[2 * I], words[2 * I + 1]).to(tl.bfloat16, bitcast=True).to(tl.float32)
    else:
        shift = (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]
        byte = words[I][:, :, None] >> shift
        if TYPE == "Q8_0":
            return _unit((byte & 255) ^ 128, 8) - 1.5
        code = (byte >> (4 * HIGH)) & 15
        if TYPE == "Q4_K" or TYPE == "Q4_0" or TYPE == "Q4_1":
            return _unit(code, 4)
        elif TYPE == "Q5_K" or TYPE == "Q5_0" or TYPE == "Q5_1":
            fifth = (more[I][:, :, None] >> (shift + HIGH)) & 1
            return _unit(code | (fifth << 4), 5)
        elif TYPE == "Q6_K":
            upper = (more[I][:, :, None] >> (shift + 4 * HIGH)) & 3
            return _unit(code | (upper << 4), 6) - 1.5
        elif TYPE == "MXFP4":
            return _unit(_look_up(code, 0x83828180, 0x8C888684, 0x7D7E7F80, 0x74787A7C), 8) - 1.5
        else:
            return _unit(_look_up(code, 0x3F2D1801, 0x766A5D4F, 0xA6998D81, 0xF1D9C5B5), 8) - 1.5


@triton.jit
def _unit(code, BITS: tl.constexpr):
    """1 + code / 2^BITS. The grid is one program deep; that the compiler cannot know it keeps the
    1.0 in a register, and "and" with "or" become one instruction (two constants do not fit)."""
    one = (0x3F7FFFFF + tl.num_programs(2)).to(tl.uint32)
    return ((code << (23 - BITS)) | one).to(tl.float32, bitcast=True)


@triton.jit
def _look_up(code, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr):
    """Byte `code` of four little-endian words: 128 + the value."""
    words = tl.where(
        (code & 8) != 0,
        tl.where((code & 4) != 0, W3, W2),
        tl.where((code & 4) != 0, W1, W0),
    ).to(tl.uint32)
    return (words >> ((code & 3) * 8)) & 255
