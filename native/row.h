/* What the kernels of one token share: included by each row_ISA.h.
 *
 * Owns: how memory is walked. Does not know: the ISA, types.
 */
enum { FETCH_NEAR = 1024, FETCH_FAR = 12288 };

/* Results of a tile's blocks, row by row. */
typedef struct {
    int32_t *sum, *minimum;
    uint32_t *d;
} row_tile;

/* The same four dwords in every lane. */
TILE_INLINE vec v_lane32(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    return v_broadcast128(_mm_setr_epi32((int)a, (int)b, (int)c, (int)d));
}

/* Fetches what lies ahead, in `slots` equal parts for a group of `bytes`: far ahead into the L2 cache, nearer into L1
 * (Q4_K on AVX-512 from memory: 92 % of a plain read's rate; the nearer alone 75 to 84 %, none 60 %). `total` is
 * what is being summed: it ties the instructions to their places, for the compiler would issue them all at once, and a
 * burst stops the loads behind it. */
TILE_INLINE vec fetch_ahead(vec total, const uint8_t *group, int bytes, int slot, int slots)
{
    int lines = (bytes + 63) / 64, line = slot * lines / slots;
    if (!slot || line != (slot - 1) * lines / slots)
        __asm__("prefetcht2 %1\n\tprefetcht0 %2"
                : "+v"(total)
                : "m"(group[FETCH_FAR + 64 * line]), "m"(group[FETCH_NEAR + 64 * line]));
    return total;
}

/* Lane r of out[j] is dword j of row r, rows being `stride` dwords apart. */
TILE_INLINE void load_columns(const void *first, int stride, vec out[4])
{
    const uint8_t *row[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++)
        row[r] = (const uint8_t *)first + 4 * (size_t)r * stride;
    lanes_of(row, 0, out);
}
