/* AVX-512 products of the types with blocks of 256.
 *
 * Owns: a tile times tokens, by vpdpbusd. Does not know: how the types are packed (tile_256.h).
 */
#if defined(__x86_64__)
#include "tile_avx512.h"
#include "tile_256.h"

TILE_INLINE __m512 multiply_block(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int b,
                                    __m512i total, __m512 acc)
{
    __m512 da = _mm512_set1_ps(a->d[b]);
    __m512i m = _mm512_setzero_si512();
    const int16_t *sums = kind.pairs == 8 ? a->sum16 + 16 * b : a->sum32 + 8 * b;
    for (int i = 0; i < kind.pairs; i++)
        m = _mm512_dpwssd_epi32(m, w->pair[i], broadcast4(sums + 2 * i));
    if (kind.shift)
        total = _mm512_srai_epi32(total, kind.shift);
    if (kind.pairs && kind.correction_bits)
        total = _mm512_sub_epi32(total, _mm512_slli_epi32(m, kind.correction_bits));
    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(w->d, da), acc);
    if (kind.pairs && !kind.correction_bits)
        acc = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(m), _mm512_mul_ps(w->dmin, da), acc);
    return acc;
}

/* acc[t] += block b times `tokens` tokens; all of their sums stay in registers. */
TILE_INLINE void multiply_tile(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int tokens, int b,
                                 __m512 *acc)
{
    __m512i total[8], dot[8];
    for (int t = 0; t < tokens; t++)
        total[t] = _mm512_setzero_si512();
    for (int j = 0; j < 256 / kind.sub; j++) {
        for (int t = 0; t < tokens; t++)
            dot[t] = _mm512_setzero_si512();
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

fomoe_rows_fn fomoe_rows_avx512_256(int type)
{
    return rows_of_type(type);
}
#endif
