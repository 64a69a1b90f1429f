/* AVX2 products of the types with blocks of 32.
 *
 * Owns: a tile times tokens. Does not know: how the types are packed (tile_32.h).
 */
#if defined(__x86_64__)
#include "tile_avx2.h"
#include "tile_32.h"
#include "tile_groups.h"

TILE_INLINE void multiply_tile(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                               vecf *acc, tile_ahead ahead)
{
    __m256i total[TILE_MOST];
    const int8_t *q[TILE_MOST];
    for (int t = 0; t < tokens; t++) {
        total[t] = v_zero();
        q[t] = a[t].q + 32 * b;
    }
    multiply_chains(w->code, 8, kind.chain, kind.signed_codes, _mm256_set1_epi16(1), q, 0, tokens, total);
    fetch_share(ahead, 0, 1);
    for (int t = 0; t < tokens; t++)
        acc[t] = multiply_block(w, kind, &a[t], b, total[t], acc[t]);
}

fomoe_rows_fn fomoe_rows_avx2_32(int type)
{
    return rows_of_type(type);
}
#endif
