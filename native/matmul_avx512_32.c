/* AVX-512 products of the types with blocks of 32.
 *
 * Owns: a tile times tokens, by vpdpbusd. Does not know: how the types are packed (tile_32.h).
 */
#if defined(__x86_64__)
#include "tile_avx512.h"
#include "tile_32.h"
#include "tile_avx512_32.h"

/* acc[t] += block b times `tokens` (a constant) tokens, whose sums stay in registers. */
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
    for (int t = 0; t < tokens; t++)
        acc[t] = multiply_block(w, kind, &a[t], b, dot[t], acc[t]);
}

TILE_INLINE void multiply_tokens(const tile32 *w, tile_kind kind, const fomoe_act32 *a, int tokens, int b,
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

fomoe_rows_fn fomoe_rows_avx512_32(int type)
{
    return rows_of_type(type);
}
#endif
