/* AVX-512 products of the types with blocks of 32.
 *
 * Owns: how each type's packed codes become a tile, and the tile times tokens. Does not know: float
 * types, blocks of 256.
 */
#if defined(__x86_64__)
#include "tile_avx512.h"

/* A block of 16 rows; codes are unsigned, 2^offset_bits too large (see rows_of_kind). */
typedef struct {
    __m512i code[8];        /* vector i: columns 4i .. 4i + 3 */
    __m512 d, m;
} tile32;

/* What differs between types when a tile is multiplied; constants wherever it is used. */
typedef struct {
    int offset_bits;        /* sum of code * q -= (sum of q) << that, where it is not 0 */
    int has_min;
} tile_kind;

typedef void (*unpack_fn)(const tile_rows *t, size_t offset, tile32 *out);

/* acc[t] += block b times `tokens` tokens. */
AVX512_INLINE void multiply_tile(const tile32 *w, tile_kind kind, const fomoe_act32 *a, int tokens, int b,
                                 __m512 *acc)
{
    __m512i dot[8];
    for (int t = 0; t < tokens; t++)
        dot[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int t = 0; t < tokens; t++)
            dot[t] = _mm512_dpbusd_epi32(dot[t], w->code[i], broadcast4(a[t].q + 32 * b + 4 * i));
    for (int t = 0; t < tokens; t++) {
        if (kind.offset_bits)
            dot[t] = _mm512_sub_epi32(dot[t], _mm512_set1_epi32(a[t].sum[b] * (1 << kind.offset_bits)));
        __m512 scale = _mm512_mul_ps(w->d, _mm512_set1_ps(a[t].d[b]));
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t]), scale, acc[t]);
        if (kind.has_min)
            acc[t] = _mm512_fmadd_ps(w->m, _mm512_set1_ps(a[t].s[b]), acc[t]);
    }
}

AVX512_INLINE void rows_of_kind(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                                int row_begin, int row_end, float *y, int64_t ldy, tile_kind kind,
                                int block_bytes, unpack_fn unpack)
{
    fomoe_act32 a[TILE_TOKENS];
    __m512 acc[TILE_TOKENS];
    tile32 tile;
    for (int t0 = 0; t0 < num_rows; t0 += TILE_TOKENS) {
        int tokens = num_rows - t0 < TILE_TOKENS ? num_rows - t0 : TILE_TOKENS;
        for (int t = 0; t < tokens; t++)
            a[t] = fomoe_act32_at(act->forms[FOMOE_FORMAT_32], rows ? rows[t0 + t] : t0 + t, act->cols);
        for (int r = row_begin; r < row_end; r += TILE_ROWS) {
            tile_rows tr = tile_rows_at(w, r, row_end);
            for (int t = 0; t < tokens; t++)
                acc[t] = _mm512_setzero_ps();
            for (int b = 0; b < w->cols / 32; b++) {
                unpack(&tr, (size_t)b * block_bytes, &tile);
                int t = 0;
                for (; t + 8 <= tokens; t += 8)
                    multiply_tile(&tile, kind, a + t, 8, b, acc + t);
                if (t + 4 <= tokens) {
                    multiply_tile(&tile, kind, a + t, 4, b, acc + t);
                    t += 4;
                }
                for (; t < tokens; t++)
                    multiply_tile(&tile, kind, a + t, 1, b, acc + t);
            }
            for (int t = 0; t < tokens; t++)
                _mm512_mask_storeu_ps(y + (t0 + t) * ldy + r, tr.mask, acc[t]);
        }
    }
}

/* The 16 bytes of nibbles of every row: code[0..3] low, code[4..7] high. */
AVX512_INLINE void unpack_nibbles(const tile_rows *t, size_t offset, __m512i code[8])
{
    __m512i q[4], low = _mm512_set1_epi8(0x0f);
    load_lanes(t, offset, q);
    for (int j = 0; j < 4; j++) {
        code[j] = _mm512_and_si512(q[j], low);
        code[4 + j] = _mm512_and_si512(_mm512_srli_epi32(q[j], 4), low);
    }
}

/* Bits 4i .. 4i + 3 of every row's 32 become bit 4 of the four bytes of code[i]. */
AVX512_INLINE void add_fifth_bits(const tile_rows *t, size_t offset, __m512i code[8])
{
    int32_t words[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++)
        words[r] = (int32_t)fomoe_load_u32(t->row[r] + offset);
    __m512i bits = _mm512_loadu_si512(words), fifth = _mm512_set1_epi8(0x10);
    /* The low byte of every dword, four times; byte k keeps bit k. */
    __m512i select = _mm512_set1_epi32(0x08040201);
    for (int i = 0; i < 8; i++) {
        __m512i spread = _mm512_shuffle_epi8(_mm512_srli_epi32(bits, 4 * i),
                                             _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808,
                                                                                   0x0c0c0c0c)));
        __mmask64 set = _mm512_test_epi8_mask(spread, select);
        code[i] = _mm512_or_si512(code[i], _mm512_maskz_mov_epi8(set, fifth));
    }
}

AVX512_INLINE void look_up(const int8_t values[16], int offset, __m512i code[8])
{
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)values));
    table = _mm512_add_epi8(table, _mm512_set1_epi8((char)offset));
    for (int i = 0; i < 8; i++)
        code[i] = _mm512_shuffle_epi8(table, code[i]);
}

AVX512_INLINE void unpack_q8_0(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = _mm512_cvtph_ps(load_halves(t, offset));
    load_lanes(t, offset + 2, out->code);
    load_lanes(t, offset + 18, out->code + 4);
    for (int i = 0; i < 8; i++)
        out->code[i] = _mm512_xor_si512(out->code[i], _mm512_set1_epi8((char)0x80));
}

AVX512_INLINE void unpack_q4_0(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = _mm512_cvtph_ps(load_halves(t, offset));
    unpack_nibbles(t, offset + 2, out->code);
}

AVX512_INLINE void unpack_q4_1(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = _mm512_cvtph_ps(load_halves(t, offset));
    out->m = _mm512_cvtph_ps(load_halves(t, offset + 2));
    unpack_nibbles(t, offset + 4, out->code);
}

AVX512_INLINE void unpack_q5_0(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = _mm512_cvtph_ps(load_halves(t, offset));
    unpack_nibbles(t, offset + 6, out->code);
    add_fifth_bits(t, offset + 2, out->code);
}

AVX512_INLINE void unpack_q5_1(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = _mm512_cvtph_ps(load_halves(t, offset));
    out->m = _mm512_cvtph_ps(load_halves(t, offset + 2));
    unpack_nibbles(t, offset + 8, out->code);
    add_fifth_bits(t, offset + 4, out->code);
}

AVX512_INLINE void unpack_iq4_nl(const tile_rows *t, size_t offset, tile32 *out)
{
    unpack_q4_0(t, offset, out);
    look_up(fomoe_iq4_values, 128, out->code);
}

AVX512_INLINE void unpack_mxfp4(const tile_rows *t, size_t offset, tile32 *out)
{
    float d[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++)
        d[r] = fomoe_e8m0_half(t->row[r][offset]);
    out->d = _mm512_loadu_ps(d);
    unpack_nibbles(t, offset + 1, out->code);
    look_up(fomoe_mxfp4_values, 16, out->code);
}

static const tile_kind kind_q8_0 = { .offset_bits = 7 };
static const tile_kind kind_q4_0 = { .offset_bits = 3 };
static const tile_kind kind_q4_1 = { .has_min = 1 };
static const tile_kind kind_q5_0 = { .offset_bits = 4 };
static const tile_kind kind_q5_1 = { .has_min = 1 };
static const tile_kind kind_iq4_nl = { .offset_bits = 7 };
static const tile_kind kind_mxfp4 = { .offset_bits = 4 };

#define AVX512_ROWS_32(name)                                                                               \
    AVX512_TARGET static void rows_##name(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, \
                                          int num_rows, int row_begin, int row_end, float *y, int64_t ldy) \
    {                                                                                                      \
        rows_of_kind(w, act, rows, num_rows, row_begin, row_end, y, ldy, kind_##name,                      \
                     sizeof(fomoe_##name), unpack_##name);                                                 \
    }

AVX512_ROWS_32(q8_0)
AVX512_ROWS_32(q4_0)
AVX512_ROWS_32(q4_1)
AVX512_ROWS_32(q5_0)
AVX512_ROWS_32(q5_1)
AVX512_ROWS_32(iq4_nl)
AVX512_ROWS_32(mxfp4)

fomoe_rows_fn fomoe_rows_avx512_32(int type)
{
    switch (type) {
    case FOMOE_Q8_0: return rows_q8_0;
    case FOMOE_Q4_0: return rows_q4_0;
    case FOMOE_Q4_1: return rows_q4_1;
    case FOMOE_Q5_0: return rows_q5_0;
    case FOMOE_Q5_1: return rows_q5_1;
    case FOMOE_IQ4_NL: return rows_iq4_nl;
    case FOMOE_MXFP4: return rows_mxfp4;
    default: return 0;
    }
}
#endif
