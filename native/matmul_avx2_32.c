/* AVX2 products of the types with blocks of 32.
 *
 * Owns: a tile times tokens. Does not know: how the types are packed (tile_32.h).
 */
#if defined(__x86_64__)
#include "tile_avx2.h"
#include "tile_32.h"

/* acc[t] += block b times `tokens` (a constant) tokens, whose sums stay in registers. */
TILE_INLINE void multiply_tile(const tile32 *w, tile_kind kind, const fomoe_act32 *a, int tokens, int b,
                               __m256 *acc)
{
    __m256i total[TILE_MOST];
    const int8_t *q[TILE_MOST];
    for (int t = 0; t < tokens; t++) {
        total[t] = _mm256_setzero_si256();
        q[t] = a[t].q + 32 * b;
    }
    multiply_chains(w->code, 8, kind.chain, kind.signed_codes, _mm256_set1_epi16(1), q, 0, tokens, total);
    for (int t = 0; t < tokens; t++) {
        if (kind.offset_bits)
            total[t] = _mm256_sub_epi32(total[t], _mm256_set1_epi32(a[t].sum[b] * (1 << kind.offset_bits)));
        __m256 scale = _mm256_mul_ps(w->d, _mm256_set1_ps(a[t].d[b]));
        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[t]), scale, acc[t]);
        if (kind.has_min)
            acc[t] = _mm256_fmadd_ps(w->m, _mm256_set1_ps(a[t].s[b]), acc[t]);
    }
}

TILE_INLINE void multiply_tokens(const tile32 *w, tile_kind kind, const fomoe_act32 *a, int tokens, int b,
                                 __m256 *acc)
{
    int t = 0;
    for (; t + TILE_MOST <= tokens; t += TILE_MOST)
        multiply_tile(w, kind, a + t, TILE_MOST, b, acc + t);
    for (; t + TILE_FEW <= tokens; t += TILE_FEW)
        multiply_tile(w, kind, a + t, TILE_FEW, b, acc + t);
    for (; t < tokens; t++)
        multiply_tile(w, kind, a + t, 1, b, acc + t);
}

fomoe_rows_fn fomoe_rows_avx2_32(int type)
{
    return rows_of_type(type);
}
#endif
