/* Tiles of 8 weight rows for AVX2: lane r of every vector belongs to row r.
 *
 * Owns: how 8 rows are turned into lanes. Does not know: how a type packs its codes.
 *
 * As tile_avx512.h, but without vpdpbusd: products of bytes are summed in 16 bits by vpmaddubsw, as many
 * as fit, and one vpmaddwd widens and scales them.
 */
#ifndef FOMOE_TILE_AVX2_H
#define FOMOE_TILE_AVX2_H

#include <immintrin.h>

#include "activations.h"
#include "matmul_kernels.h"
#include "quant.h"

#define TILE_TARGET __attribute__((target("avx2,fma,f16c")))
#define TILE_INLINE static inline TILE_TARGET __attribute__((always_inline))

enum {
    TILE_ROWS = 8,
    TILE_TOKENS = 32,       /* tokens that a walk over the weights serves */
    TILE_GATHERS = 0,
    TILE_MOST = 4,          /* of which so many are in registers at once */
    WIDE_SUMS = 0,          /* products of bytes are summed in 16 bits */
    SCALE_TWICE = 1,        /* a scale is two equal words */
};

typedef __m256i vec;
typedef __m256 vecf;

#define v_zero _mm256_setzero_si256
#define v_add _mm256_add_epi32
#define v_madd _mm256_madd_epi16
#define v_to_float _mm256_cvtepi32_ps
#define v_and _mm256_and_si256
#define v_or _mm256_or_si256
#define v_xor _mm256_xor_si256
#define v_slli _mm256_slli_epi32
#define v_srli _mm256_srli_epi32
#define v_srai _mm256_srai_epi32
#define v_srai16 _mm256_srai_epi16
#define v_sub _mm256_sub_epi32
#define v_add8 _mm256_add_epi8
#define v_sub8 _mm256_sub_epi8
#define v_shuffle8 _mm256_shuffle_epi8
#define v_set8 _mm256_set1_epi8
#define v_set32 _mm256_set1_epi32
#define v_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define v_broadcast128 _mm256_broadcastsi128_si256
#define vf_load _mm256_loadu_ps
#define vf_zero _mm256_setzero_ps
#define vf_set1 _mm256_set1_ps
#define vf_mul _mm256_mul_ps
#define vf_fma _mm256_fmadd_ps
#define vf_fnma _mm256_fnmadd_ps
#define vf_load_halves(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
/* sum + the products of words, added in pairs */
#define v_add_madd(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
/* (a & mask) | b */
#define v_and_or(a, mask, b) _mm256_or_si256(_mm256_and_si256(a, mask), b)
/* even words of a, odd words of b */
#define v_odd_words(a, b) _mm256_blend_epi16(a, b, 0xaa)

/* 16 bytes at `offset` of every row as four vectors: lane r of out[j] is dword j of row r. */
TILE_INLINE void lanes_of(const uint8_t *const *row, size_t offset, vec out[4])
{
    __m256i z[4];
    for (int k = 0; k < 4; k++) {
        z[k] = _mm256_castsi128_si256(_mm_loadu_si128((const void *)(row[k] + offset)));
        z[k] = _mm256_inserti128_si256(z[k], _mm_loadu_si128((const void *)(row[4 + k] + offset)), 1);
    }
    __m256i lo01 = _mm256_unpacklo_epi32(z[0], z[1]), hi01 = _mm256_unpackhi_epi32(z[0], z[1]);
    __m256i lo23 = _mm256_unpacklo_epi32(z[2], z[3]), hi23 = _mm256_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm256_unpacklo_epi64(lo01, lo23);
    out[1] = _mm256_unpackhi_epi64(lo01, lo23);
    out[2] = _mm256_unpacklo_epi64(hi01, hi23);
    out[3] = _mm256_unpackhi_epi64(hi01, hi23);
}

/* The low halves of all lanes, IEEE half precision, as floats. */
TILE_INLINE vecf half_lanes(vec v)
{
    __m256i words = _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1,
                                                            -1, -1, 0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1,
                                                            -1, -1, -1, -1));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08)));
}

/* Bits 0 .. 3 of every lane as bit 4 of its four bytes. */
TILE_INLINE vec v_fifth_bits(vec bits)
{
    __m256i first = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808,
                                      0x0c0c0c0c);
    __m256i select = _mm256_set1_epi32(0x08040201);
    __m256i chosen = _mm256_and_si256(_mm256_shuffle_epi8(bits, first), select);
    return _mm256_and_si256(_mm256_cmpeq_epi8(chosen, select), _mm256_set1_epi8(0x10));
}

TILE_INLINE void tile_store(float *y, int n, vecf v)
{
    if (n == TILE_ROWS) {
        _mm256_storeu_ps(y, v);
        return;
    }
    float all[TILE_ROWS];
    _mm256_storeu_ps(all, v);
    memcpy(y, all, n * sizeof *y);
}

#include "tile.h"

/* Products of a vector of codes with four activations, summed in pairs. */
TILE_INLINE vec multiply_bytes(vec code, vec q, int signed_codes)
{
    return signed_codes ? _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(q, code))
                        : _mm256_maddubs_epi16(code, q);
}

/* The sums of `count` vectors of codes from `first` with the activations at q, times `scale`, added to
 * total[t] of `tokens` tokens (at `q[t] + column`). */
TILE_INLINE void multiply_chains(const vec *code, int count, int chain, int signed_codes, vec scale,
                                 const int8_t *const *q, int column, int tokens, vec *total)
{
#pragma GCC unroll 8
    for (int i = 0; i < count; i += chain) {
        vec pairs[TILE_MOST];
        for (int t = 0; t < tokens; t++)
            pairs[t] = multiply_bytes(code[i], broadcast4(q[t] + column + 4 * i), signed_codes);
#pragma GCC unroll 8
        for (int k = 1; k < chain; k++)
            for (int t = 0; t < tokens; t++)
                pairs[t] = _mm256_add_epi16(
                    pairs[t], multiply_bytes(code[i + k], broadcast4(q[t] + column + 4 * (i + k)), signed_codes));
        for (int t = 0; t < tokens; t++)
            total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(pairs[t], scale));
    }
}

#endif
