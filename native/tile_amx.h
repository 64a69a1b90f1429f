/* AMX beside AVX-512: 16 tokens times 16 weight rows at once.
 *
 * Owns: permission and the shapes of the tile registers. Does not know: types.
 *
 * A vector of codes (4 columns of 16 rows) is a row of the second operand of TDPBSUD as it is, so AMX
 * takes the tiles that AVX-512 unpacks. Sums are taken over one sub-block (16 or 32 columns), scaled in
 * AVX-512, and stay exact.
 */
#ifndef FOMOE_TILE_AMX_H
#define FOMOE_TILE_AMX_H

#define TILE_AMX
#include "tile_avx512.h"

#undef TILE_TARGET
#define TILE_TARGET                                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")))

enum { AMX_TOKENS = 16, AMX_WORTHWHILE = 5 /* with fewer tokens vpdpbusd is as fast */ };

/* Tile registers: 0..3 sums [16 tokens][16 rows], 4, 5 activations [16][sub], 6, 7 codes [sub / 4][64]. */
TILE_INLINE void amx_configure(int sub)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = { .palette = 1 };
    for (int i = 0; i < 8; i++) {
        config.rows[i] = i < 6 ? AMX_TOKENS : (uint8_t)(sub / 4);
        config.row_bytes[i] = i == 4 || i == 5 ? (uint16_t)sub : 64;
    }
    _tile_loadconfig(&config);
}

/* sums [16 tokens] of lanes = activations [16][sub] times codes. */
TILE_INLINE void amx_multiply(const int8_t *q, size_t stride, const __m512i *code, __m512i *sums)
{
    _tile_zero(0);
    _tile_loadd(4, q, stride);
    _tile_loadd(6, code, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_stored(0, sums, 64);
}

/* Two sub-blocks, the second with other registers, so that they overlap. */
TILE_INLINE void amx_multiply_two(const int8_t *q, size_t stride, int sub, const __m512i *code, __m512i *sums)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, q, stride);
    _tile_loadd(6, code, 64);
    _tile_loadd(5, q + sub, stride);
    _tile_loadd(7, code + sub / 4, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 5, 7);
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + AMX_TOKENS, 64);
}

#endif
