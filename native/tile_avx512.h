/* Tiles of 16 weight rows for AVX-512: lane r of every vector belongs to row r.
 *
 * Owns: how 16 rows are turned into lanes, and the order of rounding of matmul_kernels.h in vectors.
 * Does not know: how a type packs its codes.
 *
 * A vector of codes holds 4 columns (bytes) of each row, so vpdpbusd with 4 activations broadcast to all
 * lanes sums within rows only: no horizontal sums, and scales are plain vectors. The transposition to
 * lanes costs less than the reductions that it saves, already for one token, and nothing for many.
 */
#ifndef FOMOE_TILE_AVX512_H
#define FOMOE_TILE_AVX512_H

#include <immintrin.h>

#include "activations.h"
#include "matmul_kernels.h"
#include "quant.h"

#define AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define AVX512_INLINE static inline AVX512_TARGET __attribute__((always_inline))

enum { TILE_ROWS = 16, TILE_TOKENS = 32 };

/* The rows of a tile; rows past the end repeat the last, their results are not stored. */
typedef struct {
    const uint8_t *row[TILE_ROWS];
    __mmask16 mask;
    const char *next;       /* where the tile after this one begins */
} tile_rows;

AVX512_INLINE tile_rows tile_rows_at(const fomoe_matrix *w, int row_begin, int row_end)
{
    tile_rows t;
    int n = row_end - row_begin < TILE_ROWS ? row_end - row_begin : TILE_ROWS;
    for (int i = 0; i < TILE_ROWS; i++)
        t.row[i] = (const uint8_t *)w->data + (row_begin + (i < n ? i : n - 1)) * w->row_bytes;
    t.next = (const char *)w->data + (row_begin + TILE_ROWS) * w->row_bytes;
    t.mask = (__mmask16)((1u << n) - 1);
    return t;
}

/* 16 bytes at `offset` of every row as four vectors: lane r of out[j] is dword j of row r.
 * Walks the next tile linearly, ahead of the 16 interleaved row streams, which no prefetcher follows. */
AVX512_INLINE void load_lanes(const tile_rows *t, size_t offset, __m512i out[4])
{
    __m512i z[4];
    for (int k = 0; k < 4; k++) {
        _mm_prefetch(t->next + TILE_ROWS * offset + 64 * k, _MM_HINT_T1);
        z[k] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(t->row[k] + offset)));
        z[k] = _mm512_inserti32x4(z[k], _mm_loadu_si128((const void *)(t->row[4 + k] + offset)), 1);
        z[k] = _mm512_inserti32x4(z[k], _mm_loadu_si128((const void *)(t->row[8 + k] + offset)), 2);
        z[k] = _mm512_inserti32x4(z[k], _mm_loadu_si128((const void *)(t->row[12 + k] + offset)), 3);
    }
    __m512i lo01 = _mm512_unpacklo_epi32(z[0], z[1]), hi01 = _mm512_unpackhi_epi32(z[0], z[1]);
    __m512i lo23 = _mm512_unpacklo_epi32(z[2], z[3]), hi23 = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi64(lo01, lo23);
    out[1] = _mm512_unpackhi_epi64(lo01, lo23);
    out[2] = _mm512_unpacklo_epi64(hi01, hi23);
    out[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

/* The two bytes at `offset` of every row, as halves. */
AVX512_INLINE __m256i load_halves(const tile_rows *t, size_t offset)
{
    uint64_t quads[4];
    for (int i = 0; i < 4; i++) {
        quads[i] = 0;
        for (int k = 0; k < 4; k++)
            quads[i] |= (uint64_t)fomoe_load_u16(t->row[4 * i + k] + offset) << (16 * k);
    }
    return _mm256_set_epi64x((int64_t)quads[3], (int64_t)quads[2], (int64_t)quads[1], (int64_t)quads[0]);
}

/* The low halves of all lanes, IEEE half precision, as floats. */
AVX512_INLINE __m512 half_lanes(__m512i v)
{
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}

/* Four activations (or two sums) of a token, to meet the same columns of all rows. */
AVX512_INLINE __m512i broadcast4(const void *p)
{
    int v;
    memcpy(&v, p, sizeof v);
    return _mm512_set1_epi32(v);
}

#endif
