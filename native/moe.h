/* The experts of one MoE layer for the tokens of one step.
 *
 * Owns: which token picked which expert, the experts' products in any order of arrival, the sum in rank order.
 * Does not know: routers, caches, where an expert's bytes came from.
 *
 * A pair is one (token, rank). Pairs are sorted by expert, so that an expert's outputs are consecutive rows; those of one
 * token by rank, so that it can be changed later who has a rank.
 * Every output is kept until fomoe_moe_finish adds them up by rank: results do not depend on the order of arrival.
 */
#ifndef FOMOE_MOE_H
#define FOMOE_MOE_H

#include <stddef.h>
#include <stdint.h>

#include "linear.h"

typedef struct {
    int32_t num_experts, top_k, hidden, ff;
    int32_t gate_type, up_type, down_type;
    int64_t gate_row_bytes, up_row_bytes, down_row_bytes;
} fomoe_moe_shape;

/* What stays the same from step to step for the experts of one layer. */
typedef struct fomoe_moe_layer {
    struct fomoe_pool *pool, *serial; /* `serial` has one thread */
    void *memory; /* 64-byte aligned, fomoe_moe_bytes long; layers may share it */
    fomoe_moe_shape shape;
    int32_t shared_ff; /* 0 without a shared expert */
    fomoe_product shared_gate, shared_up, shared_down;
    fomoe_product shared_scale; /* one row, under a sigmoid; data is NULL when there is none */
} fomoe_moe_layer;

typedef struct fomoe_moe fomoe_moe;

/* Bytes of memory that the steps of such layers need; `shared_ff` is 0 without a shared expert. */
size_t fomoe_moe_bytes(int num_threads, int max_tokens, const fomoe_moe_shape *shape, int shared_ff);

/* Begins a step in the layer's memory, whatever it served before. h [tokens][ldh] must stay until the last run. */
fomoe_moe *fomoe_moe_begin(const fomoe_moe_layer *layer, const float *h, int64_t ldh, int tokens);

/* Says who picked whom, before the first run: ids and weights [tokens][top_k] must stay until finish. One token's may be
 * said again while none but experts that stay at their rank have been started or run. */
void fomoe_moe_pick(fomoe_moe *moe, const int32_t *ids, const float *weights);

/* Starts the shared expert, once a step and before the first run: the other threads compute it while the caller goes on.
 * Of one token also the picks whose addresses are in table [num_experts][3], gate, up and down (0 where an expert is not
 * there); table may be NULL. What was started may be run once more, which does nothing but wait for it. The number of
 * picks that remain. */
int fomoe_moe_start(fomoe_moe *moe, const int64_t *table);

/* After fomoe_moe_pick: the picked experts as fomoe_moe_run takes them, by their addresses in table as above. Their number,
 * or -1 when one has none there. */
int fomoe_moe_find(const fomoe_moe *moe, const int64_t *table, int64_t *experts);

/* Computes experts given as (expert, gate address, up address, down address); one that no token picked costs nothing.
 * -EINVAL when an expert is out of range or was run before in this step. */
int fomoe_moe_run(fomoe_moe *moe, const int64_t *experts, int num);

/* After fomoe_moe_pick: starts one expert, as fomoe_moe_run takes it, ahead of the run that it is given to, if others can
 * compute it while the caller goes on; 1 if so. Of a single token, waits for what was started before; of several that
 * would take too long. */
int fomoe_moe_start_expert(fomoe_moe *moe, const int64_t *expert);

/* Waits for what was started: nothing that was given is used any more. */
void fomoe_moe_settle(const fomoe_moe_layer *layer);

/* x[t] += sum by rank of weight * output + shared; returns the number of pairs whose expert never ran (x is then left
 * alone). */
int fomoe_moe_finish(fomoe_moe *moe, float *x, int64_t ldx);

/* As fomoe_moe_finish, with the picks whose experts have run: others are computed elsewhere. */
void fomoe_moe_finish_some(fomoe_moe *moe, float *x, int64_t ldx);

#endif
