/* Root-mean-square norm of rows.
 *
 * Owns: y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * w. Does not know: whose norm it is.
 */
#ifndef FOMOE_NORM_H
#define FOMOE_NORM_H

#include <stdint.h>

#include "pool.h"

/* x [tokens][ldx] -> y [tokens][ldy], `cols` wide, weights w [cols]; tokens are split over the pool. */
void fomoe_norm_rows(fomoe_pool *pool, const float *x, int64_t ldx, int tokens, int cols, const float *w, float eps,
                     float *y, int64_t ldy);

#endif
