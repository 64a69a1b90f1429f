/* A block times tokens, in groups whose sums stay in registers: included after tile_256.h or tile_32.h by an
 * ISA that computes so.
 *
 * Owns: how tokens fall into groups. Does not know: the ISA, which brings multiply_tile.
 */
/* acc[t] += block b times `tokens` tokens, a constant. */
TILE_INLINE void multiply_tile(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                               vecf *acc);

TILE_INLINE void multiply_tokens(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                                 vecf *acc)
{
    int t = 0;
    for (; t + TILE_MOST <= tokens; t += TILE_MOST)
        multiply_tile(w, kind, a + t, TILE_MOST, b, acc + t);
    for (; t + TILE_FEW <= tokens; t += TILE_FEW)
        multiply_tile(w, kind, a + t, TILE_FEW, b, acc + t);
    for (; t < tokens; t++)
        multiply_tile(w, kind, a + t, 1, b, acc + t);
}
