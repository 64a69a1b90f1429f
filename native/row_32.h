/* One token times rows of the types with blocks of 32: included once by each ISA, after its row_ISA.h.
 *
 * Owns: how each type's codes are read, and the walk over blocks. Does not know: the ISA.
 *
 * As row_256.h, but a lane of a vector is a block: 16 columns of it, the first or the last.
 */
enum { VECS_32 = TILE_ROWS / VEC_LANES, FETCHES_32 = 3 };

typedef struct {
    int offset_bits;        /* codes are that power of two too large; 0: exact */
    int has_min;
    int signed_codes;
    int exponents;          /* a scale is the byte of MXFP4, not IEEE half precision */
} row_kind_32;

/* A token as the kernels take it: columns 0 .. 15 of every block, and 16 .. 31; after the last block the first ones
 * again, for vectors that end in the next row. */
typedef struct {
    int8_t *low, *high;
    const float *d, *s;
    const int32_t *sum;
    int blocks;             /* in a row */
} row_act_32;

/* Codes of as many blocks as there are lanes. */
typedef void (*codes_32_fn)(const uint8_t *const *block, vec *low, vec *high);

TILE_INLINE void fill_row_act_32(const fomoe_act *act, int token, row_act_32 *out)
{
    fomoe_act32 a = fomoe_act32_at(act->forms[FOMOE_FORMAT_32], token, act->cols);
    out->d = a.d, out->s = a.s, out->sum = a.sum;
    for (int b = 0, from = 0; b < out->blocks + TILE_ROWS; b++, from = from + 1 < out->blocks ? from + 1 : 0) {
        memcpy(out->low + 16 * b, a.q + 32 * from, 16);
        memcpy(out->high + 16 * b, a.q + 32 * from + 16, 16);
    }
}

/* As many blocks as a tile has rows, from block n of the tile on; the first is the b-th of its row. */
TILE_INLINE void sum_blocks_32(const uint8_t *tile, int n, int b, const row_act_32 *a, row_kind_32 kind,
                               int block_bytes, codes_32_fn codes, row_tile *out)
{
    const uint8_t *first = tile + (size_t)n * block_bytes;
    vec sums[VECS_32];
#pragma GCC unroll 4
    for (int v = 0; v < VECS_32; v++) {
        const uint8_t *block[VEC_LANES];
        vec low, high;
        for (int l = 0; l < VEC_LANES; l++) {
            int at = VEC_LANES * v + l;
            block[l] = first + at * block_bytes;
            if (kind.exponents)
                out->d[n + at] = block[l][0];
            else if (kind.has_min)
                memcpy(&out->d[n + at], block[l], 4);
            else
                out->d[n + at] = fomoe_load_u16(block[l]);
        }
        codes(block, &low, &high);
        low = fetch_ahead(low, first, TILE_ROWS * block_bytes, FETCHES_32 * v, FETCHES_32 * VECS_32);
        high = fetch_ahead(high, first, TILE_ROWS * block_bytes, FETCHES_32 * v + 1, FETCHES_32 * VECS_32);
        const int8_t *x = a->low + 16 * (b + VEC_LANES * v), *x1 = a->high + 16 * (b + VEC_LANES * v);
        sums[v] = v_sum_blocks(low, high, v_load(x), v_load(x1), kind.signed_codes);
        sums[v] = fetch_ahead(sums[v], first, TILE_ROWS * block_bytes, FETCHES_32 * v + 2, FETCHES_32 * VECS_32);
    }
    v_store(out->sum + n, v_transpose_dwords(v_sum_lanes(sums)));
}

/* The rows' results from their blocks', in the order of rounding of matmul_kernels.h. */
TILE_INLINE vecf add_blocks_32(const row_tile *t, const row_act_32 *a, row_kind_32 kind)
{
    vecf acc = vf_zero();
    for (int b = 0; b < a->blocks; b += 4) {
        vec sum[4], d[4];
        load_columns(t->sum + b, a->blocks, sum);
        load_columns(t->d + b, a->blocks, d);
        for (int j = 0; j < 4 && b + j < a->blocks; j++) {
            vecf scale = kind.exponents ? vf_e8m0_half(d[j]) : half_lanes(d[j]);
            if (kind.offset_bits)
                sum[j] = v_sub(sum[j], v_set32(a->sum[b + j] * (1 << kind.offset_bits)));
            acc = vf_fma(v_to_float(sum[j]), vf_mul(scale, vf_set1(a->d[b + j])), acc);
            if (kind.has_min)
                acc = vf_fma(half_lanes(v_srli(d[j], 16)), vf_set1(a->s[b + j]), acc);
        }
    }
    return acc;
}

/* Whole tiles only; returns the first row that is left. */
TILE_INLINE int row_of_kind_32(const fomoe_matrix *w, const fomoe_act *act, int token, int row_begin, int row_end,
                               float *y, row_kind_32 kind, int block_bytes, codes_32_fn codes)
{
    int blocks = w->cols / 32;
    int8_t low[16 * (blocks + TILE_ROWS)] __attribute__((aligned(64)));
    int8_t high[16 * (blocks + TILE_ROWS)] __attribute__((aligned(64)));
    int32_t results[2][TILE_ROWS * blocks + 4];
    row_act_32 a = { .low = low, .high = high, .blocks = blocks };
    row_tile t = { .sum = results[0], .d = (uint32_t *)results[1] };
    fill_row_act_32(act, token, &a);
    int r = row_begin;
    for (; r + TILE_ROWS <= row_end; r += TILE_ROWS) {
        const uint8_t *tile = (const uint8_t *)w->data + r * w->row_bytes;
        for (int i = 0, b = 0; i < blocks; i++) {
            sum_blocks_32(tile, TILE_ROWS * i, b, &a, kind, block_bytes, codes, &t);
            for (b += TILE_ROWS; b >= blocks;)
                b -= blocks;
        }
        tile_store(y + r, TILE_ROWS, add_blocks_32(&t, &a, kind));
    }
    return r;
}

/* 16 bytes of nibbles at `offset`. */
TILE_INLINE void nibbles_32(const uint8_t *const *block, int offset, vec *low, vec *high)
{
    vec q = v_load_lanes(block, offset), mask = v_set8(0x0f);
    *low = v_and(q, mask);
    *high = v_and(v_srli(q, 4), mask);
}

/* The 4 bytes at `offset` are the fifth bits of the 32 codes. */
TILE_INLINE void fifth_bits_32(const uint8_t *const *block, int offset, vec *low, vec *high)
{
    vec bits = v_load_lanes(block, offset);
    *low = v_or(*low, v_fifth(v_shuffle8(bits, v_lane32(0, 0, 0x01010101, 0x01010101))));
    *high = v_or(*high, v_fifth(v_shuffle8(bits, v_lane32(0x02020202, 0x02020202, 0x03030303, 0x03030303))));
}

TILE_INLINE void codes_q8_0(const uint8_t *const *block, vec *low, vec *high)
{
    vec flip = v_set8(WIDE_SUMS ? (char)0x80 : 0);
    *low = v_xor(v_load_lanes(block, 2), flip);
    *high = v_xor(v_load_lanes(block, 18), flip);
}

TILE_INLINE void codes_q4_0(const uint8_t *const *block, vec *low, vec *high)
{
    nibbles_32(block, 2, low, high);
}

TILE_INLINE void codes_q4_1(const uint8_t *const *block, vec *low, vec *high)
{
    nibbles_32(block, 4, low, high);
}

TILE_INLINE void codes_q5_0(const uint8_t *const *block, vec *low, vec *high)
{
    nibbles_32(block, 6, low, high);
    fifth_bits_32(block, 2, low, high);
}

TILE_INLINE void codes_q5_1(const uint8_t *const *block, vec *low, vec *high)
{
    nibbles_32(block, 8, low, high);
    fifth_bits_32(block, 4, low, high);
}

TILE_INLINE void codes_iq4_nl(const uint8_t *const *block, vec *low, vec *high)
{
    vec values = v_lookup(fomoe_iq4_values);
    nibbles_32(block, 2, low, high);
    *low = v_shuffle8(values, *low);
    *high = v_shuffle8(values, *high);
}

TILE_INLINE void codes_mxfp4(const uint8_t *const *block, vec *low, vec *high)
{
    vec values = v_broadcast128(_mm_loadu_si128((const void *)fomoe_mxfp4_values));
    values = v_add8(values, v_set8(16));
    nibbles_32(block, 1, low, high);
    *low = v_shuffle8(values, *low);
    *high = v_shuffle8(values, *high);
}

static const row_kind_32 row_q8_0 = { .offset_bits = WIDE_SUMS ? 7 : 0, .signed_codes = !WIDE_SUMS };
static const row_kind_32 row_q4_0 = { .offset_bits = 3 };
static const row_kind_32 row_q4_1 = { .has_min = 1 };
static const row_kind_32 row_q5_0 = { .offset_bits = 4 };
static const row_kind_32 row_q5_1 = { .has_min = 1 };
static const row_kind_32 row_iq4_nl = { .offset_bits = WIDE_SUMS ? 7 : 0, .signed_codes = !WIDE_SUMS };
static const row_kind_32 row_mxfp4 = { .offset_bits = 4, .exponents = 1 };

#define ROW_32(name)                                                                                                   \
    static TILE_TARGET void row_of_##name(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows,            \
                                          int num_rows, int row_begin, int row_end, float *y, int64_t ldy)             \
    {                                                                                                                  \
        int r = row_of_kind_32(w, act, rows ? rows[0] : 0, row_begin, row_end, y, row_##name, sizeof(fomoe_##name),    \
                               codes_##name);                                                                          \
        if (r < row_end)                                                                                               \
            ROW_REST_32(w->type)(w, act, rows, num_rows, r, row_end, y, ldy);                                          \
    }

ROW_32(q8_0)
ROW_32(q4_0)
ROW_32(q4_1)
ROW_32(q5_0)
ROW_32(q5_1)
ROW_32(iq4_nl)
ROW_32(mxfp4)

static fomoe_rows_fn row_of_type_32(int type)
{
    switch (type) {
    case FOMOE_Q8_0: return row_of_q8_0;
    case FOMOE_Q4_0: return row_of_q4_0;
    case FOMOE_Q4_1: return row_of_q4_1;
    case FOMOE_Q5_0: return row_of_q5_0;
    case FOMOE_Q5_1: return row_of_q5_1;
    case FOMOE_IQ4_NL: return row_of_iq4_nl;
    case FOMOE_MXFP4: return row_of_mxfp4;
    default: return 0;
    }
}
