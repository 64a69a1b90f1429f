/* One token times rows, on AVX2: what row_256.h and row_32.h are written in.
 *
 * Owns: dot products of 32 columns, and the sums across lanes. Does not know: how a type packs its codes.
 */
#ifndef FOMOE_ROW_AVX2_H
#define FOMOE_ROW_AVX2_H

#include "tile_avx2.h"

enum { VEC_BYTES = 32, VEC_LANES = 2 }; /* lanes of 16 bytes */

/* For rows that do not fill a tile. */
#define ROW_REST_256 fomoe_rows_avx2_256
#define ROW_REST_32 fomoe_rows_avx2_32

#define v_srli16 _mm256_srli_epi16
#define v_slli16 _mm256_slli_epi16
#define v_sub16 _mm256_sub_epi16
#define v_mullo16 _mm256_mullo_epi16
#define v_srlv _mm256_srlv_epi32
#define v_low_bytes _mm256_unpacklo_epi8
#define v_high_bytes _mm256_unpackhi_epi8
#define v_store(p, v) _mm256_storeu_si256((__m256i *)(p), v)

/* 16 bytes at `offset` of rows p[0] .. p[VEC_LANES - 1], a lane each. */
TILE_INLINE vec v_load_lanes(const uint8_t *const *p, size_t offset)
{
    vec v = _mm256_castsi128_si256(_mm_loadu_si128((const void *)(p[0] + offset)));
    return _mm256_inserti128_si256(v, _mm_loadu_si128((const void *)(p[1] + offset)), 1);
}

/* 32 bytes; AVX-512 has them in both halves. */
TILE_INLINE vec v_load_twice(const uint8_t *p)
{
    return v_load(p);
}

/* Bits moved up (down where negative); others move in, to be masked. `second` is for AVX-512's second half. */
TILE_INLINE vec v_bits_up(vec v, int first, int second)
{
    (void)second;
    return first >= 0 ? v_slli(v, first) : v_srli(v, -first);
}

/* What v_shuffle8 takes to spread words w[lane] of eight over the lane. */
TILE_INLINE vec v_spread_control(const int w[2])
{
    int a = w[0] * 0x02020202, b = w[1] * 0x02020202;
    return v_add8(v_set32(0x01000100), _mm256_setr_epi32(a, a, a, a, b, b, b, b));
}

/* Sums of code * x over 2 columns less `base`, and what turns codes `offset` too large into exact ones as `base`. */
TILE_INLINE vec v_dot(vec base, vec code, vec x)
{
    return _mm256_sub_epi16(_mm256_maddubs_epi16(code, x), base);
}

TILE_INLINE vec v_dot_base(int offset, vec x)
{
    return _mm256_maddubs_epi16(v_set8((char)offset), x);
}

/* total + dots * scale; every word of `scale` counts. */
TILE_INLINE vec v_scale(vec total, vec dots, vec scale)
{
    return v_add(total, _mm256_madd_epi16(dots, scale));
}

/* total + two vectors of signed codes * x * scale; `base` is for unsigned ones. */
TILE_INLINE vec v_scale_wide(vec total, vec base, const vec code[2], const int8_t *x, vec scale)
{
    (void)base;
    total = v_scale(total, multiply_bytes(code[0], v_load(x), 1), scale);
    return v_scale(total, multiply_bytes(code[1], v_load(x + VEC_BYTES), 1), scale);
}

/* A table of 16 signed codes for v_shuffle8. */
TILE_INLINE vec v_lookup(const int8_t values[16])
{
    return v_broadcast128(_mm_loadu_si128((const void *)values));
}

/* Four vectors; in each lane of the result, the sums of that lane of each. */
TILE_INLINE vec v_sum_lanes(const vec v[4])
{
    return _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
}

/* Lane i of the result is the sum of the lanes of v[i]. */
TILE_INLINE vec v_sum_across(const vec v[VEC_LANES])
{
    return v_add(_mm256_permute2x128_si256(v[0], v[1], 0x20), _mm256_permute2x128_si256(v[0], v[1], 0x31));
}

/* Dword i of lane l to dword l of pair i. */
TILE_INLINE vec v_transpose_dwords(vec v)
{
    return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* In every lane, sums of 32 columns: low * x + high * x1, to be added up. */
TILE_INLINE vec v_sum_blocks(vec low, vec high, vec x, vec x1, int signed_codes)
{
    vec ones = _mm256_set1_epi16(1);
    vec a = multiply_bytes(low, x, signed_codes), b = multiply_bytes(high, x1, signed_codes);
    if (signed_codes) /* 16 bits hold two products */
        return v_add(v_madd(a, ones), v_madd(b, ones));
    return v_madd(_mm256_add_epi16(a, b), ones);
}

/* 16 in bytes i and 8 + i of every lane whose bit i is set. */
TILE_INLINE vec v_fifth(vec bits)
{
    vec select = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    return v_and(_mm256_cmpeq_epi8(v_and(bits, select), select), v_set8(0x10));
}

/* fomoe_e8m0_half of every dword. */
TILE_INLINE vecf vf_e8m0_half(vec e)
{
    vec normal = v_slli(v_sub(e, v_set32(1)), 23), small = _mm256_sllv_epi32(v_set32(0x00200000), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(v_set32(2), e)));
}

/* Words 0 .. 7 of sixteen, of as many blocks as there are lanes. */
TILE_INLINE vec load_halves_of_pairs(const int16_t *p)
{
    const uint8_t *at[2] = { (const uint8_t *)p, (const uint8_t *)(p + 16) };
    return v_load_lanes(at, 0);
}

#include "row.h"

#endif
