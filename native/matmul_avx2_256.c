/* AVX2 products of the types with blocks of 256.
 *
 * Owns: a tile times tokens. Does not know: how the types are packed (tile_256.h).
 */
#if defined(__x86_64__)
#include "tile_avx2.h"
#include "tile_256.h"

TILE_INLINE __m256 multiply_block(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int b,
                                  __m256i total, __m256 acc)
{
    __m256 da = _mm256_set1_ps(a->d[b]);
    __m256i m = _mm256_setzero_si256();
    const int16_t *sums = kind.pairs == 8 ? a->sum16 + 16 * b : a->sum32 + 8 * b;
    for (int i = 0; i < kind.pairs; i++)
        m = _mm256_add_epi32(m, _mm256_madd_epi16(w->pair[i], broadcast4(sums + 2 * i)));
    if (kind.pairs && kind.correction_bits)
        total = _mm256_sub_epi32(total, _mm256_slli_epi32(m, kind.correction_bits));
    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(w->d, da), acc);
    if (kind.pairs && !kind.correction_bits)
        acc = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(m), _mm256_mul_ps(w->dmin, da), acc);
    return acc;
}

/* acc[t] += block b times `tokens` (a constant) tokens, whose sums stay in registers. */
TILE_INLINE void multiply_tile(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int tokens, int b,
                               __m256 *acc)
{
    __m256i total[TILE_MOST];
    const int8_t *q[TILE_MOST];
    for (int t = 0; t < tokens; t++) {
        total[t] = _mm256_setzero_si256();
        q[t] = a[t].q + 256 * b;
    }
    for (int j = 0; j < 256 / kind.sub; j++)
        multiply_chains(w->code + j * (kind.sub / 4), kind.sub / 4, kind.chain, kind.signed_codes,
                        w->scale[j], q, kind.sub * j, tokens, total);
    for (int t = 0; t < tokens; t++)
        acc[t] = multiply_block(w, kind, &a[t], b, total[t], acc[t]);
}

TILE_INLINE void multiply_tokens(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int tokens, int b,
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

fomoe_rows_fn fomoe_rows_avx2_256(int type)
{
    return rows_of_type(type);
}
#endif
