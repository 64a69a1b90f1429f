/* AVX-512 products of the types with blocks of 32.
 *
 * Owns: a tile times tokens, by vpdpbusd. Does not know: how the types are packed (tile_32.h).
 */
#if defined(__x86_64__)
#include "tile_avx512.h"
#include "tile_32.h"
#include "tile_groups.h"

TILE_INLINE void multiply_tile(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                               vecf *acc, tile_ahead ahead)
{
    __m512i dot[8];
    for (int t = 0; t < tokens; t++)
        dot[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int t = 0; t < tokens; t++)
            dot[t] = _mm512_dpbusd_epi32(dot[t], w->code[i], broadcast4(a[t].q + 32 * b + 4 * i));
    fetch_share(ahead, 0, 1);
    for (int t = 0; t < tokens; t++)
        acc[t] = multiply_block(w, kind, &a[t], b, dot[t], acc[t]);
}

fomoe_rows_fn fomoe_rows_avx512_32(int type)
{
    return rows_of_type(type);
}
#endif
