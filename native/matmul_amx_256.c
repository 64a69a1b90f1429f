/* AMX products of the types with blocks of 256.
 *
 * Owns: a tile times groups of 16 tokens. Does not know: how the types are packed (tile_256.h).
 */
#if defined(__x86_64__)
#include "tile_amx.h"
#include "tile_256.h"
#include "tile_avx512_256.h"

TILE_INLINE void multiply_tokens(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int tokens, int b,
                                 __m512 *acc)
{
    __m512i sums[16][AMX_TOKENS];
    int blocks = 256 / kind.sub;
    size_t stride = (size_t)(a[1].q - a[0].q);
    for (int g = 0; g < tokens; g += AMX_TOKENS) {
        const int8_t *q = a[g].q + 256 * b;
        for (int j = 0; j < blocks; j += 2)
            amx_multiply_two(q + kind.sub * j, stride, kind.sub, w->code + j * (kind.sub / 4), sums[j]);
        for (int t = g; t < tokens && t < g + AMX_TOKENS; t++) {
            __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int j = 0; j < blocks; j += 2) {
                even = _mm512_add_epi32(even, _mm512_mullo_epi32(sums[j][t - g], w->scale[j]));
                odd = _mm512_add_epi32(odd, _mm512_mullo_epi32(sums[j + 1][t - g], w->scale[j + 1]));
            }
            acc[t] = multiply_block(w, kind, &a[t], b, _mm512_add_epi32(even, odd), acc[t]);
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
    amx_configure(w->type == FOMOE_Q2_K || w->type == FOMOE_Q3_K || w->type == FOMOE_Q6_K ? 16 : 32);
    rows_of_type(w->type)(w, act, rows, num_rows, row_begin, row_end, y, ldy);
    _tile_release();
}
#endif
