/* The mixer of one layer in one call: norm, projections, attention or delta-net, projection back.
 *
 * Owns: their order. Does not know: what any of them does.
 */
#ifndef FOMOE_MIXER_H
#define FOMOE_MIXER_H

#include "attention.h"
#include "delta.h"
#include "linear.h"

/* The parts' activations point to each other: the inputs' products to what attention or delta reads, its output to what
 * `output` multiplies and adds to x. */
typedef struct fomoe_mixer {
    const fomoe_linear *inputs, *output;
    const float *norm;
    const fomoe_attention *attention; /* or NULL, and then: */
    const fomoe_delta *delta;
    float *x; /* [tokens][ldx] */
    int64_t ldx;
    int32_t tokens;
} fomoe_mixer;

/* x += mixer(RMS(x, norm)) */
void fomoe_mixer_run(const fomoe_mixer *mixer);

#endif
