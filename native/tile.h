/* Tiles of weight rows, whatever the ISA: included at the end of each tile_ISA.h.
 *
 * Owns: which rows a tile has, and how they are fetched. Does not know: the ISA, whose vectors are `vec`;
 * how a type packs its codes.
 */
/* The rows of a tile; rows past the end repeat the last, their results are not stored. */
typedef struct {
    const uint8_t *row[TILE_ROWS];
    int n;
    const char *next;       /* where the tile after this one begins */
} tile_rows;

TILE_INLINE tile_rows tile_rows_at(const fomoe_matrix *w, int row_begin, int row_end)
{
    tile_rows t;
    int n = row_end - row_begin < TILE_ROWS ? row_end - row_begin : TILE_ROWS;
    for (int i = 0; i < TILE_ROWS; i++)
        t.row[i] = (const uint8_t *)w->data + (row_begin + (i < n ? i : n - 1)) * w->row_bytes;
    t.next = (const char *)w->data + (row_begin + TILE_ROWS) * w->row_bytes;
    t.n = n;
    return t;
}

/* The lanes_of a tile. */
TILE_INLINE void load_lanes(const tile_rows *t, size_t offset, vec out[4])
{
    lanes_of(t->row, offset, out);
}

/* Cache lines of the next tile, to be fetched while this one is multiplied: no prefetcher follows the rows of
 * a tile. Fetched in a burst, as a block is unpacked, they would keep its loads waiting for buffers (16 tokens
 * of Q4_K from memory: 138 instead of 147 G multiply-adds/s on Zen 4, 32 tokens 147 instead of 161). */
typedef struct {
    const char *at;
    int lines;
} tile_ahead;

/* One of `parts` equal shares of them. */
TILE_INLINE void fetch_share(tile_ahead ahead, int part, int parts)
{
    for (int i = ahead.lines * part / parts; i < ahead.lines * (part + 1) / parts; i++)
        _mm_prefetch(ahead.at + 64 * i, _MM_HINT_T1);
}

/* The two bytes at `offset` of every row, as floats from half precision. */
TILE_INLINE vecf load_halves(const tile_rows *t, size_t offset)
{
    uint64_t quads[TILE_ROWS / 4];
    for (int i = 0; i < TILE_ROWS / 4; i++) {
        quads[i] = 0;
        for (int k = 0; k < 4; k++)
            quads[i] |= (uint64_t)fomoe_load_u16(t->row[4 * i + k] + offset) << (16 * k);
    }
    return vf_load_halves(quads);
}

/* Four activations (or two sums) of a token, to meet the same columns of all rows. */
TILE_INLINE vec broadcast4(const void *p)
{
    int v;
    memcpy(&v, p, sizeof v);
    return v_set32(v);
}
