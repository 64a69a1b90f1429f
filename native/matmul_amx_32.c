/* AMX products of the types with blocks of 32.
 *
 * Owns: a tile times groups of 16 tokens. Does not know: how the types are packed (tile_32.h).
 */
#if defined(__x86_64__)
#include "tile_amx.h"
#include "tile_32.h"

TILE_INLINE void multiply_tokens(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                                 vecf *acc, tile_ahead ahead)
{
    __m512i sums[AMX_TOKENS];
    size_t stride = (size_t)(a[1].q - a[0].q);
    int groups = (tokens + AMX_TOKENS - 1) / AMX_TOKENS;
    for (int g = 0; g < tokens; g += AMX_TOKENS) {
        fetch_share(ahead, g / AMX_TOKENS, groups);
        _tile_zero(0);
        _tile_loadd(4, a[g].q + 32 * b, stride);
        _tile_loadd(6, w->code, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_stored(0, sums, 64);
        for (int t = g; t < tokens && t < g + AMX_TOKENS; t++)
            acc[t] = multiply_block(w, kind, &a[t], b, sums[t - g], acc[t]);
    }
}

TILE_TARGET void fomoe_rows_amx_32(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows,
                                   int num_rows, int row_begin, int row_end, float *y, int64_t ldy)
{
    if (num_rows < AMX_WORTHWHILE) {
        fomoe_rows_avx512_32(w->type)(w, act, rows, num_rows, row_begin, row_end, y, ldy);
        return;
    }
    amx_configure(32);
    rows_of_type(w->type)(w, act, rows, num_rows, row_begin, row_end, y, ldy);
    _tile_release();
}
#endif
