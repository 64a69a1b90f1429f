/* Float weights with float activations: included once by each ISA, which brings `multiply`.
 *
 * Owns: the walk over rows and tokens. Does not know: the ISA, quantised types.
 */
enum { FLOAT_ROWS = 4 };

/* y[t][r ..] = `n` weight rows times `tokens` tokens, both constants, as matmul_kernels.h says. */
TILE_INLINE void multiply(int type, const uint8_t *const *row, int n, const float *const *x, int tokens,
                          int cols, float *const *y, int r);

/* Bytes from rows to those after them, `n` rows being computed together: what is fetched ahead for one token, where
 * four rows read at once end before a prefetcher has followed them (20 to 24 GB/s of 32 on Zen 4). */
TILE_INLINE size_t next_rows(const uint8_t *const *row, int n)
{
    return n > 1 ? n * (size_t)(row[1] - row[0]) : 0;
}

TILE_INLINE void rows_of_type(int type, const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows,
                                int num_rows, int row_begin, int row_end, float *y, int64_t ldy)
{
    for (int t0 = 0; t0 < num_rows; t0 += FLOAT_TOKENS) {
        int tokens = num_rows - t0 < FLOAT_TOKENS ? num_rows - t0 : FLOAT_TOKENS;
        const float *x[FLOAT_TOKENS];
        float *out[FLOAT_TOKENS];
        for (int t = 0; t < tokens; t++) {
            x[t] = act->f32 + (rows ? rows[t0 + t] : t0 + t) * act->ld;
            out[t] = y + (t0 + t) * ldy;
        }
        for (int r = row_begin; r < row_end;) {
            const uint8_t *row[FLOAT_ROWS];
            int n = row_end - r >= FLOAT_ROWS ? FLOAT_ROWS : 1;
            for (int i = 0; i < n; i++)
                row[i] = (const uint8_t *)w->data + (r + i) * w->row_bytes;
            if (n == FLOAT_ROWS && tokens == FLOAT_TOKENS)
                multiply(type, row, FLOAT_ROWS, x, FLOAT_TOKENS, w->cols, out, r);
            else
                for (int t = 0; t < tokens; t++) {
                    if (n == FLOAT_ROWS)
                        multiply(type, row, FLOAT_ROWS, x + t, 1, w->cols, out + t, r);
                    else
                        multiply(type, row, 1, x + t, 1, w->cols, out + t, r);
                }
            r += n;
        }
    }
}

#define ROWS_FLOAT(name, type)                                                                      \
    static TILE_TARGET void rows_##name(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, \
                                          int num_rows, int row_begin, int row_end, float *y, int64_t ldy) \
    {                                                                                                      \
        rows_of_type(type, w, act, rows, num_rows, row_begin, row_end, y, ldy);                            \
    }

ROWS_FLOAT(f32, FOMOE_F32)
ROWS_FLOAT(f16, FOMOE_F16)
ROWS_FLOAT(bf16, FOMOE_BF16)

static fomoe_rows_fn float_rows_of_type(int type)
{
    return type == FOMOE_F32 ? rows_f32 : type == FOMOE_F16 ? rows_f16 : type == FOMOE_BF16 ? rows_bf16 : 0;
}
