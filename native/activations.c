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

float fomoe_quantize_scalar(const float *x, int n, int8_t *q)
{
    float largest = 0;
    for (int i = 0; i < n; i++)
        largest = fmaxf(largest, fabsf(x[i]));
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    if (!isfinite(inverse))
        inverse = 0;    /* a block so small that its inverse overflows is zero to every product */
    for (int i = 0; i < n; i++)
        q[i] = (int8_t)lrintf(x[i] * inverse);
    return inverse > 0 ? largest / 127.0f : 0.0f;
}

static int sum_codes(const int8_t *q, int n)
{
    int sum = 0;
    for (int i = 0; i < n; i++)
        sum += q[i];
    return sum;
}

static void prepare_256(const fomoe_act *act, int token, const float *x)
{
    fomoe_act256 a = fomoe_act256_at(act->forms[FOMOE_FORMAT_256], token, act->cols);
    for (int b = 0; b < act->cols / 256; b++) {
        int8_t *q = (int8_t *)a.q + 256 * b;
        int16_t *sum32 = (int16_t *)a.sum32 + 8 * b, *sum16 = (int16_t *)a.sum16 + 16 * b;
        ((float *)a.d)[b] = fomoe_quantize_scalar(x + 256 * b, 256, q);
        for (int j = 0; j < 16; j++) {
            sum16[j] = sum_codes(q + 16 * j, 16);
            ((int32_t *)a.minus32)[16 * b + j] = -32 * sum16[j];
        }
        for (int j = 0; j < 8; j++)
            sum32[j] = sum16[2 * j] + sum16[2 * j + 1];
    }
}

static void prepare_32(const fomoe_act *act, int token, const float *x)
{
    fomoe_act32 a = fomoe_act32_at(act->forms[FOMOE_FORMAT_32], token, act->cols);
    for (int b = 0; b < act->cols / 32; b++) {
        int8_t *q = (int8_t *)a.q + 32 * b;
        float d = fomoe_quantize_scalar(x + 32 * b, 32, q);
        int sum = sum_codes(q, 32);
        ((float *)a.d)[b] = d;
        ((float *)a.s)[b] = d * (float)sum;
        ((int32_t *)a.sum)[b] = sum;
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
