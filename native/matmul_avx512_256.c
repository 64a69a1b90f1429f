/* AVX-512 products of the types with blocks of 256.
 *
 * Owns: a tile times tokens, by vpdpbusd. Does not know: how the types are packed (tile_256.h).
 */
#if defined(__x86_64__)
#include "tile_avx512.h"
#include "tile_256.h"
#include "tile_avx512_256.h"

/* acc[t] += block b times `tokens` (a constant) tokens, whose sums stay in registers. */
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

TILE_INLINE void multiply_tokens(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int tokens, int b,
                                 __m512 *acc)
{
    int t = 0;
    for (; t + TILE_MOST <= tokens; t += TILE_MOST)
        multiply_tile(w, kind, a + t, TILE_MOST, b, acc + t);
    for (; t + TILE_FEW <= tokens; t += TILE_FEW)
        multiply_tile(w, kind, a + t, TILE_FEW, b, acc + t);
    for (; t < tokens; t++)
        multiply_tile(w, kind, a + t, 1, b, acc + t);
}

fomoe_rows_fn fomoe_rows_avx512_256(int type)
{
    return rows_of_type(type);
}
#endif
