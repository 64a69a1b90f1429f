/* Products of several weight matrices with the same activations, with an optional norm before them.
 *
 * Owns: how the rows of the matrices are shared out between threads. Does not know: quantisation types, layers.
 */
#ifndef FOMOE_LINEAR_H
#define FOMOE_LINEAR_H

#include <stddef.h>
#include <stdint.h>

#include "matmul.h"

typedef struct {
    const void *data; /* the weights, row-major */
    int64_t row_bytes;
    int32_t type;
    int32_t rows;
    float *y; /* [tokens][ldy] */
    int64_t ldy;
} fomoe_product;

#define FOMOE_LINEAR_MAX_PRODUCTS 8

typedef struct fomoe_linear {
    struct fomoe_pool *pool;
    void *scratch; /* fomoe_linear_scratch(...) bytes, 64-byte aligned */
    int32_t cols;
    int32_t num_products;
    int32_t add; /* y += instead of y =; with one product only */
    float eps;
    fomoe_product products[FOMOE_LINEAR_MAX_PRODUCTS];
} fomoe_linear;

size_t fomoe_linear_scratch(int num_threads, int tokens, int cols);

/* x [tokens][ldx]; norm [cols] or NULL. */
void fomoe_linear_run(const fomoe_linear *linear, const float *x, int64_t ldx, int tokens, const float *norm);

/* How many rows of a matrix one task takes, in a run that reads `total_bytes` of weights: enough bytes that rows follow
 * each other for the prefetch, few enough that the threads end together. */
int fomoe_rows_per_task(int64_t row_bytes, int tokens, int64_t total_bytes, int num_threads);

/* Tokens that one task multiplies at a time where it needs room for the results. */
#define FOMOE_TOKEN_BLOCK 256
#define FOMOE_MAX_ROWS_PER_TASK 1024
#define FOMOE_TILE_FLOATS (FOMOE_TOKEN_BLOCK * 64) /* results of one task, where it needs room for them */

#endif
