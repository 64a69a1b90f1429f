/* Activations: float rows quantised into the formats of activations.h.
 *
 * Owns: the rounding. Does not know: weights, threads beyond one task a token.
 */
#include "activations.h"

#include <math.h>

#include "matmul.h"
#include "quant.h"

enum fomoe_format fomoe_format_of(int type)
{
    switch (fomoe_type_block_size(type)) {
    case 256: return FOMOE_FORMAT_256;
    case 32: return FOMOE_FORMAT_32;
    default: return FOMOE_FORMAT_F32;
    }
}

static float quantize_scalar(const float *x, int n, int8_t *q, int32_t *sum16)
{
    float largest = 0;
    for (int i = 0; i < n; i++)
        largest = fmaxf(largest, fabsf(x[i]));
    float inverse = fomoe_quantize_inverse(largest);
    for (int j = 0; j < n / 16; j++) {
        sum16[j] = 0;
        for (int i = 16 * j; i < 16 * (j + 1); i++) {
            q[i] = (int8_t)lrintf(x[i] * inverse);
            sum16[j] += q[i];
        }
    }
    return inverse > 0 ? largest / 127.0f : 0.0f;
}

static fomoe_quantize_fn quantize_of_isa(void)
{
#if defined(__x86_64__)
    if (fomoe_isa_get() >= FOMOE_ISA_AVX2)
        return fomoe_quantize_avx2;
#endif
    return quantize_scalar;
}

static void prepare_256(const fomoe_act *act, int token, const float *x)
{
    fomoe_act256 a = fomoe_act256_at(act->forms[FOMOE_FORMAT_256], token, act->cols);
    fomoe_quantize_fn quantize = quantize_of_isa();
    for (int b = 0; b < act->cols / 256; b++) {
        int16_t *sum32 = (int16_t *)a.sum32 + 8 * b, *sum16 = (int16_t *)a.sum16 + 16 * b;
        int32_t sums[16];
        ((float *)a.d)[b] = quantize(x + 256 * b, 256, (int8_t *)a.q + 256 * b, sums);
        for (int j = 0; j < 16; j++)
            sum16[j] = (int16_t)sums[j];
        for (int j = 0; j < 8; j++)
            sum32[j] = (int16_t)(sums[2 * j] + sums[2 * j + 1]);
    }
}

static void prepare_32(const fomoe_act *act, int token, const float *x)
{
    fomoe_act32 a = fomoe_act32_at(act->forms[FOMOE_FORMAT_32], token, act->cols);
    fomoe_quantize_fn quantize = quantize_of_isa();
    for (int b = 0; b < act->cols / 32; b++) {
        int32_t sums[2];
        float d = quantize(x + 32 * b, 32, (int8_t *)a.q + 32 * b, sums);
        ((float *)a.d)[b] = d;
        ((float *)a.s)[b] = d * (float)(sums[0] + sums[1]);
        ((int32_t *)a.sum)[b] = sums[0] + sums[1];
    }
}

static void prepare_task(void *arg, int token, int thread)
{
    (void)thread;
    const fomoe_act *act = arg;
    const float *x = act->f32 + token * act->ld;
    if (act->forms[FOMOE_FORMAT_256])
        prepare_256(act, token, x);
    if (act->forms[FOMOE_FORMAT_32])
        prepare_32(act, token, x);
}

size_t fomoe_act_bytes(int tokens, int cols)
{
    return tokens * (fomoe_act256_bytes(cols) + fomoe_act32_bytes(cols));
}

void fomoe_act_prepare(fomoe_pool *pool, fomoe_act *act, const float *x, int64_t ld, int tokens, int cols,
                       const int32_t *types, int num_types, void *scratch)
{
    *act = (fomoe_act){ .f32 = x, .ld = ld, .tokens = tokens, .cols = cols };
    char *next = scratch;
    for (int i = 0; i < num_types; i++) {
        enum fomoe_format format = fomoe_format_of(types[i]);
        if (format == FOMOE_FORMAT_F32 || act->forms[format])
            continue;
        act->forms[format] = next;
        next += tokens * (format == FOMOE_FORMAT_256 ? fomoe_act256_bytes(cols) : fomoe_act32_bytes(cols));
    }
    if (next != (char *)scratch)
        fomoe_pool_run(pool, tokens, prepare_task, act);
}
