/* Tiles of 16 weight rows for AVX-512: lane r of every vector belongs to row r.
 *
 * Owns: how 16 rows are turned into lanes. Does not know: how a type packs its codes.
 *
 * A vector of codes holds 4 columns (bytes) of each row, so vpdpbusd with 4 activations broadcast to all
 * lanes sums within rows only: no horizontal sums, and scales are plain vectors. The transposition to
 * lanes costs less than the reductions that it saves, already for one token, and nothing for many.
 */
#ifndef FOMOE_TILE_AVX512_H
#define FOMOE_TILE_AVX512_H

#include <immintrin.h>

#include "activations.h"
#include "matmul_kernels.h"
#include "quant.h"

#define TILE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define TILE_INLINE static inline TILE_TARGET __attribute__((always_inline))

enum {
    TILE_ROWS = 16,
#ifdef TILE_AMX
    TILE_TOKENS = 64,
    TILE_GATHERS = 1,
    SCALE_TWICE = 1,
#else
    TILE_TOKENS = 64,       /* tokens that a walk over the weights serves */
    TILE_GATHERS = 0,       /* whether it copies their codes to rows of equal distance */
    SCALE_TWICE = 0,        /* a scale is a dword, not two equal words */
#endif
    TILE_MOST = 8,          /* of which so many are in registers at once */
    WIDE_SUMS = 1,          /* products of bytes are summed in 32 bits: any unsigned code will do */
};

typedef __m512i vec;
typedef __m512 vecf;

#define v_zero _mm512_setzero_si512
#define v_add _mm512_add_epi32
#define v_madd _mm512_madd_epi16
#define v_to_float _mm512_cvtepi32_ps
#define v_and _mm512_and_si512
#define v_or _mm512_or_si512
#define v_xor _mm512_xor_si512
#define v_slli _mm512_slli_epi32
#define v_srli _mm512_srli_epi32
#define v_srai _mm512_srai_epi32
#define v_srai16 _mm512_srai_epi16
#define v_sub _mm512_sub_epi32
#define v_add8 _mm512_add_epi8
#define v_sub8 _mm512_sub_epi8
#define v_shuffle8 _mm512_shuffle_epi8
#define v_set8 _mm512_set1_epi8
#define v_set32 _mm512_set1_epi32
#define v_load _mm512_loadu_si512
#define v_broadcast128 _mm512_broadcast_i32x4
#define vf_load _mm512_loadu_ps
#define vf_zero _mm512_setzero_ps
#define vf_set1 _mm512_set1_ps
#define vf_mul _mm512_mul_ps
#define vf_fma _mm512_fmadd_ps
#define vf_fnma _mm512_fnmadd_ps
#define vf_load_halves(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
/* sum + the products of words, added in pairs */
#define v_add_madd _mm512_dpwssd_epi32
/* (a & mask) | b */
#define v_and_or(a, mask, b) _mm512_ternarylogic_epi32(a, mask, b, 0xea)
/* even words of a, odd words of b */
#define v_odd_words(a, b) _mm512_mask_blend_epi16(0xaaaaaaaa, a, b)

/* 16 bytes at `offset` of every row as four vectors: lane r of out[j] is dword j of row r. */
TILE_INLINE void lanes_of(const uint8_t *const *row, size_t offset, __m512i out[4])
{
    __m512i z[4];
    for (int k = 0; k < 4; k++) {
        z[k] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(row[k] + offset)));
        z[k] = _mm512_inserti32x4(z[k], _mm_loadu_si128((const void *)(row[4 + k] + offset)), 1);
        z[k] = _mm512_inserti32x4(z[k], _mm_loadu_si128((const void *)(row[8 + k] + offset)), 2);
        z[k] = _mm512_inserti32x4(z[k], _mm_loadu_si128((const void *)(row[12 + k] + offset)), 3);
    }
    __m512i lo01 = _mm512_unpacklo_epi32(z[0], z[1]), hi01 = _mm512_unpackhi_epi32(z[0], z[1]);
    __m512i lo23 = _mm512_unpacklo_epi32(z[2], z[3]), hi23 = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi64(lo01, lo23);
    out[1] = _mm512_unpackhi_epi64(lo01, lo23);
    out[2] = _mm512_unpacklo_epi64(hi01, hi23);
    out[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

/* The low halves of all lanes, IEEE half precision, as floats. */
TILE_INLINE __m512 half_lanes(__m512i v)
{
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}

/* Bits 0 .. 3 of every lane as bit 4 of its four bytes. */
TILE_INLINE __m512i v_fifth_bits(__m512i bits)
{
    __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(bits, first), _mm512_set1_epi32(0x08040201));
    return _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(0x10));
}

TILE_INLINE void tile_store(float *y, int n, __m512 v)
{
    _mm512_mask_storeu_ps(y, (__mmask16)((1u << n) - 1), v);
}

#include "tile.h"

#endif
