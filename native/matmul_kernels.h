/* What each ISA brings to matmul.c, and what no ISA may change.
 *
 * Every kernel computes the same floats, bit for bit, on any ISA and for any number of tokens:
 *   quantised: block after block, acc = fma(float(I), dw * da, acc), I being the exact integer sum over
 *     the block of scale * code * q; then, where the type has minima, acc = fma(float(M), -(dmin * da), acc)
 *     with M = sum of min * sum(q); for Q4_1 and Q5_1 acc = fma(m, da * sum(q), acc).
 *   float: sixteen partial sums, lane c % 16, by fma; then lanes i and i + 8 are added, i and i + 4,
 *     i and i + 2, and the last two.
 */
#ifndef FOMOE_MATMUL_KERNELS_H
#define FOMOE_MATMUL_KERNELS_H

#include "matmul.h"

typedef void (*fomoe_rows_fn)(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                              int row_begin, int row_end, float *y, int64_t ldy);

void fomoe_rows_scalar(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                       int row_begin, int row_end, float *y, int64_t ldy);

/* A type's kernel of an ISA, by the size of its blocks; NULL where there is none. */
fomoe_rows_fn fomoe_rows_avx2_256(int type);
fomoe_rows_fn fomoe_rows_avx2_32(int type);
fomoe_rows_fn fomoe_rows_avx2_float(int type);
fomoe_rows_fn fomoe_rows_avx512_256(int type);
fomoe_rows_fn fomoe_rows_avx512_32(int type);
fomoe_rows_fn fomoe_rows_avx512_float(int type);

/* A quantised type's kernel for one token (num_rows 1). */
fomoe_rows_fn fomoe_row_avx2(int type);
fomoe_rows_fn fomoe_row_avx512(int type);

/* The types with blocks of 256 and of 32 on AMX, whatever the type. */
void fomoe_rows_amx_256(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                        int row_begin, int row_end, float *y, int64_t ldy);
void fomoe_rows_amx_32(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                       int row_begin, int row_end, float *y, int64_t ldy);

#endif
