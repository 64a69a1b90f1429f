/* Types with blocks of 256 as tiles: included once by each ISA, after its tile_ISA.h.
 *
 * Owns: how each type's packed codes become a tile, and its integer sums floats, in the order of
 * matmul_kernels.h. Does not know: the ISA; its vectors are `vec`, and it brings multiply_tokens.
 */
enum { BLOCK_COLS = 256, BLOCK_FORMAT = FOMOE_FORMAT_256 };
typedef fomoe_act256 block_act;
#define block_act_at fomoe_act256_at

/* A block of TILE_ROWS rows. The integer sum of a block is
 *   I = (sum over sub-blocks of scale * (sum of code * q)) >> shift - correction * M,
 *   M = sum of pair * (sums of q);
 * types with minima add -dmin * M in float instead of the correction. */
typedef struct {
    vec code[64];           /* vector i: columns 4i .. 4i + 3; unsigned but for signed_codes; with nibbles, 8 vectors
                             * for sub-blocks 2k (low nibbles) and 2k + 1 */
    vec scale[16];
    vec pair[8];        /* minima, or scales: words of sub-blocks 2i, 2i + 1 */
    vecf d, dmin;
} tile_block;

/* What differs between types when a tile is multiplied; constants wherever it is used. */
typedef struct {
    int sub;                /* columns of a sub-block */
    int shift;              /* codes or scales are that many bits up */
    int chain;              /* vectors of codes whose products a 16-bit sum holds */
    int signed_codes;
    int nibbles;            /* two codes to a byte, the high ones 16 times too large */
    int pairs;              /* 0, 4 (sums over 32) or 8 (over 16) */
    int correction_bits;    /* I -= M << that; 0: M is a minimum */
} tile_kind;

/* acc + a token's block, `total` being its sums of scale * code * q. */
TILE_INLINE vecf multiply_block(const tile_block *w, tile_kind kind, const block_act *a, int b, vec total,
                                vecf acc)
{
    vecf da = vf_set1(a->d[b]);
    vec m = v_zero();
    const int16_t *sums = kind.pairs == 8 ? a->sum16 + 16 * b : a->sum32 + 8 * b;
    for (int i = 0; i < kind.pairs; i++)
        m = v_add_madd(m, w->pair[i], broadcast4(sums + 2 * i));
    if (kind.shift)
        total = v_srai(total, kind.shift);
    if (kind.pairs && kind.correction_bits)
        total = v_sub(total, v_slli(m, kind.correction_bits));
    acc = vf_fma(v_to_float(total), vf_mul(w->d, da), acc);
    if (kind.pairs && !kind.correction_bits)
        acc = vf_fnma(v_to_float(m), vf_mul(w->dmin, da), acc);
    return acc;
}

#include "tile_walk.h"

/* vpshufb control that treats every dword alike: `pattern` is for the first of the four of a lane. */
TILE_INLINE vec shuffle_in_dwords(uint32_t pattern)
{
    vec first = v_set32((int)pattern);
    return v_add8(first, v_broadcast128(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
}

/* Bytes 2k and 2k + 1 of every dword as two words. */
TILE_INLINE vec word_lanes(vec v, int k)
{
    return v_shuffle8(v, shuffle_in_dwords(0x80008000 | (2 * k + 1) << 16 | 2 * k));
}

TILE_INLINE vec signed_word_lanes(vec v, int k)
{
    vec high = v_shuffle8(v, shuffle_in_dwords(0x00800080 | (2 * k + 1) << 24 | 2 * k << 8));
    return v_srai16(high, 8);
}

/* Byte k of every dword as a scale, in the form that multiply_tile takes. */
TILE_INLINE vec scale_lanes(vec v, int k)
{
    return v_shuffle8(v, shuffle_in_dwords(SCALE_TWICE ? 0x80008000 | k << 16 | k : 0x80808000 | k));
}

TILE_INLINE vec signed_scale_lanes(vec v, int k)
{
    if (!SCALE_TWICE)
        return v_srai(v_slli(v, 24 - 8 * k), 24);
    return v_srai16(v_shuffle8(v, shuffle_in_dwords(0x00800080 | k << 24 | k << 8)), 8);
}

/* d, dmin, and the 6-bit scales and minima of Q4_K and Q5_K: the block's first 16 bytes. */
TILE_INLINE void unpack_q4k_header(const tile_rows *t, size_t offset, tile_block *out, int even_shift)
{
    vec h[4], low4 = v_set32(0x0f0f0f0f), low6 = v_set32(0x3f3f3f3f);
    vec high2 = v_set32(0x30303030);
    load_lanes(t, offset, h);
    out->d = half_lanes(h[0]);
    out->dmin = half_lanes(v_srli(h[0], 16));
    vec scales[2] = {
        v_and(h[1], low6),
        v_or(v_and(h[3], low4), v_and(v_srli(h[1], 2), high2)),
    };
    vec minima[2] = {
        v_and(h[2], low6),
        v_or(v_and(v_srli(h[3], 4), low4),
                        v_and(v_srli(h[2], 2), high2)),
    };
    for (int j = 0; j < 8; j++) {
        out->scale[j] = scale_lanes(scales[j / 4], j % 4);
        if (j % 2 == 0)
            out->scale[j] = v_slli(out->scale[j], even_shift);
    }
    for (int i = 0; i < 4; i++)
        out->pair[i] = word_lanes(minima[i / 2], i % 2);
}

/* Where sums and scales are 32 bits wide, high nibbles stay where they are, 16 times too large, and the
 * scales of the even sub-blocks are made so. */
enum { NIBBLES_IN_PLACE = WIDE_SUMS && !SCALE_TWICE };

TILE_INLINE void unpack_q4_k(const tile_rows *t, size_t offset, tile_block *out)
{
    vec low = v_set8(0x0f);
    unpack_q4k_header(t, offset, out, NIBBLES_IN_PLACE ? 4 : 0);
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        vec q[4];
        load_lanes(t, offset + 16 + 16 * c, q);
        for (int j = 0; j < 4; j++) {
            if (NIBBLES_IN_PLACE) {
                out->code[4 * c + j] = q[j];
                continue;
            }
            out->code[c / 2 * 16 + c % 2 * 4 + j] = v_and(q[j], low);
            out->code[c / 2 * 16 + 8 + c % 2 * 4 + j] = v_and(v_srli(q[j], 4), low);
        }
    }
}

/* Codes have five bits: they are shifted down before the fifth is put on top. */
TILE_INLINE void unpack_q5_k(const tile_rows *t, size_t offset, tile_block *out)
{
    vec low = v_set8(0x0f), fifth = v_set8(0x10), high[2][4];
    unpack_q4k_header(t, offset, out, 0);
    load_lanes(t, offset + 16, high[0]);
    load_lanes(t, offset + 32, high[1]);
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        vec q[4], *even = out->code + c / 2 * 16 + c % 2 * 4;
        load_lanes(t, offset + 48 + 16 * c, q);
        for (int j = 0; j < 4; j++) {
            int bit = c / 2 * 2;
            vec h = high[c % 2][j];
            vec up = bit < 4 ? v_slli(h, 4 - bit) : v_srli(h, bit - 4);
            vec up1 = bit < 3 ? v_slli(h, 3 - bit) : v_srli(h, bit - 3);
            even[j] = v_and_or(up, fifth, v_and(q[j], low));
            even[8 + j] = v_and_or(up1, fifth, v_and(v_srli(q[j], 4), low));
        }
    }
}

/* Codes are 32 too large. */
TILE_INLINE void unpack_q6_k(const tile_rows *t, size_t offset, tile_block *out)
{
    vec low = v_set8(0x0f), high = v_set8(0x30), s[4], last[4];
    load_lanes(t, offset + 192, s);
    load_lanes(t, offset + 194, last);
    out->d = half_lanes(v_srli(last[3], 16));
    for (int j = 0; j < 16; j++)
        out->scale[j] = signed_scale_lanes(s[j / 4], j % 4);
    for (int i = 0; i < 8; i++)
        out->pair[i] = signed_word_lanes(s[i / 2], i % 2);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        int half = c / 2, piece = c % 2;
        vec a[4], b[4], h[4], *code = out->code + 32 * half + 4 * piece;
        load_lanes(t, offset + 64 * half + 16 * piece, a);
        load_lanes(t, offset + 64 * half + 32 + 16 * piece, b);
        load_lanes(t, offset + 128 + 32 * half + 16 * piece, h);
        for (int j = 0; j < 4; j++) {
            code[j] = v_and_or(v_slli(h[j], 4), high, v_and(a[j], low));
            code[8 + j] = v_and_or(v_slli(h[j], 2), high, v_and(b[j], low));
            code[16 + j] = v_and_or(h[j], high, v_and(v_srli(a[j], 4), low));
            code[24 + j] = v_and_or(v_srli(h[j], 2), high,
                                  v_and(v_srli(b[j], 4), low));
        }
    }
}

TILE_INLINE void unpack_q2_k(const tile_rows *t, size_t offset, tile_block *out)
{
    vec low = v_set8(0x0f), two = v_set8(3), s[4], last[4];
    load_lanes(t, offset, s);
    load_lanes(t, offset + 68, last);
    out->d = half_lanes(last[3]);
    out->dmin = half_lanes(v_srli(last[3], 16));
    for (int i = 0; i < 4; i++) {
        vec minima = v_and(v_srli(s[i], 4), low);
        out->pair[2 * i] = word_lanes(minima, 0);
        out->pair[2 * i + 1] = word_lanes(minima, 1);
        for (int k = 0; k < 4; k++)
            out->scale[4 * i + k] = scale_lanes(v_and(s[i], low), k);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        vec q[4];
        load_lanes(t, offset + 16 + 16 * c, q);
        for (int j = 0; j < 4; j++)
            for (int s2 = 0; s2 < 4; s2++)
                out->code[c / 2 * 32 + 8 * s2 + c % 2 * 4 + j] =
                    v_and(v_srli(q[j], 2 * s2), two);
    }
}

/* Codes are 4 too large. */
TILE_INLINE void unpack_q3_k(const tile_rows *t, size_t offset, tile_block *out)
{
    vec low = v_set8(0x0f), two = v_set8(3), third = v_set8(4);
    vec s[4], last[4], high[2][4];
    load_lanes(t, offset + 92, s);      /* 4 bytes early: 12 of scales from dword 1 on */
    load_lanes(t, offset + 94, last);
    out->d = half_lanes(v_srli(last[3], 16));
    for (int g = 0; g < 4; g++) {
        vec nibbles = v_and(v_srli(s[1 + g % 2], 4 * (g / 2)), low);
        vec bits = v_and(v_srli(s[3], 2 * g), two);
        vec scales = v_or(nibbles, v_slli(bits, 4));
        scales = v_sub8(scales, v_set8(32));
        out->pair[2 * g] = signed_word_lanes(scales, 0);
        out->pair[2 * g + 1] = signed_word_lanes(scales, 1);
        for (int k = 0; k < 4; k++)
            out->scale[4 * g + k] = signed_scale_lanes(scales, k);
    }
    load_lanes(t, offset, high[0]);
    load_lanes(t, offset + 16, high[1]);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        vec q[4];
        load_lanes(t, offset + 32 + 16 * c, q);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
            for (int s2 = 0; s2 < 4; s2++) {
                int bit = c / 2 * 4 + s2;
                vec h = high[c % 2][j];
                h = bit < 2 ? v_slli(h, 2 - bit) : v_srli(h, bit - 2);
                out->code[c / 2 * 32 + 8 * s2 + c % 2 * 4 + j] =
                    v_and_or(h, third, v_and(v_srli(q[j], 2 * s2), two));
            }
        }
    }
}

/* Codes are looked up 128 too large where they must be unsigned. */
TILE_INLINE void unpack_iq4_xs(const tile_rows *t, size_t offset, tile_block *out)
{
    vec low = v_set8(0x0f), h[4];
    vec values = v_broadcast128(_mm_loadu_si128((const void *)fomoe_iq4_values));
    if (WIDE_SUMS)
        values = v_xor(values, v_set8((char)0x80));
    load_lanes(t, offset, h);
    out->d = half_lanes(h[0]);
    for (int j = 0; j < 8; j++) {
        vec bits = v_and(v_srli(h[0], 16 + 2 * j), v_set32(3));
        vec scale = v_and(v_srli(h[1], 4 * j), v_set32(15));
        scale = v_or(scale, v_slli(bits, 4));
        scale = v_sub(scale, v_set32(32));
        out->pair[j / 2] = j % 2 ? v_odd_words(out->pair[j / 2], v_slli(scale, 16)) : scale;
        out->scale[j] = SCALE_TWICE ? v_odd_words(scale, v_slli(scale, 16)) : scale;
    }
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        vec q[4];
        load_lanes(t, offset + 8 + 16 * c, q);
        for (int j = 0; j < 4; j++) {
            out->code[8 * c + j] = v_shuffle8(values, v_and(q[j], low));
            out->code[8 * c + 4 + j] =
                v_shuffle8(values, v_and(v_srli(q[j], 4), low));
        }
    }
}

static const tile_kind kind_q2_k = { .sub = 16, .chain = 4, .pairs = 8 };
static const tile_kind kind_q3_k = { .sub = 16, .chain = 4, .pairs = 8, .correction_bits = 2 };
static const tile_kind kind_q4_k = { .sub = 32, .chain = 8, .shift = NIBBLES_IN_PLACE ? 4 : 0, .pairs = 4, .nibbles = NIBBLES_IN_PLACE };
static const tile_kind kind_q5_k = { .sub = 32, .chain = 4, .pairs = 4 };
static const tile_kind kind_q6_k = { .sub = 16, .chain = 2, .pairs = 8, .correction_bits = 5 };
static const tile_kind kind_iq4_xs = {
    .sub = 32, .chain = 1, .pairs = WIDE_SUMS ? 4 : 0, .correction_bits = 7, .signed_codes = !WIDE_SUMS,
};

TILE_ROWS_OF(q2_k)
TILE_ROWS_OF(q3_k)
TILE_ROWS_OF(q4_k)
TILE_ROWS_OF(q5_k)
TILE_ROWS_OF(q6_k)
TILE_ROWS_OF(iq4_xs)

static fomoe_rows_fn rows_of_type(int type)
{
    switch (type) {
    case FOMOE_Q2_K: return rows_q2_k;
    case FOMOE_Q3_K: return rows_q3_k;
    case FOMOE_Q4_K: return rows_q4_k;
    case FOMOE_Q5_K: return rows_q5_k;
    case FOMOE_Q6_K: return rows_q6_k;
    case FOMOE_IQ4_XS: return rows_iq4_xs;
    default: return 0;
    }
}
