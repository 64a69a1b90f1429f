/* AVX2 products of the types with blocks of 256.
 *
 * Owns: a tile times tokens. Does not know: how the types are packed (tile_256.h).
 */
#if defined(__x86_64__)
#include "tile_avx2.h"
#include "tile_256.h"
#include "tile_groups.h"

TILE_INLINE void multiply_tile(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                               vecf *acc, tile_ahead ahead)
{
    __m256i total[TILE_MOST];
    const int8_t *q[TILE_MOST];
    for (int t = 0; t < tokens; t++) {
        total[t] = v_zero();
        q[t] = a[t].q + 256 * b;
    }
    for (int j = 0; j < 256 / kind.sub; j++) {
        multiply_chains(w->code + j * (kind.sub / 4), kind.sub / 4, kind.chain, kind.signed_codes,
                        w->scale[j], q, kind.sub * j, tokens, total);
        fetch_share(ahead, j, 256 / kind.sub);
    }
    for (int t = 0; t < tokens; t++)
        acc[t] = multiply_block(w, kind, &a[t], b, total[t], acc[t]);
}

fomoe_rows_fn fomoe_rows_avx2_256(int type)
{
    return rows_of_type(type);
}
#endif
