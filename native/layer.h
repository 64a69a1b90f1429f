/* What lies between two routings, in one call: the end of a layer's experts, then the mixer and the router of the next.
 *
 * Owns: the order. Does not know: what the parts compute, which experts are in memory.
 *
 * Whoever is called back between two of these steps runs cold, since the weights of a layer flush the caches: 20 us to
 * return to Python and as many to come back, on the machine of tools/results.tsv, six times a layer.
 */
#ifndef FOMOE_LAYER_H
#define FOMOE_LAYER_H

#include "mixer.h"
#include "moe.h"
#include "route.h"

/* The last experts of a step, as fomoe_moe_run takes them. ids is NULL when they have been told. */
typedef struct {
    fomoe_moe *moe;
    const int32_t *ids;
    const float *weights;
    const int64_t *experts;
    int32_t num;
} fomoe_moe_last;

/* When a part was done, CLOCK_MONOTONIC in ns. */
enum { FOMOE_LAYER_BEGUN, FOMOE_LAYER_RAN, FOMOE_LAYER_SUMMED, FOMOE_LAYER_MIXED, FOMOE_LAYER_ROUTED, FOMOE_LAYER_MARKS };

typedef struct fomoe_layer {
    const fomoe_mixer *mixer;
    const fomoe_route *route;
    const fomoe_moe_layer *experts;
    const float *norm; /* before the router */
    const int64_t *table; /* [num_experts][3]: addresses of the experts in memory, or zeros; may be NULL */
    int64_t *found; /* [num_experts][4] */
    int64_t marks[FOMOE_LAYER_MARKS];
} fomoe_layer;

/* How far a walk came. */
typedef struct fomoe_walk {
    int32_t next;  /* the first layer that is not finished */
    int32_t begun; /* it has begun, and lacks experts */
    fomoe_moe *moe; /* its step */
    int64_t marks[FOMOE_LAYER_MARKS]; /* the first three, where the last layer was not ended by another's begin */
} fomoe_walk;

/* Ends the layer before (`last` may be NULL), then begins this one: x += experts, x += mixer, routing of x into
 * layer->route's arrays, and *moe as fomoe_moe_begin gives it, started: of one token, who is in the table is being
 * computed, so that the caller's word with whoever reads the others costs no time. 0, or what fomoe_moe_run or _finish
 * complain of. */
int fomoe_layer_begin(fomoe_layer *layer, const fomoe_moe_last *last, fomoe_moe **moe);

/* Computes layers [first, num) as long as all experts that they pick are in their tables, and for about `most_ns`. */
int fomoe_layers_walk(fomoe_layer *const *layers, int first, int num, const fomoe_moe_last *last, int64_t most_ns,
                      fomoe_walk *walk);

#endif
