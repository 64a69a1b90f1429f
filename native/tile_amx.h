/* AMX beside AVX-512: 16 tokens times 16 weight rows at once.
 *
 * Owns: the shapes of the tile registers. Does not know: types.
 *
 * A vector of codes (4 columns of 16 rows) is a row of the second operand of TDPBSUD as it is, so AMX
 * takes the tiles that AVX-512 unpacks.
 */
#ifndef FOMOE_TILE_AMX_H
#define FOMOE_TILE_AMX_H

#define TILE_AMX
#include "tile_avx512.h"

#undef TILE_TARGET
#define TILE_TARGET                                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")))

/* 8 tokens are faster by vpdpbusd: Q4_K 168 to 147 G multiply-adds a second and core. */
enum { AMX_TOKENS = 16, AMX_WORTHWHILE = 9 };

/* Tile registers: 0..3 sums [16 tokens][16 rows], 4, 5 activations [16][columns], 6, 7 codes
 * [columns / 4][16 rows of 4]. */
TILE_INLINE void amx_configure(int columns)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = { .palette = 1 };
    for (int i = 0; i < 8; i++) {
        config.rows[i] = i < 6 ? AMX_TOKENS : (uint8_t)(columns / 4);
        config.row_bytes[i] = i == 4 || i == 5 ? (uint16_t)columns : 64;
    }
    /* gcc 12 names only 8 bytes of the configuration as read by ldtilecfg, and may drop other stores. */
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

#endif
