/* The walk over a matrix by tiles: included by tile_256.h and tile_32.h, after what they call a block.
 *
 * Owns: the order of tokens, rows and blocks. Does not know: the ISA, which brings multiply_tokens; how a
 * type packs its codes.
 */
/* acc[t] += block b of the rows times tokens a[0] .. a[tokens - 1], fetching `ahead` meanwhile; the ISA's. */
TILE_INLINE void multiply_tokens(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                                 vecf *acc, tile_ahead ahead);

typedef void (*unpack_fn)(const tile_rows *t, size_t offset, tile_block *out);

/* `kind`, `block_bytes` and `unpack` are constants wherever it is used. */
TILE_INLINE void rows_of_kind(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                              int row_begin, int row_end, float *y, int64_t ldy, tile_kind kind,
                              int block_bytes, unpack_fn unpack)
{
    block_act a[TILE_TOKENS];
    vecf acc[TILE_TOKENS];
    /* Rows of equal distance, 16 at a time; the distance is no power of two. */
    size_t stride = TILE_GATHERS ? fomoe_pad64(act->cols) + 64 : 0;
    int8_t gathered[TILE_GATHERS ? TILE_TOKENS * stride : 1] __attribute__((aligned(64)));
    tile_block block;
    for (int t0 = 0; t0 < num_rows; t0 += TILE_TOKENS) {
        int tokens = num_rows - t0 < TILE_TOKENS ? num_rows - t0 : TILE_TOKENS;
        for (int t = 0; t < tokens; t++)
            a[t] = block_act_at(act->forms[BLOCK_FORMAT], rows ? rows[t0 + t] : t0 + t, act->cols);
        for (int t = 0; TILE_GATHERS && t < TILE_TOKENS; t++) {
            if (t < tokens)
                memcpy(gathered + t * stride, a[t].q, act->cols);
            a[t].q = gathered + t * stride;
        }
        for (int r = row_begin; r < row_end; r += TILE_ROWS) {
            tile_rows tr = tile_rows_at(w, r, row_end);
            for (int t = 0; t < tokens; t++)
                acc[t] = vf_zero();
            for (int b = 0; b < w->cols / BLOCK_COLS; b++) {
                unpack(&tr, (size_t)b * block_bytes, &block);
                tile_ahead ahead = { tr.next + (size_t)b * TILE_ROWS * block_bytes,
                                     (TILE_ROWS * block_bytes + 63) / 64 };
                multiply_tokens(&block, kind, a, tokens, b, acc, ahead);
            }
            for (int t = 0; t < tokens; t++)
                tile_store(y + (t0 + t) * ldy + r, tr.n, acc[t]);
        }
    }
}

/* A type's fomoe_rows_fn, from its kind_ and unpack_. */
#define TILE_ROWS_OF(name)                                                                                 \
    static TILE_TARGET void rows_##name(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows,  \
                                        int num_rows, int row_begin, int row_end, float *y, int64_t ldy)   \
    {                                                                                                      \
        rows_of_kind(w, act, rows, num_rows, row_begin, row_end, y, ldy, kind_##name,                      \
                     sizeof(fomoe_##name), unpack_##name);                                                 \
    }
