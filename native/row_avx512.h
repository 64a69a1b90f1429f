/* One token times rows, on AVX-512: what row_256.h and row_32.h are written in.
 *
 * Owns: dot products of 64 columns, and the sums across lanes. Does not know: how a type packs its codes.
 */
#ifndef FOMOE_ROW_AVX512_H
#define FOMOE_ROW_AVX512_H

#include "tile_avx512.h"

enum { VEC_BYTES = 64, VEC_LANES = 4 }; /* lanes of 16 bytes */

/* For rows that do not fill a tile. */
#define ROW_REST_256 fomoe_rows_avx512_256
#define ROW_REST_32 fomoe_rows_avx512_32

#define v_srli16 _mm512_srli_epi16
#define v_slli16 _mm512_slli_epi16
#define v_sub16 _mm512_sub_epi16
#define v_mullo16 _mm512_mullo_epi16
#define v_srlv _mm512_srlv_epi32
#define v_low_bytes _mm512_unpacklo_epi8
#define v_high_bytes _mm512_unpackhi_epi8
#define v_store(p, v) _mm512_storeu_si512(p, v)

/* 16 bytes at `offset` of rows p[0] .. p[VEC_LANES - 1], a lane each. */
TILE_INLINE vec v_load_lanes(const uint8_t *const *p, size_t offset)
{
    vec v = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(p[0] + offset)));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p[1] + offset)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p[2] + offset)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p[3] + offset)), 3);
}

/* 32 bytes, in both halves. */
TILE_INLINE vec v_load_twice(const uint8_t *p)
{
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)p));
}

/* Bits moved up (down where negative), in the first and in the second 32 bytes; others move in, to be masked. */
TILE_INLINE vec v_bits_up(vec v, int first, int second)
{
    first &= 31, second &= 31;
    return _mm512_rolv_epi32(v, _mm512_setr_epi32(first, first, first, first, first, first, first, first, second,
                                                  second, second, second, second, second, second, second));
}

/* What v_shuffle8 takes to spread words w[lane] of eight: the low words of four dwords. */
TILE_INLINE vec v_spread_control(const int w[4])
{
    int a = w[0] * 0x0202, b = w[1] * 0x0202, c = w[2] * 0x0202, d = w[3] * 0x0202;
    return v_add8(v_set32((int)0x80800100), _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d));
}

/* base + sums of code * x over 4 columns, and what turns codes `offset` too large into exact ones as `base`. */
TILE_INLINE vec v_dot(vec base, vec code, vec x)
{
    return _mm512_dpbusd_epi32(base, code, x);
}

TILE_INLINE vec v_dot_base(int offset, vec x)
{
    return v_sub(v_zero(), _mm512_dpbusd_epi32(v_zero(), v_set8((char)offset), x));
}

/* total + dots * scale; dots fit in 16 bits, and odd words of `scale` are zero. */
TILE_INLINE vec v_scale(vec total, vec dots, vec scale)
{
    return _mm512_dpwssd_epi32(total, dots, scale);
}

/* total + the sums over two vectors of codes, 18 bits and a sign, * scale, as spread by v_spread_control. */
TILE_INLINE vec v_scale_wide(vec total, vec base, const vec code[2], const int8_t *x, vec scale)
{
    vec dots = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(base, code[0], v_load(x)), code[1], v_load(x + VEC_BYTES));
    return v_add(total, _mm512_mullo_epi32(dots, v_srai(v_slli(scale, 16), 16)));
}

/* A table of 16 signed codes for v_shuffle8, 128 too large to be unsigned. */
TILE_INLINE vec v_lookup(const int8_t values[16])
{
    return v_xor(v_broadcast128(_mm_loadu_si128((const void *)values)), v_set8((char)0x80));
}

/* Four vectors; in each lane of the result, the sums of that lane of each. */
TILE_INLINE vec v_sum_lanes(const vec v[4])
{
    vec a = v_add(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    vec b = v_add(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    return v_add(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* Lane i of the result is the sum of the lanes of v[i]. */
TILE_INLINE vec v_sum_across(const vec v[VEC_LANES])
{
    vec a = v_add(_mm512_shuffle_i32x4(v[0], v[1], 0x88), _mm512_shuffle_i32x4(v[0], v[1], 0xdd));
    vec b = v_add(_mm512_shuffle_i32x4(v[2], v[3], 0x88), _mm512_shuffle_i32x4(v[2], v[3], 0xdd));
    return v_add(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* Dword i of lane l to dword l of lane i. */
TILE_INLINE vec v_transpose_dwords(vec v)
{
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}

/* In every lane, sums of 32 columns: low * x + high * x1, to be added up. */
TILE_INLINE vec v_sum_blocks(vec low, vec high, vec x, vec x1, int signed_codes)
{
    (void)signed_codes;
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(v_zero(), low, x), high, x1);
}

/* 16 in bytes i and 8 + i of every lane whose bit i is set. */
TILE_INLINE vec v_fifth(vec bits)
{
    return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(bits, _mm512_set1_epi64((int64_t)0x8040201008040201)),
                                 v_set8(0x10));
}

/* fomoe_e8m0_half of every dword. */
TILE_INLINE vecf vf_e8m0_half(vec e)
{
    vec normal = v_slli(v_sub(e, v_set32(1)), 23), small = _mm512_sllv_epi32(v_set32(0x00200000), e);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(e, v_set32(2)), normal, small));
}

/* Words 0 .. 7 of sixteen, of as many blocks as there are lanes. */
TILE_INLINE vec load_halves_of_pairs(const int16_t *p)
{
    const uint8_t *at[4];
    for (int l = 0; l < 4; l++)
        at[l] = (const uint8_t *)(p + 16 * l);
    return v_load_lanes(at, 0);
}

#include "row.h"

#endif
