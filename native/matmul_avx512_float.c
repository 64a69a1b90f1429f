/* AVX-512 products of F32, F16 and BF16 weights with float activations.
 *
 * Owns: their sums, sixteen lanes by column (see matmul_kernels.h). Does not know: quantised types.
 */
#if defined(__x86_64__)
#include "tile_avx512.h"

enum { FLOAT_TOKENS = 4 };
#include "tile_float.h"

/* 16 columns from `c` on; those past the end are zero and leave the sums as they are. */
TILE_INLINE __m512 load_weights(int type, const uint8_t *row, int c, __mmask16 mask)
{
    if (type == FOMOE_F32)
        return _mm512_maskz_loadu_ps(mask, row + 4 * (size_t)c);
    __m256i half = _mm256_maskz_loadu_epi16(mask, row + 2 * (size_t)c);
    if (type == FOMOE_F16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

TILE_INLINE float reduce(__m512 v)
{
    __m256 v8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
    __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
    return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

TILE_INLINE void multiply(int type, const uint8_t *const *row, int n, const float *const *x, int tokens,
                            int cols, float *const *y, int r)
{
    __m512 acc[FLOAT_ROWS][FLOAT_TOKENS];
    size_t bytes = type == FOMOE_F32 ? 4 : 2, ahead = next_rows(row, n);
    for (int i = 0; i < n; i++)
        for (int t = 0; t < tokens; t++)
            acc[i][t] = _mm512_setzero_ps();
    for (int c = 0; c < cols; c += 16) {
        __mmask16 mask = cols - c < 16 ? (__mmask16)((1u << (cols - c)) - 1) : 0xffff;
        __m512 xs[FLOAT_TOKENS];
        for (int t = 0; t < tokens; t++)
            xs[t] = _mm512_maskz_loadu_ps(mask, x[t] + c);
        for (int i = 0; i < n; i++) {
            __m512 w = load_weights(type, row[i], c, mask);
            if (tokens == 1 && n > 1)
                _mm_prefetch((const char *)row[i] + ahead + bytes * c, _MM_HINT_T1);
            for (int t = 0; t < tokens; t++)
                acc[i][t] = _mm512_fmadd_ps(w, xs[t], acc[i][t]);
        }
    }
    for (int i = 0; i < n; i++)
        for (int t = 0; t < tokens; t++)
            y[t][r + i] = reduce(acc[i][t]);
}

fomoe_rows_fn fomoe_rows_avx512_float(int type)
{
    return float_rows_of_type(type);
}
#endif
