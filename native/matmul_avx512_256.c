/* AVX-512 products of the types with blocks of 256.
 *
 * Owns: a tile times tokens, by vpdpbusd. Does not know: how the types are packed (tile_256.h).
 */
#if defined(__x86_64__)
#include "tile_avx512.h"
#include "tile_256.h"
#include "tile_groups.h"

TILE_INLINE void multiply_tile(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                               vecf *acc, tile_ahead ahead)
{
    __m512i total[8], dot[8];
    for (int t = 0; t < tokens; t++)
        total[t] = _mm512_setzero_si512();
    for (int j = 0; j < 256 / kind.sub; j++) {
        const __m512i *codes = w->code + (kind.nibbles ? j / 2 : j) * (kind.sub / 4);
        __m512i mask = _mm512_set1_epi8(j % 2 ? (char)0xf0 : 0x0f);
        for (int t = 0; t < tokens; t++)
            dot[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < kind.sub / 4; i++) {
            __m512i code = kind.nibbles ? _mm512_and_si512(codes[i], mask) : codes[i];
            for (int t = 0; t < tokens; t++)
                dot[t] = _mm512_dpbusd_epi32(dot[t], code, broadcast4(a[t].q + 256 * b + kind.sub * j + 4 * i));
        }
        fetch_share(ahead, j, 256 / kind.sub);
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
