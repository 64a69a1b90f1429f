/* The gated delta-net of one layer: convolution, gates, recurrence, gated norm. All float32.
 *
 * Owns: the step for single tokens and the chunked form for longer segments. Does not know: projections, layers.
 * Formulas: model-spec 3.4; state s is [v_heads][head_dim (v)][head_dim (k)].
 */
#ifndef FOMOE_DELTA_H
#define FOMOE_DELTA_H

#include <stddef.h>
#include <stdint.h>

#include "pool.h"

typedef struct {
    int32_t start, length; /* tokens of the step */
    float *conv;           /* [conv_kernel - 1][conv_dim], oldest first */
    float *s;
} fomoe_delta_segment;

typedef struct fomoe_delta {
    struct fomoe_pool *pool;
    void *scratch; /* fomoe_delta_scratch bytes, 64-byte aligned */
    int32_t k_heads, v_heads, head_dim, conv_kernel;
    int32_t tiled; /* V head h reads K head h % k_heads, else h / (v_heads / k_heads) */
    float eps;
    const float *qkv, *z, *beta, *alpha; /* beta, alpha before sigmoid and softplus */
    int64_t ld_qkv, ld_z, ld_beta, ld_alpha;
    const float *conv_weight; /* [conv_kernel][conv_dim]: transposed */
    const float *dt_bias, *a, *norm;
    float *out;
    int64_t ld_out;
    int32_t num_segments;
    const fomoe_delta_segment *segments;
} fomoe_delta;

size_t fomoe_delta_scratch(int num_threads, int k_heads, int v_heads, int head_dim);
void fomoe_delta_run(const fomoe_delta *d);

#endif
