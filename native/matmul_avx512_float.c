/* AVX-512 products of F32, F16 and BF16 weights with float activations.
 *
 * Owns: their sums, sixteen lanes by column (see matmul_kernels.h). Does not know: quantised types.
 */
#if defined(__x86_64__)
#include "tile_avx512.h"

enum { FLOAT_ROWS = 4, FLOAT_TOKENS = 4 };

/* 16 columns from `c` on; those past the end are zero and leave the sums as they are. */
AVX512_INLINE __m512 load_weights(int type, const uint8_t *row, int c, __mmask16 mask)
{
    if (type == FOMOE_F32)
        return _mm512_maskz_loadu_ps(mask, row + 4 * (size_t)c);
    __m256i half = _mm256_maskz_loadu_epi16(mask, row + 2 * (size_t)c);
    if (type == FOMOE_F16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512_INLINE float reduce(__m512 v)
{
    __m256 v8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
    __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
    return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

/* `n` weight rows times `tokens` tokens, both constants. */
AVX512_INLINE void multiply(int type, const uint8_t *const *row, int n, const float *const *x, int tokens,
                            int cols, float *const *y, int r)
{
    __m512 acc[FLOAT_ROWS][FLOAT_TOKENS];
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
            for (int t = 0; t < tokens; t++)
                acc[i][t] = _mm512_fmadd_ps(w, xs[t], acc[i][t]);
        }
    }
    for (int i = 0; i < n; i++)
        for (int t = 0; t < tokens; t++)
            y[t][r + i] = reduce(acc[i][t]);
}

AVX512_INLINE void rows_of_type(int type, const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows,
                                int num_rows, int row_begin, int row_end, float *y, int64_t ldy)
{
    for (int t0 = 0; t0 < num_rows; t0 += FLOAT_TOKENS) {
        int tokens = num_rows - t0 < FLOAT_TOKENS ? num_rows - t0 : FLOAT_TOKENS;
        const float *x[FLOAT_TOKENS];
        float *out[FLOAT_TOKENS];
        for (int t = 0; t < tokens; t++) {
            x[t] = act->f32 + (rows ? rows[t0 + t] : t0 + t) * act->ld;
            out[t] = y + (t0 + t) * ldy;
        }
        for (int r = row_begin; r < row_end; ) {
            const uint8_t *row[FLOAT_ROWS];
            int n = row_end - r >= FLOAT_ROWS ? FLOAT_ROWS : 1;
            for (int i = 0; i < n; i++)
                row[i] = (const uint8_t *)w->data + (r + i) * w->row_bytes;
            if (n == FLOAT_ROWS && tokens == FLOAT_TOKENS)
                multiply(type, row, FLOAT_ROWS, x, FLOAT_TOKENS, w->cols, out, r);
            else
                for (int t = 0; t < tokens; t++) {
                    if (n == FLOAT_ROWS)
                        multiply(type, row, FLOAT_ROWS, x + t, 1, w->cols, out + t, r);
                    else
                        multiply(type, row, 1, x + t, 1, w->cols, out + t, r);
                }
            r += n;
        }
    }
}

#define AVX512_ROWS_FLOAT(name, type)                                                                      \
    AVX512_TARGET static void rows_##name(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, \
                                          int num_rows, int row_begin, int row_end, float *y, int64_t ldy) \
    {                                                                                                      \
        rows_of_type(type, w, act, rows, num_rows, row_begin, row_end, y, ldy);                            \
    }

AVX512_ROWS_FLOAT(f32, FOMOE_F32)
AVX512_ROWS_FLOAT(f16, FOMOE_F16)
AVX512_ROWS_FLOAT(bf16, FOMOE_BF16)

fomoe_rows_fn fomoe_rows_avx512_float(int type)
{
    return type == FOMOE_F32 ? rows_f32 : type == FOMOE_F16 ? rows_f16 : type == FOMOE_BF16 ? rows_bf16 : 0;
}
#endif
