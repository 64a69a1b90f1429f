"""Blocks of every quantisation type, unpacked in registers.

Owns: what the bytes of a block mean (after ggml-common.h, as native/dequantize.c reads them). Does
not know: matrices, activations. A caller walks a row in sub-blocks of 32 columns, which is what
shares a scale in most types; the larger blocks hold eight of them.

Codes become floats by their place in the mantissa: 1.0 | code << (23 - bits) is 1 + code / 2^bits,
exactly, so one fused multiply-add with factors of the sub-block gives the value. Converting
integers runs at an eighth of that rate on consumer cards.
"""

# What is written in here runs on the device: shapes are those of the caller's tensors.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

SUB = tl.constexpr(32)


@triton.jit
def _u32(p):
    return tl.load(p.to(tl.pointer_type(tl.int32)))


@triton.jit
def _u16(p):
    return tl.load(p.to(tl.pointer_type(tl.int16))).to(tl.int32) & 0xFFFF


@triton.jit
def _byte(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def _half(bits):
    """The float32 of the low 16 bits, read as float16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _value(code, scale, minimum, BITS: tl.constexpr):
    """scale * code - minimum."""
    one_and_code = ((code << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)
    factor = scale * (1 << BITS)
    return one_and_code * factor - (factor + minimum)


@triton.jit
def _look_up(code, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr):
    """Byte `code` of four little-endian words."""
    upper = tl.where((code & 4) != 0, W3, W2)
    lower = tl.where((code & 4) != 0, W1, W0)
    return (tl.where((code & 8) != 0, upper, lower) >> ((code & 3) * 8)) & 255


@triton.jit
def _iq4(code):
    """128 + the value of a code of IQ4_NL and IQ4_XS."""
    return _look_up(code, 0x3F2D1801, 0x766A5D4F, 0xA6998D81 - (1 << 32), 0xF1D9C5B5 - (1 << 32))


@triton.jit
def _mxfp4(code):
    """128 + twice the value of an E2M1 code."""
    return _look_up(code, 0x83828180 - (1 << 32), 0x8C888684 - (1 << 32), 0x7D7E7F80, 0x74787A7C)


@triton.jit
def _k_scales(p, J: tl.constexpr):
    """Scale and minimum of sub-block J of Q4_K and Q5_K: 6 bits each, in 12 bytes."""
    SHIFT: tl.constexpr = 8 * (J % 4)
    high = _u32(p + 12) >> SHIFT
    if J < 4:
        scale = (_u32(p + 4) >> SHIFT) & 63
        minimum = (_u32(p + 8) >> SHIFT) & 63
    else:
        scale = (high & 15) | (((_u32(p + 4) >> (SHIFT + 6)) & 3) << 4)
        minimum = ((high >> 4) & 15) | (((_u32(p + 8) >> (SHIFT + 6)) & 3) << 4)
    both = _u32(p)
    return _half(both) * scale.to(tl.float32), _half(both >> 16) * minimum.to(tl.float32)


@triton.jit
def _k_nibbles(qs, lane, J: tl.constexpr):
    return (_byte(qs + (J // 2) * 32 + lane) >> (4 * (J % 2))) & 15


@triton.jit
def _q4_k(p, lane, J: tl.constexpr):
    scale, minimum = _k_scales(p, J)
    return _value(_k_nibbles(p + 16, lane, J), scale, minimum, 4)


@triton.jit
def _q5_k(p, lane, J: tl.constexpr):
    scale, minimum = _k_scales(p, J)
    fifth = (_byte(p + 16 + lane) >> J) & 1
    return _value(_k_nibbles(p + 48, lane, J) | (fifth << 4), scale, minimum, 5)


@triton.jit
def _q6_k(p, lane, J: tl.constexpr):
    HALF: tl.constexpr = J // 4
    QUARTER: tl.constexpr = J % 4
    low = _byte(p + 64 * HALF + 32 * (QUARTER % 2) + lane) >> (4 * (QUARTER // 2))
    high = _byte(p + 128 + 32 * HALF + lane) >> (2 * QUARTER)
    scales = _u16(p + 192 + 2 * J)  # two signed bytes, of 16 columns each
    signed = tl.where(lane < 16, scales << 24, scales << 16) >> 24
    scale = _half(_u16(p + 208)) * signed.to(tl.float32)
    return _value((low & 15) | ((high & 3) << 4), scale, scale * 32, 6)


@triton.jit
def _iq4_xs(p, lane, J: tl.constexpr):
    low = (_u32(p + 4) >> (4 * J)) & 15
    high = (_u32(p) >> (16 + 2 * J)) & 3
    scale = _half(_u32(p)) * ((low | (high << 4)) - 32).to(tl.float32)
    code = (_byte(p + 8 + 16 * J + lane % 16) >> (4 * (lane // 16))) & 15
    return _value(_iq4(code), scale, scale * 128, 8)


@triton.jit
def _nibble(qs, lane):
    """The code of a block of 32: 16 low nibbles, then 16 high ones."""
    return (_byte(qs + lane % 16) >> (4 * (lane // 16))) & 15


@triton.jit
def _fifth(qh, lane):
    return ((_u16(qh) | (_u16(qh + 2) << 16)) >> lane) & 1


@triton.jit
def _block_of_32(p, lane, TYPE: tl.constexpr):
    if TYPE == "MXFP4":
        e = _byte(p)
        bits = tl.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23)
        scale = bits.to(tl.float32, bitcast=True)
        return _value(_mxfp4(_nibble(p + 1, lane)), scale, scale * 128, 8)
    scale = _half(_u16(p))
    if TYPE == "Q8_0":
        return _value(_byte(p + 2 + lane) ^ 128, scale, scale * 128, 8)
    elif TYPE == "Q4_0":
        return _value(_nibble(p + 2, lane), scale, scale * 8, 4)
    elif TYPE == "Q4_1":
        return _value(_nibble(p + 4, lane), scale, -_half(_u16(p + 2)), 4)
    elif TYPE == "Q5_0":
        code = _nibble(p + 6, lane) | (_fifth(p + 2, lane) << 4)
        return _value(code, scale, scale * 16, 5)
    elif TYPE == "Q5_1":
        code = _nibble(p + 8, lane) | (_fifth(p + 4, lane) << 4)
        return _value(code, scale, -_half(_u16(p + 2)), 5)
    else:
        tl.static_assert(TYPE == "IQ4_NL", "no kernel reads this type")
        return _value(_iq4(_nibble(p + 2, lane)), scale, scale * 128, 8)


@triton.jit
def _floats(p, lane, TYPE: tl.constexpr):
    if TYPE == "F32":
        return tl.load(p.to(tl.pointer_type(tl.float32)) + lane)
    elif TYPE == "F16":
        return tl.load(p.to(tl.pointer_type(tl.float16)) + lane).to(tl.float32)
    else:
        return tl.load(p.to(tl.pointer_type(tl.bfloat16)) + lane).to(tl.float32)


@triton.jit
def sub_block_bytes(TYPE: tl.constexpr):
    """Bytes of 32 columns of a type whose blocks are no larger than that, else 0."""
    if TYPE == "F32":
        return 128
    elif TYPE == "F16" or TYPE == "BF16":
        return 64
    elif TYPE == "Q8_0":
        return 34
    elif TYPE == "Q4_0" or TYPE == "IQ4_NL":
        return 18
    elif TYPE == "Q4_1":
        return 20
    elif TYPE == "Q5_0":
        return 22
    elif TYPE == "Q5_1":
        return 24
    elif TYPE == "MXFP4":
        return 17
    else:
        return 0


@triton.jit
def block_bytes(TYPE: tl.constexpr):
    """Bytes of 256 columns."""
    if TYPE == "Q4_K":
        return 144
    elif TYPE == "Q5_K":
        return 176
    elif TYPE == "Q6_K":
        return 210
    elif TYPE == "IQ4_XS":
        return 136
    else:
        return 8 * sub_block_bytes(TYPE)


@triton.jit
def sub_block(row, block, lane, TYPE: tl.constexpr, J: tl.constexpr, SUBS: tl.constexpr):
    """Values of 32 columns as float32: sub-block J of each 256-column `block` of `row`.

    `row` are byte pointers [..., 1], `block` the blocks' indices [..., 1] and `lane` 0..31 along
    the last dimension; they are broadcast. `SUBS` is the number of sub-blocks of a row: one beyond
    it reads the last one instead, so that nothing is read outside the row.
    """
    if TYPE == "Q4_K":
        return _q4_k(row + tl.minimum(block, SUBS // 8 - 1) * 144, lane, J)
    elif TYPE == "Q5_K":
        return _q5_k(row + tl.minimum(block, SUBS // 8 - 1) * 176, lane, J)
    elif TYPE == "Q6_K":
        return _q6_k(row + tl.minimum(block, SUBS // 8 - 1) * 210, lane, J)
    elif TYPE == "IQ4_XS":
        return _iq4_xs(row + tl.minimum(block, SUBS // 8 - 1) * 136, lane, J)
    else:
        p = row + tl.minimum(block * 8 + J, SUBS - 1) * sub_block_bytes(TYPE)
        if TYPE == "F32" or TYPE == "F16" or TYPE == "BF16":
            return _floats(p, lane, TYPE)
        else:
            return _block_of_32(p, lane, TYPE)
