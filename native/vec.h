/* Float vectors of one instruction set.
 *
 * Owns: the few vector operations that the steps are written in. each_isa.h includes this once per ISA, with the target
 * switched on; the names below stand for vf_add_avx512 and so on. Does not know: what is computed.
 * A vector holds VW floats: 16 with AVX-512, 8 with AVX2, else 1.
 */
#ifndef FOMOE_VEC_NAMES
#define FOMOE_VEC_NAMES
#define vf ISA(vf)
#define vf_load ISA(vf_load)
#define vf_store ISA(vf_store)
#define vf_load_part ISA(vf_load_part)
#define vf_store_part ISA(vf_store_part)
#define vf_load_f16 ISA(vf_load_f16)
#define vf_store_f16 ISA(vf_store_f16)
#define vf_set1 ISA(vf_set1)
#define vf_add ISA(vf_add)
#define vf_sub ISA(vf_sub)
#define vf_mul ISA(vf_mul)
#define vf_div ISA(vf_div)
#define vf_fma ISA(vf_fma)
#define vf_max ISA(vf_max)
#define vf_min ISA(vf_min)
#define vf_sum ISA(vf_sum)
#define vf_hmax ISA(vf_hmax)
#define vf_round ISA(vf_round)
#define vf_scale2 ISA(vf_scale2)
#define vf_zero_below ISA(vf_zero_below)
#define vf_exp ISA(vf_exp)
#define vf_reciprocal ISA(vf_reciprocal)
#define vf_sigmoid ISA(vf_sigmoid)
#define vf_silu ISA(vf_silu)
#define vf_load_upto ISA(vf_load_upto)
#define vf_store_upto ISA(vf_store_upto)
#define vf_load_f16_upto ISA(vf_load_f16_upto)
#define vf_store_f16_upto ISA(vf_store_f16_upto)
#define VW ISA(VW)
#endif

#if ISA_LEVEL == 2

enum { VW = 16 };
typedef __m512 vf;
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline __mmask16 ISA(vf_first)(int n) { return (__mmask16)((1u << n) - 1); }
static inline vf vf_load_part(const float *p, int n) { return _mm512_maskz_loadu_ps(ISA(vf_first)(n), p); }
static inline void vf_store_part(float *p, vf v, int n) { _mm512_mask_storeu_ps(p, ISA(vf_first)(n), v); }
static inline vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void vf_store_f16(uint16_t *p, vf v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline float vf_sum(vf v) { return _mm512_reduce_add_ps(v); }
static inline float vf_hmax(vf v) { return _mm512_reduce_max_ps(v); }
static inline vf vf_round(vf v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vf_scale2(vf v, vf n) { return _mm512_scalef_ps(v, n); }
static inline vf vf_zero_below(vf v, vf x, vf limit)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), v);
}

#elif ISA_LEVEL == 1

enum { VW = 8 };
typedef __m256 vf;
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
static inline __m256i ISA(vf_first)(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf vf_load_part(const float *p, int n) { return _mm256_maskload_ps(p, ISA(vf_first)(n)); }
static inline void vf_store_part(float *p, vf v, int n) { _mm256_maskstore_ps(p, ISA(vf_first)(n), v); }
static inline vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void vf_store_f16(uint16_t *p, vf v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline float vf_sum(vf v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float vf_hmax(vf v)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline vf vf_round(vf v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2^n in two factors, since n may reach -127, where one alone would be denormal. */
static inline vf vf_scale2(vf v, vf n)
{
    __m256i e = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(e, 1), bias = _mm256_set1_epi32(127);
    __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(v, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}
static inline vf vf_zero_below(vf v, vf x, vf limit) { return _mm256_and_ps(v, _mm256_cmp_ps(x, limit, _CMP_GE_OQ)); }

#else

enum { VW = 1 };
typedef float vf;
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
static inline vf vf_max(vf a, vf b) { return a > b ? a : b; }
static inline vf vf_min(vf a, vf b) { return a < b ? a : b; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_set1(float x) { return x; }
static inline vf vf_load(const float *p) { return *p; }
static inline void vf_store(float *p, vf v) { *p = v; }
static inline vf vf_load_part(const float *p, int n) { (void)n; return *p; }
static inline void vf_store_part(float *p, vf v, int n) { (void)n; *p = v; }
static inline vf vf_load_f16(const uint16_t *p) { return f16_to_f32(*p); }
static inline void vf_store_f16(uint16_t *p, vf v) { *p = f32_to_f16(v); }
static inline float vf_sum(vf v) { return v; }
static inline float vf_hmax(vf v) { return v; }
static inline vf vf_round(vf v) { return rintf(v); }
static inline vf vf_scale2(vf v, vf n) { return ldexpf(v, (int)n); }
static inline vf vf_zero_below(vf v, vf x, vf limit) { return x >= limit ? v : 0.0f; }

#endif

/* 1 / x, to the last bit or two. */
static inline vf vf_reciprocal(vf x)
{
#if ISA_LEVEL == 2 /* a Newton step on the estimate: vdivps takes 16 cycles */
    vf r = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.0f)));
#else
    return vf_div(vf_set1(1.0f), x);
#endif
}

/* e^x to about 1e-7 relative (Cephes' expf: x = n ln2 + r with |r| <= ln2 / 2, a polynomial in r, scaled by 2^n);
 * 0 below -87.3, and no overflow: above 88 it stays at e^88. */
static inline vf vf_exp(vf x)
{
    vf y = vf_min(vf_max(x, vf_set1(-87.3f)), vf_set1(88.0f));
    vf n = vf_round(vf_mul(y, vf_set1(1.44269504f)));
    vf r = vf_fma(n, vf_set1(-0.693359375f), y);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set1(1.0f)));
    return vf_zero_below(vf_scale2(p, n), x, vf_set1(-87.3f));
}

static inline vf vf_sigmoid(vf x)
{
    return vf_reciprocal(vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_set1(0.0f), x))));
}

static inline vf vf_silu(vf x) { return vf_mul(x, vf_sigmoid(x)); }

/* The next VW floats of a row that has n left. */
static inline vf vf_load_upto(const float *p, int n) { return n >= VW ? vf_load(p) : vf_load_part(p, n); }

static inline void vf_store_upto(float *p, vf v, int n)
{
    if (n >= VW)
        vf_store(p, v);
    else
        vf_store_part(p, v, n);
}

static inline vf vf_load_f16_upto(const uint16_t *p, int n)
{
    if (n >= VW)
        return vf_load_f16(p);
    uint16_t part[VW] = { 0 };
    memcpy(part, p, (size_t)n * sizeof *part);
    return vf_load_f16(part);
}

static inline void vf_store_f16_upto(uint16_t *p, vf v, int n)
{
    uint16_t part[VW];
    vf_store_f16(part, v);
    memcpy(p, part, (size_t)(n < VW ? n : VW) * sizeof *part);
}
