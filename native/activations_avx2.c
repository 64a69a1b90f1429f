/* Activations quantised with AVX2: the same bits as the scalar code of activations.c.
 *
 * Owns: nothing but speed. Does not know: which format is being made.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "activations.h"

#define AVX2_TARGET __attribute__((target("avx2,fma")))

AVX2_TARGET static float largest_magnitude(const float *x, int n)
{
    __m256 sign = _mm256_set1_ps(-0.0f), largest[4];
    for (int i = 0; i < 4; i++)
        largest[i] = _mm256_setzero_ps();
    for (int c = 0; c < n; c += 32)
        for (int i = 0; i < 4; i++)
            largest[i] = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + c + 8 * i)), largest[i]);
    __m256 m8 = _mm256_max_ps(_mm256_max_ps(largest[0], largest[1]), _mm256_max_ps(largest[2], largest[3]));
    __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    m4 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    return _mm_cvtss_f32(_mm_max_ss(m4, _mm_movehdup_ps(m4)));
}

AVX2_TARGET static __m256i round_32(const float *x, __m256 inverse)
{
    __m256i v[4];
    for (int i = 0; i < 4; i++)
        v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

AVX2_TARGET float fomoe_quantize_avx2(const float *x, int n, int8_t *q, int32_t *sum16)
{
    float largest = largest_magnitude(x, n);
    float inverse = fomoe_quantize_inverse(largest);
    for (int c = 0; c < n; c += 32) {
        __m256i bytes = round_32(x + c, _mm256_set1_ps(inverse));
        _mm256_storeu_si256((__m256i *)(q + c), bytes);
        __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
        sums = _mm256_hadd_epi32(sums, sums);
        sums = _mm256_hadd_epi32(sums, sums);
        sum16[c / 16] = _mm256_extract_epi32(sums, 0);
        sum16[c / 16 + 1] = _mm256_extract_epi32(sums, 4);
    }
    return inverse > 0 ? largest / 127.0f : 0.0f;
}
#endif
