/* AVX-512 products of the types with blocks of 256.
 *
 * Owns: how each type's packed codes become a tile, and the tile times tokens. Does not know: float
 * types, blocks of 32.
 */
#if defined(__x86_64__)
#include "tile_avx512.h"

/* A block of 16 rows. The integer sum of a block is
 *   I = (sum over sub-blocks of scale * (sum of code * q, from `start`)) >> shift - correction * M,
 *   M = sum of pair * (sums of q);
 * types with minima add -dmin * M in float instead of the correction. */
typedef struct {
    __m512i code[64];       /* unsigned; vector i: columns 4i .. 4i + 3 */
    __m512i scale[16];
    __m512i pair[8];        /* minima, or scales: words of sub-blocks 2i, 2i + 1 */
    __m512 d, dmin;
} tile256;

/* What differs between types when a tile is multiplied; constants wherever it is used. */
typedef struct {
    int sub;                /* columns of a sub-block */
    int shift;              /* codes or scales are that many bits up */
    int start_minus32;      /* sums start at -32 * (sum of q): the offset of Q6_K */
    int pairs;              /* 0, 4 (sums over 32) or 8 (over 16) */
    int correction_bits;    /* I -= M << that; 0: M is a minimum */
} tile_kind;

typedef void (*unpack_fn)(const tile_rows *t, size_t offset, tile256 *out);

AVX512_INLINE __m512 multiply_block(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int b,
                                    __m512i total, __m512 acc)
{
    __m512 da = _mm512_set1_ps(a->d[b]);
    __m512i m = _mm512_setzero_si512();
    const int16_t *sums = kind.pairs == 8 ? a->sum16 + 16 * b : a->sum32 + 8 * b;
    for (int i = 0; i < kind.pairs; i++)
        m = _mm512_dpwssd_epi32(m, w->pair[i], broadcast4(sums + 2 * i));
    if (kind.shift)
        total = _mm512_srai_epi32(total, kind.shift);
    if (kind.correction_bits)
        total = _mm512_sub_epi32(total, _mm512_slli_epi32(m, kind.correction_bits));
    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(w->d, da), acc);
    if (kind.pairs && !kind.correction_bits)
        acc = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(m), _mm512_mul_ps(w->dmin, da), acc);
    return acc;
}

/* acc[t] += block b times `tokens` tokens; all of their sums stay in registers. */
AVX512_INLINE void multiply_tile(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int tokens, int b,
                                 __m512 *acc)
{
    __m512i total[8], dot[8];
    for (int t = 0; t < tokens; t++)
        total[t] = _mm512_setzero_si512();
    for (int j = 0; j < 256 / kind.sub; j++) {
        for (int t = 0; t < tokens; t++)
            dot[t] = kind.start_minus32 ? broadcast4(a[t].minus32 + 16 * b + j) : _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < kind.sub / 4; i++) {
            __m512i code = w->code[j * (kind.sub / 4) + i];
            for (int t = 0; t < tokens; t++)
                dot[t] = _mm512_dpbusd_epi32(dot[t], code, broadcast4(a[t].q + 256 * b + kind.sub * j + 4 * i));
        }
        for (int t = 0; t < tokens; t++)
            total[t] = _mm512_add_epi32(total[t], _mm512_mullo_epi32(dot[t], w->scale[j]));
    }
    for (int t = 0; t < tokens; t++)
        acc[t] = multiply_block(w, kind, &a[t], b, total[t], acc[t]);
}

AVX512_INLINE void rows_of_kind(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                                int row_begin, int row_end, float *y, int64_t ldy, tile_kind kind,
                                int block_bytes, unpack_fn unpack)
{
    fomoe_act256 a[TILE_TOKENS];
    __m512 acc[TILE_TOKENS];
    tile256 tile;
    for (int t0 = 0; t0 < num_rows; t0 += TILE_TOKENS) {
        int tokens = num_rows - t0 < TILE_TOKENS ? num_rows - t0 : TILE_TOKENS;
        for (int t = 0; t < tokens; t++)
            a[t] = fomoe_act256_at(act->forms[FOMOE_FORMAT_256], rows ? rows[t0 + t] : t0 + t, act->cols);
        for (int r = row_begin; r < row_end; r += TILE_ROWS) {
            tile_rows tr = tile_rows_at(w, r, row_end);
            for (int t = 0; t < tokens; t++)
                acc[t] = _mm512_setzero_ps();
            for (int b = 0; b < w->cols / 256; b++) {
                unpack(&tr, (size_t)b * block_bytes, &tile);
                int t = 0;
                for (; t + 8 <= tokens; t += 8)
                    multiply_tile(&tile, kind, a + t, 8, b, acc + t);
                if (t + 4 <= tokens) {
                    multiply_tile(&tile, kind, a + t, 4, b, acc + t);
                    t += 4;
                }
                for (; t < tokens; t++)
                    multiply_tile(&tile, kind, a + t, 1, b, acc + t);
            }
            for (int t = 0; t < tokens; t++)
                _mm512_mask_storeu_ps(y + (t0 + t) * ldy + r, tr.mask, acc[t]);
        }
    }
}

/* vpshufb control that treats every dword alike: `pattern` is for the first of the four of a lane. */
AVX512_INLINE __m512i shuffle_in_dwords(uint32_t pattern)
{
    __m512i first = _mm512_set1_epi32((int)pattern);
    return _mm512_add_epi8(first, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
}

/* Byte `k` of every dword, zero-extended. */
AVX512_INLINE __m512i byte_lanes(__m512i v, int k)
{
    return _mm512_shuffle_epi8(v, shuffle_in_dwords(0x80808000 | k));
}

/* Bytes 2k and 2k + 1 of every dword as two words. */
AVX512_INLINE __m512i word_lanes(__m512i v, int k)
{
    return _mm512_shuffle_epi8(v, shuffle_in_dwords(0x80008000 | (2 * k + 1) << 16 | 2 * k));
}

/* The same, sign-extended. */
AVX512_INLINE __m512i signed_byte_lanes(__m512i v, int k)
{
    return _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * k), 24);
}

AVX512_INLINE __m512i signed_word_lanes(__m512i v, int k)
{
    __m512i high = _mm512_shuffle_epi8(v, shuffle_in_dwords(0x00800080 | (2 * k + 1) << 24 | 2 * k << 8));
    return _mm512_srai_epi16(high, 8);
}

/* (a & mask) | b */
AVX512_INLINE __m512i and_or(__m512i a, __m512i mask, __m512i b)
{
    return _mm512_ternarylogic_epi32(a, mask, b, 0xea);
}

/* d, dmin, and the 6-bit scales and minima of Q4_K and Q5_K: the block's first 16 bytes. */
AVX512_INLINE void unpack_q4k_header(const tile_rows *t, size_t offset, tile256 *out, int even_shift)
{
    __m512i h[4], low4 = _mm512_set1_epi32(0x0f0f0f0f), low6 = _mm512_set1_epi32(0x3f3f3f3f);
    __m512i high2 = _mm512_set1_epi32(0x30303030);
    load_lanes(t, offset, h);
    out->d = half_lanes(h[0]);
    out->dmin = half_lanes(_mm512_srli_epi32(h[0], 16));
    __m512i scales[2] = {
        _mm512_and_si512(h[1], low6),
        _mm512_or_si512(_mm512_and_si512(h[3], low4), _mm512_and_si512(_mm512_srli_epi32(h[1], 2), high2)),
    };
    __m512i minima[2] = {
        _mm512_and_si512(h[2], low6),
        _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(h[3], 4), low4),
                        _mm512_and_si512(_mm512_srli_epi32(h[2], 2), high2)),
    };
    for (int j = 0; j < 8; j++) {
        out->scale[j] = byte_lanes(scales[j / 4], j % 4);
        if (j % 2 == 0)
            out->scale[j] = _mm512_slli_epi32(out->scale[j], even_shift);
    }
    for (int i = 0; i < 4; i++)
        out->pair[i] = word_lanes(minima[i / 2], i % 2);
}

/* High nibbles stay where they are, 16 times too large; so are the scales of the even sub-blocks. */
AVX512_INLINE void unpack_q4_k(const tile_rows *t, size_t offset, tile256 *out)
{
    __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8((char)0xf0);
    unpack_q4k_header(t, offset, out, 4);
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        __m512i q[4];
        load_lanes(t, offset + 16 + 16 * c, q);
        for (int j = 0; j < 4; j++) {
            out->code[c / 2 * 16 + c % 2 * 4 + j] = _mm512_and_si512(q[j], low);
            out->code[c / 2 * 16 + 8 + c % 2 * 4 + j] = _mm512_and_si512(q[j], high);
        }
    }
}

/* Codes have five bits: they are shifted down before the fifth is put on top. */
AVX512_INLINE void unpack_q5_k(const tile_rows *t, size_t offset, tile256 *out)
{
    __m512i low = _mm512_set1_epi8(0x0f), fifth = _mm512_set1_epi8(0x10), high[2][4];
    unpack_q4k_header(t, offset, out, 0);
    load_lanes(t, offset + 16, high[0]);
    load_lanes(t, offset + 32, high[1]);
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        __m512i q[4], *even = out->code + c / 2 * 16 + c % 2 * 4;
        load_lanes(t, offset + 48 + 16 * c, q);
        for (int j = 0; j < 4; j++) {
            int bit = c / 2 * 2;
            __m512i h = high[c % 2][j];
            __m512i up = bit < 4 ? _mm512_slli_epi32(h, 4 - bit) : _mm512_srli_epi32(h, bit - 4);
            __m512i up1 = bit < 3 ? _mm512_slli_epi32(h, 3 - bit) : _mm512_srli_epi32(h, bit - 3);
            even[j] = and_or(up, fifth, _mm512_and_si512(q[j], low));
            even[8 + j] = and_or(up1, fifth, _mm512_and_si512(_mm512_srli_epi32(q[j], 4), low));
        }
    }
}

AVX512_INLINE void unpack_q6_k(const tile_rows *t, size_t offset, tile256 *out)
{
    __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8(0x30), s[4], last[4];
    load_lanes(t, offset + 192, s);
    load_lanes(t, offset + 194, last);
    out->d = half_lanes(_mm512_srli_epi32(last[3], 16));
    for (int j = 0; j < 16; j++)
        out->scale[j] = signed_byte_lanes(s[j / 4], j % 4);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        int half = c / 2, piece = c % 2;
        __m512i a[4], b[4], h[4], *code = out->code + 32 * half + 4 * piece;
        load_lanes(t, offset + 64 * half + 16 * piece, a);
        load_lanes(t, offset + 64 * half + 32 + 16 * piece, b);
        load_lanes(t, offset + 128 + 32 * half + 16 * piece, h);
        for (int j = 0; j < 4; j++) {
            code[j] = and_or(_mm512_slli_epi32(h[j], 4), high, _mm512_and_si512(a[j], low));
            code[8 + j] = and_or(_mm512_slli_epi32(h[j], 2), high, _mm512_and_si512(b[j], low));
            code[16 + j] = and_or(h[j], high, _mm512_and_si512(_mm512_srli_epi32(a[j], 4), low));
            code[24 + j] = and_or(_mm512_srli_epi32(h[j], 2), high,
                                  _mm512_and_si512(_mm512_srli_epi32(b[j], 4), low));
        }
    }
}

AVX512_INLINE void unpack_q2_k(const tile_rows *t, size_t offset, tile256 *out)
{
    __m512i low = _mm512_set1_epi8(0x0f), two = _mm512_set1_epi8(3), s[4], last[4];
    load_lanes(t, offset, s);
    load_lanes(t, offset + 68, last);
    out->d = half_lanes(last[3]);
    out->dmin = half_lanes(_mm512_srli_epi32(last[3], 16));
    for (int i = 0; i < 4; i++) {
        __m512i minima = _mm512_and_si512(_mm512_srli_epi32(s[i], 4), low);
        out->pair[2 * i] = word_lanes(minima, 0);
        out->pair[2 * i + 1] = word_lanes(minima, 1);
        for (int k = 0; k < 4; k++)
            out->scale[4 * i + k] = byte_lanes(_mm512_and_si512(s[i], low), k);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i q[4];
        load_lanes(t, offset + 16 + 16 * c, q);
        for (int j = 0; j < 4; j++)
            for (int s2 = 0; s2 < 4; s2++)
                out->code[c / 2 * 32 + 8 * s2 + c % 2 * 4 + j] =
                    _mm512_and_si512(_mm512_srli_epi32(q[j], 2 * s2), two);
    }
}

/* Codes are 4 too large; sum of scale * 4 * (sum of q) is subtracted. */
AVX512_INLINE void unpack_q3_k(const tile_rows *t, size_t offset, tile256 *out)
{
    __m512i low = _mm512_set1_epi8(0x0f), two = _mm512_set1_epi8(3), third = _mm512_set1_epi8(4);
    __m512i s[4], last[4], high[2][4];
    load_lanes(t, offset + 92, s);      /* 4 bytes early: 12 of scales from dword 1 on */
    load_lanes(t, offset + 94, last);
    out->d = half_lanes(_mm512_srli_epi32(last[3], 16));
    for (int g = 0; g < 4; g++) {
        __m512i nibbles = _mm512_and_si512(_mm512_srli_epi32(s[1 + g % 2], 4 * (g / 2)), low);
        __m512i bits = _mm512_and_si512(_mm512_srli_epi32(s[3], 2 * g), two);
        __m512i scales = _mm512_or_si512(nibbles, _mm512_slli_epi32(bits, 4));
        scales = _mm512_sub_epi8(scales, _mm512_set1_epi8(32));
        out->pair[2 * g] = signed_word_lanes(scales, 0);
        out->pair[2 * g + 1] = signed_word_lanes(scales, 1);
        for (int k = 0; k < 4; k++)
            out->scale[4 * g + k] = signed_byte_lanes(scales, k);
    }
    load_lanes(t, offset, high[0]);
    load_lanes(t, offset + 16, high[1]);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i q[4];
        load_lanes(t, offset + 32 + 16 * c, q);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
            for (int s2 = 0; s2 < 4; s2++) {
                int bit = c / 2 * 4 + s2;
                __m512i h = high[c % 2][j];
                h = bit < 2 ? _mm512_slli_epi32(h, 2 - bit) : _mm512_srli_epi32(h, bit - 2);
                out->code[c / 2 * 32 + 8 * s2 + c % 2 * 4 + j] =
                    and_or(h, third, _mm512_and_si512(_mm512_srli_epi32(q[j], 2 * s2), two));
            }
        }
    }
}

/* Codes are looked up 128 too large. */
AVX512_INLINE void unpack_iq4_xs(const tile_rows *t, size_t offset, tile256 *out)
{
    __m512i low = _mm512_set1_epi8(0x0f), h[4];
    __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)fomoe_iq4_values));
    values = _mm512_xor_si512(values, _mm512_set1_epi8((char)0x80));
    load_lanes(t, offset, h);
    out->d = half_lanes(h[0]);
    for (int j = 0; j < 8; j++) {
        __m512i bits = _mm512_and_si512(_mm512_srli_epi32(h[0], 16 + 2 * j), _mm512_set1_epi32(3));
        __m512i scale = _mm512_and_si512(_mm512_srli_epi32(h[1], 4 * j), _mm512_set1_epi32(15));
        scale = _mm512_or_si512(scale, _mm512_slli_epi32(bits, 4));
        out->scale[j] = _mm512_sub_epi32(scale, _mm512_set1_epi32(32));
    }
    for (int i = 0; i < 4; i++)
        out->pair[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, out->scale[2 * i],
                                               _mm512_slli_epi32(out->scale[2 * i + 1], 16));
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        __m512i q[4];
        load_lanes(t, offset + 8 + 16 * c, q);
        for (int j = 0; j < 4; j++) {
            out->code[8 * c + j] = _mm512_shuffle_epi8(values, _mm512_and_si512(q[j], low));
            out->code[8 * c + 4 + j] =
                _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi32(q[j], 4), low));
        }
    }
}

static const tile_kind kind_q2_k = { .sub = 16, .pairs = 8 };
static const tile_kind kind_q3_k = { .sub = 16, .pairs = 8, .correction_bits = 2 };
static const tile_kind kind_q4_k = { .sub = 32, .shift = 4, .pairs = 4 };
static const tile_kind kind_q5_k = { .sub = 32, .pairs = 4 };
static const tile_kind kind_q6_k = { .sub = 16, .start_minus32 = 1 };
static const tile_kind kind_iq4_xs = { .sub = 32, .pairs = 4, .correction_bits = 7 };

#define AVX512_ROWS_256(name)                                                                              \
    AVX512_TARGET static void rows_##name(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, \
                                          int num_rows, int row_begin, int row_end, float *y, int64_t ldy) \
    {                                                                                                      \
        rows_of_kind(w, act, rows, num_rows, row_begin, row_end, y, ldy, kind_##name,                      \
                     sizeof(fomoe_##name), unpack_##name);                                                 \
    }

AVX512_ROWS_256(q2_k)
AVX512_ROWS_256(q3_k)
AVX512_ROWS_256(q4_k)
AVX512_ROWS_256(q5_k)
AVX512_ROWS_256(q6_k)
AVX512_ROWS_256(iq4_xs)

fomoe_rows_fn fomoe_rows_avx512_256(int type)
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
#endif
