/* Scalar products: the truth that every SIMD kernel must equal.
 *
 * Owns: the order of every rounding (see matmul_kernels.h). Does not know: which ISA runs.
 */
#include <math.h>

#include "activations.h"
#include "matmul_kernels.h"
#include "quant.h"

static float reduce_lanes(float lane[16])
{
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

static float float_dot(int type, const uint8_t *row, const float *x, int cols)
{
    float lane[16] = { 0 };
    for (int c = 0; c < cols; c++) {
        float w;
        if (type == FOMOE_F32)
            memcpy(&w, row + 4 * (size_t)c, sizeof w);
        else
            w = type == FOMOE_F16 ? fomoe_f16(row + 2 * (size_t)c) : fomoe_bf16(row + 2 * (size_t)c);
        lane[c % 16] = fmaf(w, x[c], lane[c % 16]);
    }
    return reduce_lanes(lane);
}

static float block_dot_256(const fomoe_block *w, const fomoe_act256 *a, int b, float acc)
{
    const int8_t *q = a->q + 256 * b;
    int total = 0, minima = 0;
    for (int j = 0; j < 256 / w->sub; j++) {
        int dot = 0, sum = 0;
        for (int c = j * w->sub; c < (j + 1) * w->sub; c++) {
            dot += w->code[c] * q[c];
            sum += q[c];
        }
        total += w->scale[j] * dot;
        minima += w->has_min ? w->min[j] * sum : 0;
    }
    acc = fmaf((float)total, w->d * a->d[b], acc);
    return w->has_min ? fmaf((float)minima, -(w->dmin * a->d[b]), acc) : acc;
}

static float block_dot_32(const fomoe_block *w, const fomoe_act32 *a, int b, float acc)
{
    int total = 0;
    for (int c = 0; c < 32; c++)
        total += w->code[c] * a->q[32 * b + c];
    acc = fmaf((float)total, w->d * a->d[b], acc);
    return w->has_min ? fmaf(-w->dmin, a->s[b], acc) : acc;
}

static float row_dot(const fomoe_matrix *w, const uint8_t *row, const fomoe_act *act, int token)
{
    enum fomoe_format format = fomoe_format_of(w->type);
    if (format == FOMOE_FORMAT_F32)
        return float_dot(w->type, row, act->f32 + token * act->ld, w->cols);
    int size = fomoe_type_block_size(w->type), bytes = fomoe_type_block_bytes(w->type);
    fomoe_block block;
    float acc = 0;
    for (int b = 0; b < w->cols / size; b++) {
        fomoe_block_unpack(w->type, row + (size_t)b * bytes, &block);
        if (format == FOMOE_FORMAT_256) {
            fomoe_act256 a = fomoe_act256_at(act->forms[format], token, act->cols);
            acc = block_dot_256(&block, &a, b, acc);
        } else {
            fomoe_act32 a = fomoe_act32_at(act->forms[format], token, act->cols);
            acc = block_dot_32(&block, &a, b, acc);
        }
    }
    return acc;
}

void fomoe_rows_scalar(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                       int row_begin, int row_end, float *y, int64_t ldy)
{
    for (int r = row_begin; r < row_end; r++) {
        const uint8_t *row = (const uint8_t *)w->data + r * w->row_bytes;
        for (int t = 0; t < num_rows; t++)
            y[t * ldy + r] = row_dot(w, row, act, rows ? rows[t] : t);
    }
}
