/* AMX products of the types with blocks of 256.
 *
 * Owns: a tile times groups of 16 tokens. Does not know: how the types are packed (tile_256.h).
 *
 * Codes are multiplied with their scales first (16 bits, exact) and split into two bytes, so that sums
 * run over the whole block in the tile registers. Scaling the sums of every sub-block instead was 1.5
 * to 2 times slower: 8 or 16 tiles to store and scale in place of 2.
 */
#if defined(__x86_64__)
#include "tile_amx.h"
#include "tile_256.h"

/* The codes of a block times their scales, 16 bits each, as two bytes: 256 * high + low. */
typedef struct {
    __m512i low[64], high[64];
} split256;

TILE_INLINE void split_products(const tile_block *w, int sub, split256 *out)
{
    __m512i even_bytes = _mm512_set1_epi16(0x00ff);
    for (int j = 0; j < 256 / sub; j++) {
        __m512i scale_even = _mm512_and_si512(w->scale[j], even_bytes);
        __m512i scale_odd = _mm512_slli_epi16(w->scale[j], 8);
        for (int i = j * (sub / 4); i < (j + 1) * (sub / 4); i++) {
            __m512i even = _mm512_maddubs_epi16(w->code[i], scale_even);
            __m512i odd = _mm512_maddubs_epi16(w->code[i], scale_odd);
            out->low[i] = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, _mm512_slli_epi16(odd, 8));
            out->high[i] = _mm512_mask_mov_epi8(odd, 0x5555555555555555, _mm512_srli_epi16(even, 8));
        }
    }
}

/* Sums over a block of 16 tokens times 16 rows; two registers each, to halve the chains. */
TILE_INLINE void multiply_split(const split256 *w, const int8_t *q, size_t stride, __m512i (*sums)[AMX_TOKENS])
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#pragma GCC unroll 2
    for (int k = 0; k < 4; k += 2) {
        _tile_loadd(4, q + 64 * k, stride);
        _tile_loadd(6, w->low + 16 * k, 64);
        _tile_loadd(7, w->high + 16 * k, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, q + 64 * k + 64, stride);
        _tile_loadd(6, w->low + 16 * k + 16, 64);
        _tile_loadd(7, w->high + 16 * k + 16, 64);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

TILE_INLINE void multiply_tokens(const tile_block *w, tile_kind kind, const block_act *a, int tokens, int b,
                                 vecf *acc, tile_ahead ahead)
{
    __m512i sums[4][AMX_TOKENS];
    split256 split;
    split_products(w, kind.sub, &split);
    int groups = (tokens + AMX_TOKENS - 1) / AMX_TOKENS;
    for (int g = 0; g < tokens; g += AMX_TOKENS) {
        fetch_share(ahead, g / AMX_TOKENS, groups);
        multiply_split(&split, a[g].q + 256 * b, (size_t)(a[1].q - a[0].q), sums);
        for (int t = g; t < tokens && t < g + AMX_TOKENS; t++) {
            __m512i low = _mm512_add_epi32(sums[0][t - g], sums[2][t - g]);
            __m512i high = _mm512_add_epi32(sums[1][t - g], sums[3][t - g]);
            __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
            acc[t] = multiply_block(w, kind, &a[t], b, total, acc[t]);
        }
    }
}

TILE_TARGET void fomoe_rows_amx_256(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows,
                                    int num_rows, int row_begin, int row_end, float *y, int64_t ldy)
{
    if (num_rows < AMX_WORTHWHILE) {
        fomoe_rows_avx512_256(w->type)(w, act, rows, num_rows, row_begin, row_end, y, ldy);
        return;
    }
    amx_configure(64);
    rows_of_type(w->type)(w, act, rows, num_rows, row_begin, row_end, y, ldy);
    _tile_release();
}
#endif
