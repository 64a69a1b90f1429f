/* Small float32 matrix products inside one thread, for one ISA (see each_isa.h).
 *
 * Owns: C[m][n] (+)= sum_k A(m, k) * B[k][n] with B and C row-major and A at any two strides, so that a transposed A
 * costs nothing. Every C[m][n] is summed over k in order, in one accumulator: results do not depend on m or n splits.
 */

#define gemm ISA(gemm)
#define gemm_tile ISA(gemm_tile)
#define transpose ISA(transpose)

#undef GEMM_ROWS
#undef GEMM_VECS
#if ISA_LEVEL == 2
#define GEMM_ROWS 8 /* 8 x 3 accumulators of 32 registers */
#define GEMM_VECS 3
#elif ISA_LEVEL == 1
#define GEMM_ROWS 4 /* 4 x 3 of 16 */
#define GEMM_VECS 3
#else
#define GEMM_ROWS 4
#define GEMM_VECS 3
#endif

/* `rows` and `vecs` are constants at every call, so that the accumulators stay in registers. `last` is the number of
 * floats of the last vector. */
static inline __attribute__((always_inline)) void gemm_tile(
    int rows, int vecs, int last, int k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
    float *c, int64_t ldc, int accumulate)
{
    vf acc[GEMM_ROWS][GEMM_VECS], bv[GEMM_VECS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++)
            acc[i][j] = !accumulate ? vf_set1(0.0f)
                        : j + 1 < vecs ? vf_load(c + i * ldc + j * VW)
                                       : vf_load_upto(c + i * ldc + j * VW, last);
    for (int p = 0; p < k; p++) {
        const float *bp = b + p * ldb, *ap = a + p * a_col;
        for (int j = 0; j < vecs; j++)
            bv[j] = j + 1 < vecs ? vf_load(bp + j * VW) : vf_load_upto(bp + j * VW, last);
        for (int i = 0; i < rows; i++) {
            vf x = vf_set1(ap[i * a_row]);
            for (int j = 0; j < vecs; j++)
                acc[i][j] = vf_fma(x, bv[j], acc[i][j]);
        }
    }
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j + 1 < vecs; j++)
            vf_store(c + i * ldc + j * VW, acc[i][j]);
        vf_store_upto(c + i * ldc + (vecs - 1) * VW, acc[i][vecs - 1], last);
    }
}

static void gemm(int m, int n, int k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                 float *c, int64_t ldc, int accumulate)
{
    for (int j = 0; j < n;) {
        int vecs = (n - j + VW - 1) / VW;
        vecs = vecs > GEMM_VECS ? (vecs == GEMM_VECS + 1 ? 2 : GEMM_VECS) : vecs; /* 4 left: 2 + 2 rather than 3 + 1 */
        int width = n - j < vecs * VW ? n - j : vecs * VW, last = width - (vecs - 1) * VW;
        int i = 0;
#define GEMM_TILE(r, v, l)                                                                                             \
    gemm_tile(r, v, l, k, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, accumulate)
#define GEMM_COLUMN(v, l)                                                                                              \
    do {                                                                                                               \
        for (; i + GEMM_ROWS <= m; i += GEMM_ROWS)                                                                     \
            GEMM_TILE(GEMM_ROWS, v, l);                                                                                \
        for (; i < m; i++)                                                                                             \
            GEMM_TILE(1, v, l);                                                                                        \
    } while (0)
        if (last < VW && vecs == 1)
            GEMM_COLUMN(1, last);
        else if (last < VW && vecs == 2)
            GEMM_COLUMN(2, last);
        else if (last < VW)
            GEMM_COLUMN(GEMM_VECS, last);
        else if (vecs == 1)
            GEMM_COLUMN(1, VW);
        else if (vecs == 2)
            GEMM_COLUMN(2, VW);
        else
            GEMM_COLUMN(GEMM_VECS, VW);
#undef GEMM_COLUMN
#undef GEMM_TILE
        j += width;
    }
}

static inline void transpose(const float *a, int64_t lda, int rows, int cols, float *t, int64_t ldt)
{
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++)
            t[j * ldt + i] = a[i * lda + j];
}
