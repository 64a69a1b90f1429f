/* AVX-512 products of the types with blocks of 32.
 *
 * Owns: a tile times tokens, by vpdpbusd. Does not know: how the types are packed (tile_32.h).
 */
#if defined(__x86_64__)
#include "tile_avx512.h"
#include "tile_32.h"

TILE_INLINE void multiply_tile(const tile32 *w, tile_kind kind, const fomoe_act32 *a, int tokens, int b,
                                 __m512 *acc)
{
    __m512i dot[8];
    for (int t = 0; t < tokens; t++)
        dot[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int t = 0; t < tokens; t++)
            dot[t] = _mm512_dpbusd_epi32(dot[t], w->code[i], broadcast4(a[t].q + 32 * b + 4 * i));
    for (int t = 0; t < tokens; t++) {
        if (kind.offset_bits)
            dot[t] = _mm512_sub_epi32(dot[t], _mm512_set1_epi32(a[t].sum[b] * (1 << kind.offset_bits)));
        __m512 scale = _mm512_mul_ps(w->d, _mm512_set1_ps(a[t].d[b]));
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t]), scale, acc[t]);
        if (kind.has_min)
            acc[t] = _mm512_fmadd_ps(w->m, _mm512_set1_ps(a[t].s[b]), acc[t]);
    }
}

fomoe_rows_fn fomoe_rows_avx512_32(int type)
{
    return rows_of_type(type);
}
#endif
