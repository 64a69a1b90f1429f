/* The router of a MoE layer.
 *
 * Owns: norm, router product, softmax over all experts, the top k and their weights. Does not know: where experts lie.
 */
#ifndef FOMOE_ROUTE_H
#define FOMOE_ROUTE_H

#include <stddef.h>
#include <stdint.h>

#include "linear.h"

typedef struct fomoe_route {
    struct fomoe_pool *pool;
    void *scratch; /* fomoe_route_scratch bytes, 64-byte aligned */
    const void *router; /* [num_experts][hidden] */
    int64_t router_row_bytes;
    int32_t router_type;
    int32_t hidden;
    int32_t num_experts;
    int32_t top_k;
    int32_t renormalise;
    float weights_scale;
    float eps;
    float *h; /* [tokens][ldh] */
    int64_t ldh;
    float *logits;  /* [tokens][num_experts] */
    int32_t *ids;   /* [tokens][top_k] */
    float *weights; /* [tokens][top_k] */
} fomoe_route;

size_t fomoe_route_scratch(int num_threads, int tokens, int hidden, int num_experts);

/* x [tokens][ldx] -> h = RMS(x, norm), logits, and ids and weights by descending logit, the lower id first where two are
 * equal. */
void fomoe_route_run(const fomoe_route *route, const float *x, int64_t ldx, int tokens, const float *norm);

#endif
