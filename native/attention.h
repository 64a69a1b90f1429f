/* Causal softmax attention of one layer over a paged cache.
 *
 * Owns: per-head norms, RoPE, appending to the cache, attention itself, the output gate.
 * Does not know: projections, how pages are given to sequences.
 */
#ifndef FOMOE_ATTENTION_H
#define FOMOE_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#include "pool.h"

/* Tokens [start, start + length) of a step, at positions [position, position + length) of a sequence. */
typedef struct {
    int32_t start, length, position;
    const int32_t *pages;
} fomoe_segment;

typedef struct fomoe_attention {
    struct fomoe_pool *pool;
    void *scratch; /* fomoe_attention_scratch bytes, 64-byte aligned */
    int32_t heads, kv_heads, head_dim, rope_dims;
    int32_t gated;
    int32_t cache_f16; /* else float32 */
    int32_t page_tokens;
    float scale, eps;
    const double *rope_frequencies; /* [rope_dims / 2] */
    void *k_cache, *v_cache; /* [pages][kv_heads][page_tokens][head_dim] */
    const float *q_norm, *k_norm; /* [head_dim] or NULL */
    float *q, *k; /* overwritten */
    const float *v;
    float *out;
    int64_t ldq, ldk, ldv, ldo;
    int32_t num_segments;
    const fomoe_segment *segments;
} fomoe_attention;

size_t fomoe_attention_scratch(int num_threads, int tokens, int heads, int kv_heads, int head_dim);
void fomoe_attention_run(const fomoe_attention *a);

#endif
