/* A block times tokens, in groups whose sums stay in registers: included after tile_256.h or tile_32.h by an
 * ISA that computes so.
 *
 * Owns: how tokens fall into groups. Does not know: the ISA, which brings multiply_tile.
 */
/* acc[t] += block b times `tokens` tokens, a constant, fetching `ahead` meanwhile. */
TILE_INLINE void multiply_tile(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                               vecf *acc, tile_ahead ahead);

/* The same; nothing for groups that the ISA does not have. */
TILE_INLINE void multiply_group(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                                vecf *acc, tile_ahead ahead)
{
    if (tokens <= TILE_MOST)
        multiply_tile(w, kind, a, tokens, b, acc, ahead);
}

/* Groups of about equal size: a token by itself waits for its own sums (15 tokens as 8 + 7 instead of
 * 8 + 4 + 1 + 1 + 1: 157 instead of 144 G multiply-adds/s on Zen 4, 7 tokens 135 instead of 116). */
TILE_INLINE void multiply_tokens(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                                 vecf *acc, tile_ahead ahead)
{
    int groups = (tokens + TILE_MOST - 1) / TILE_MOST;
    ahead.lines = (ahead.lines + groups - 1) / groups;
    for (int t = 0, n; groups; groups--, t += n, ahead.at += 64 * ahead.lines) {
        n = (tokens - t + groups - 1) / groups;
        switch (n) {
        case 8: multiply_group(w, kind, a + t, 8, b, acc + t, ahead); break;
        case 7: multiply_group(w, kind, a + t, 7, b, acc + t, ahead); break;
        case 6: multiply_group(w, kind, a + t, 6, b, acc + t, ahead); break;
        case 5: multiply_group(w, kind, a + t, 5, b, acc + t, ahead); break;
        case 4: multiply_group(w, kind, a + t, 4, b, acc + t, ahead); break;
        case 3: multiply_group(w, kind, a + t, 3, b, acc + t, ahead); break;
        case 2: multiply_group(w, kind, a + t, 2, b, acc + t, ahead); break;
        default: multiply_group(w, kind, a + t, 1, b, acc + t, ahead);
        }
    }
}
