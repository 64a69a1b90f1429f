/* AVX2 products of F32, F16 and BF16 weights with float activations.
 *
 * Owns: their sums, sixteen lanes by column in two vectors (see matmul_kernels.h). Does not know:
 * quantised types.
 */
#if defined(__x86_64__)
#include "tile_avx2.h"

enum { FLOAT_TOKENS = 1 };
#include "tile_float.h"

TILE_INLINE __m256 load_weights(int type, const uint8_t *w)
{
    if (type == FOMOE_F32)
        return _mm256_loadu_ps((const float *)(const void *)w);
    __m128i half = _mm_loadu_si128((const void *)w);
    if (type == FOMOE_F16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

TILE_INLINE float reduce(__m256 low, __m256 high)
{
    __m256 v8 = _mm256_add_ps(low, high);
    __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
    __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
    return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

/* Sixteen columns of every row; `bytes` of a weight. */
TILE_INLINE void multiply_columns(int type, const uint8_t *const *row, int n, size_t offset, const float *x,
                                  __m256 (*acc)[2])
{
    size_t bytes = type == FOMOE_F32 ? 4 : 2, ahead = next_rows(row, n);
    __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + 8);
    for (int i = 0; i < n; i++) {
        acc[i][0] = _mm256_fmadd_ps(load_weights(type, row[i] + offset), low, acc[i][0]);
        acc[i][1] = _mm256_fmadd_ps(load_weights(type, row[i] + offset + 8 * bytes), high, acc[i][1]);
        if (n > 1)
            _mm_prefetch((const char *)row[i] + ahead + offset, _MM_HINT_T1);
    }
}

TILE_INLINE void multiply(int type, const uint8_t *const *row, int n, const float *const *x, int tokens,
                          int cols, float *const *y, int r)
{
    size_t bytes = type == FOMOE_F32 ? 4 : 2;
    for (int t = 0; t < tokens; t++) {
        __m256 acc[FLOAT_ROWS][2];
        for (int i = 0; i < n; i++)
            acc[i][0] = acc[i][1] = _mm256_setzero_ps();
        int c = 0;
        for (; c + 16 <= cols; c += 16)
            multiply_columns(type, row, n, c * bytes, x[t] + c, acc);
        if (c < cols) {     /* the last columns, padded with zeros that leave the sums as they are */
            uint8_t last[FLOAT_ROWS][16 * 4] = { 0 };
            const uint8_t *last_row[FLOAT_ROWS];
            float last_x[16] = { 0 };
            memcpy(last_x, x[t] + c, (cols - c) * sizeof(float));
            for (int i = 0; i < n; i++) {
                memcpy(last[i], row[i] + c * bytes, (cols - c) * bytes);
                last_row[i] = last[i];
            }
            multiply_columns(type, last_row, n, 0, last_x, acc);
        }
        for (int i = 0; i < n; i++)
            y[t][r + i] = reduce(acc[i][0], acc[i][1]);
    }
}

fomoe_rows_fn fomoe_rows_avx2_float(int type)
{
    return float_rows_of_type(type);
}
#endif
