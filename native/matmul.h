/* Quantised matrix products: the seam between the types' kernels and what calls them.
 *
 * Owns: weights as they lie in a file times float activations. Does not know: layers, experts, files.
 * Every type has a scalar kernel, the truth; SIMD kernels must equal it within the type's named limit.
 */
#ifndef FOMOE_MATMUL_H
#define FOMOE_MATMUL_H

#include <stddef.h>
#include <stdint.h>

#include "pool.h"

enum fomoe_isa {
    FOMOE_ISA_SCALAR = 0,
    FOMOE_ISA_AVX2 = 1,     /* AVX2, FMA, F16C */
    FOMOE_ISA_AVX512 = 2,   /* + F, BW, DQ, VL, VNNI */
    FOMOE_ISA_AMX = 3,      /* + AMX int8 */
};

/* The best ISA that this processor and kernel have. */
int fomoe_isa_best(void);
/* The one in use: fomoe_isa_best() unless set. Setting one that is missing returns -ENOTSUP. Not to be
 * changed while anything computes. */
int fomoe_isa_get(void);
int fomoe_isa_set(int isa);

/* A row-major matrix of ggml type `type`: rows * row_bytes bytes at `data`, at any alignment, without gaps. */
typedef struct {
    const void *data;
    int64_t row_bytes;
    int32_t type;
    int32_t rows;
    int32_t cols;
} fomoe_matrix;

/* Activations prepared for products with a set of types: float rows, and the quantised forms that the
 * kernels of those types take, all inside caller-owned scratch. */
typedef struct {
    const float *f32;       /* [tokens][ld] */
    int64_t ld;
    int32_t tokens;
    int32_t cols;
    void *forms[4];         /* private to matmul.c: one per activation format, NULL when not prepared */
} fomoe_act;

/* Bytes of scratch that fomoe_act_prepare needs at most for that many tokens and columns. */
size_t fomoe_act_bytes(int tokens, int cols);

/* Quantise x [tokens][ld] into the forms that `types[num_types]` need, on the pool. Scratch is 64-byte aligned. */
void fomoe_act_prepare(fomoe_pool *pool, fomoe_act *act, const float *x, int64_t ld, int tokens, int cols,
                       const int32_t *types, int num_types, void *scratch);

/* One thread's share: y[t * ldy + r] = sum_c W[r][c] * x[rows[t]][c] for r in [row_begin, row_end), t in
 * [0, num_rows); `rows` picks activation rows, NULL meaning 0..num_rows-1. Called inside pool tasks.
 * Bit-identical for a given ISA however r is split. */
void fomoe_matmul_rows(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                       int row_begin, int row_end, float *y, int64_t ldy);

/* Dequantise `n` values (a multiple of the block size) of a type to float32; -ENOTSUP for an unknown type. */
int fomoe_dequantize(int type, const void *data, float *out, int64_t n);

#endif
