/* One token times rows of the types with blocks of 256: included once by each ISA, after its row_ISA.h.
 *
 * Owns: the walk over blocks, and what the types differ in. Does not know: the ISA, how codes are packed
 * (row_codes_256.h).
 *
 * Tiles (tile_256.h) interleave as many rows as a vector has lanes, which no prefetcher follows. One token is bound by
 * memory, so here the blocks of a task's rows are one sequence, read from end to end: blocks are summed one by one, and
 * only the sums become lanes. They are the same integers, and are rounded in the same order.
 */
enum {
    GROUP = 4,                          /* blocks whose scales are read, and whose lanes are summed, together */
    HEADS = GROUP / VEC_LANES,
    GROUPS = TILE_ROWS / GROUP,
    VECS = 256 / VEC_BYTES,
};

/* Which columns the codes of a vector belong to, as they lie in the block. */
enum row_order { ORDER_PLAIN, ORDER_NIBBLES_64, ORDER_NIBBLES_32, ORDER_CRUMBS };

typedef struct {
    enum row_order order;
    int sub;        /* columns of a sub-block */
    int offset;     /* codes are that much too large */
    int minima;     /* of a block: 0, 8, 16 */
    int wide;       /* sums of products do not fit in 16 bits; vectors 2i and 2i + 1 share scales */
    int d_offset;   /* of d, and dmin after it, in a block */
} row_kind;

/* Scales of a group. Sub-blocks of 32 in the order of columns, of 16 in the order of the codes. */
typedef struct {
    int16_t scale[2][GROUP][8] __attribute__((aligned(64)));
    vec minima[HEADS];      /* a lane a block: sums of minimum * sum of q, to be added up */
} row_head;

/* A token as the kernels take it: columns in the order of the codes, and after the last block the first ones again, for
 * groups that end in the next row. */
typedef struct {
    int8_t *x, *base;
    int16_t *sums;          /* as many to a block as it has minima */
    const float *d;
    int blocks;             /* in a row */
} row_act;

/* The first column of lane l of vector i of a block. */
TILE_INLINE int column_of(enum row_order order, int i, int l)
{
    int half = i / 2 * VEC_BYTES + 16 * l, quarter = i / 4 * VEC_BYTES + 16 * l;
    switch (order) {
    case ORDER_NIBBLES_64: return half / 32 * 64 + i % 2 * 32 + half % 32;
    case ORDER_NIBBLES_32: return half / 16 * 32 + i % 2 * 16;
    case ORDER_CRUMBS: return quarter / 32 * 128 + i % 4 * 32 + quarter % 32;
    default: return i * VEC_BYTES + 16 * l;
    }
}

TILE_INLINE void fill_row_act(const fomoe_act *act, int token, row_kind kind, row_act *out)
{
    fomoe_act256 a = fomoe_act256_at(act->forms[FOMOE_FORMAT_256], token, act->cols);
    out->d = a.d;
    for (int b = 0, from = 0; b < out->blocks + GROUP; b++, from = from + 1 < out->blocks ? from + 1 : 0) {
        int8_t *x = out->x + 256 * b, *base = out->base + 256 * b;
        for (int i = 0; i < VECS; i++)
            for (int l = 0; l < VEC_LANES; l++)
                memcpy(x + i * VEC_BYTES + 16 * l, a.q + 256 * from + column_of(kind.order, i, l), 16);
        for (int i = 0; kind.offset && i < VECS; i++)
            v_store(base + i * VEC_BYTES, v_dot_base(kind.offset, v_load(x + i * VEC_BYTES)));
        for (int i = 0; kind.offset && kind.wide && i < VECS; i += 2)
            v_store(base + i * VEC_BYTES, v_add(v_load(base + i * VEC_BYTES), v_load(base + (i + 1) * VEC_BYTES)));
        memcpy(out->sums + kind.minima * b, (kind.minima == 16 ? a.sum16 : a.sum32) + kind.minima * from,
               2 * kind.minima);
    }
}

typedef void (*head_fn)(const uint8_t *const *block, const int16_t *sums, row_head *out);
typedef void (*codes_fn)(const uint8_t *block, vec *code);

/* The scales of vector i of the group's block k, for every column. */
TILE_INLINE vec scales_of(const row_head *head, row_kind kind, int k, int i)
{
    int w[VEC_LANES], half = 0;
    for (int l = 0; l < VEC_LANES; l++) {
        int at = kind.sub == 16 ? i * VEC_LANES + l : column_of(kind.order, i, l) / 32;
        w[l] = at % 8;
        half = at / 8;
    }
    vec words = v_broadcast128(_mm_load_si128((const void *)head->scale[half][k]));
    return v_shuffle8(words, v_spread_control(w));
}

/* The group's block k: sums of scale * code * q, to be added up. */
TILE_INLINE vec sum_block(const uint8_t *const *block, int k, const int8_t *x, const int8_t *base, const row_head *head,
                          row_kind kind, int block_bytes, codes_fn codes)
{
    vec code[VECS], total = v_zero();
    codes(block[k], code);
#pragma GCC unroll 8
    for (int i = 0; i < VECS; i++) {
        total = fetch_ahead(total, block[0], GROUP * block_bytes, k * VECS + i, GROUP * VECS);
        vec less = kind.offset ? v_load(base + i * VEC_BYTES) : v_zero();
        if (!kind.wide)
            total = v_scale(total, v_dot(less, code[i], v_load(x + i * VEC_BYTES)), scales_of(head, kind, k, i));
        else if (i % 2 == 0)
            total = v_scale_wide(total, less, code + i, x + i * VEC_BYTES, scales_of(head, kind, k, i));
    }
    return total;
}

/* As many blocks as a tile has rows, from block n of the tile on; the first is the b-th of its row. Returns that of the
 * block after them. */
TILE_INLINE int sum_blocks(const uint8_t *tile, int n, int b, const row_act *a, row_kind kind, int block_bytes,
                           head_fn heads, codes_fn codes, row_tile *out)
{
    vec sums[GROUPS], minima[4];
    for (int g = 0; g < GROUPS; g++) {
        const uint8_t *block[GROUP];
        row_head head;
        vec totals[GROUP];
        for (int k = 0; k < GROUP; k++) {
            int at = n + GROUP * g + k;
            block[k] = tile + (size_t)at * block_bytes;
            if (kind.minima)
                memcpy(&out->d[at], block[k] + kind.d_offset, 4);
            else
                out->d[at] = fomoe_load_u16(block[k] + kind.d_offset);
        }
        heads(block, a->sums + kind.minima * b, &head);
#pragma GCC unroll 4
        for (int k = 0; k < GROUP; k++)
            totals[k] = sum_block(block, k, a->x + 256 * (b + k), a->base + 256 * (b + k), &head, kind, block_bytes,
                                  codes);
        sums[g] = v_sum_lanes(totals);
        for (int h = 0; kind.minima && h < HEADS; h++)
            minima[HEADS * g + h] = head.minima[h];
        for (b += GROUP; b >= a->blocks;)
            b -= a->blocks;
    }
    v_store(out->sum + n, v_sum_across(sums));
    if (kind.minima)
        v_store(out->minimum + n, v_transpose_dwords(v_sum_lanes(minima)));
    return b;
}

/* The rows' results from their blocks', in the order of rounding of matmul_kernels.h. */
TILE_INLINE vecf add_blocks(const row_tile *t, const row_act *a, row_kind kind)
{
    vecf acc = vf_zero();
    for (int b = 0; b < a->blocks; b += 4) {
        vec sum[4], minimum[4], d[4];
        load_columns(t->sum + b, a->blocks, sum);
        load_columns(t->d + b, a->blocks, d);
        if (kind.minima)
            load_columns(t->minimum + b, a->blocks, minimum);
        for (int j = 0; j < 4 && b + j < a->blocks; j++) {
            vecf da = vf_set1(a->d[b + j]);
            acc = vf_fma(v_to_float(sum[j]), vf_mul(half_lanes(d[j]), da), acc);
            if (kind.minima)
                acc = vf_fnma(v_to_float(minimum[j]), vf_mul(half_lanes(v_srli(d[j], 16)), da), acc);
        }
    }
    return acc;
}

/* Whole tiles only; returns the first row that is left. */
TILE_INLINE int row_of_kind(const fomoe_matrix *w, const fomoe_act *act, int token, int row_begin, int row_end,
                            float *y, row_kind kind, int block_bytes, head_fn heads, codes_fn codes)
{
    int blocks = w->cols / 256;
    int8_t x[256 * (blocks + GROUP)] __attribute__((aligned(64)));
    int8_t base[kind.offset ? 256 * (blocks + GROUP) : 64] __attribute__((aligned(64)));
    int16_t sums[kind.minima * (blocks + GROUP) + 1];
    int32_t results[3][TILE_ROWS * blocks + 4];
    row_act a = { x, base, sums, NULL, blocks };
    row_tile t = { results[0], results[1], (uint32_t *)results[2] };
    fill_row_act(act, token, kind, &a);
    int r = row_begin;
    for (; r + TILE_ROWS <= row_end; r += TILE_ROWS) {
        const uint8_t *tile = (const uint8_t *)w->data + r * w->row_bytes;
        for (int i = 0, b = 0; i < blocks; i++)
            b = sum_blocks(tile, TILE_ROWS * i, b, &a, kind, block_bytes, heads, codes, &t);
        tile_store(y + r, TILE_ROWS, add_blocks(&t, &a, kind));
    }
    return r;
}

#include "row_codes_256.h"

static const row_kind row_q2_k = { .order = ORDER_CRUMBS, .sub = 16, .minima = 16, .d_offset = 80 };
static const row_kind row_q3_k = { .order = ORDER_CRUMBS, .sub = 16, .offset = 4, .d_offset = 108 };
static const row_kind row_q4_k = { .order = ORDER_NIBBLES_64, .sub = 32, .minima = 8 };
static const row_kind row_q5_k = { .order = ORDER_NIBBLES_64, .sub = 32, .minima = 8 };
static const row_kind row_q6_k = { .order = ORDER_PLAIN, .sub = 16, .offset = 32, .d_offset = 208 };
static const row_kind row_iq4_xs = { .order = ORDER_NIBBLES_32, .sub = 32, .offset = WIDE_SUMS ? 128 : 0, .wide = 1 };

#define ROW_256(name)                                                                                                  \
    static TILE_TARGET void row_of_##name(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows,            \
                                          int num_rows, int row_begin, int row_end, float *y, int64_t ldy)             \
    {                                                                                                                  \
        int r = row_of_kind(w, act, rows ? rows[0] : 0, row_begin, row_end, y, row_##name, sizeof(fomoe_##name),       \
                            heads_##name, codes_##name);                                                               \
        if (r < row_end)                                                                                               \
            ROW_REST_256(w->type)(w, act, rows, num_rows, r, row_end, y, ldy);                                         \
    }
ROW_256(q2_k)
ROW_256(q3_k)
ROW_256(q4_k)
ROW_256(q5_k)
ROW_256(q6_k)
ROW_256(iq4_xs)

static fomoe_rows_fn row_of_type_256(int type)
{
    switch (type) {
    case FOMOE_Q2_K: return row_of_q2_k;
    case FOMOE_Q3_K: return row_of_q3_k;
    case FOMOE_Q4_K: return row_of_q4_k;
    case FOMOE_Q5_K: return row_of_q5_k;
    case FOMOE_Q6_K: return row_of_q6_k;
    case FOMOE_IQ4_XS: return row_of_iq4_xs;
    default: return 0;
    }
}
