/* Types with blocks of 32 as tiles: included once by each ISA, after its tile_ISA.h.
 *
 * Owns: how each type's packed codes become a tile, and its integer sums floats, in the order of
 * matmul_kernels.h. Does not know: the ISA; its vectors are `vec`, and it brings multiply_tokens.
 */
enum { BLOCK_COLS = 32, BLOCK_FORMAT = FOMOE_FORMAT_32 };
typedef fomoe_act32 block_act;
#define block_act_at fomoe_act32_at

/* A block of TILE_ROWS rows. */
typedef struct {
    vec code[8];        /* vector i: columns 4i .. 4i + 3; unsigned but for signed_codes */
    vecf d, m;
} tile_block;

/* What differs between types when a tile is multiplied; constants wherever it is used. */
typedef struct {
    int offset_bits;        /* codes are that power of two too large; 0: exact */
    int has_min;
    int chain;              /* vectors of codes whose products a 16-bit sum holds */
    int signed_codes;
} tile_kind;

/* acc + a token's block, `total` being its sums of code * q. */
TILE_INLINE vecf multiply_block(const tile_block *w, tile_kind kind, const block_act *a, int b, vec total,
                                vecf acc)
{
    if (kind.offset_bits)
        total = v_sub(total, v_set32(a->sum[b] * (1 << kind.offset_bits)));
    vecf scale = vf_mul(w->d, vf_set1(a->d[b]));
    acc = vf_fma(v_to_float(total), scale, acc);
    if (kind.has_min)
        acc = vf_fma(w->m, vf_set1(a->s[b]), acc);
    return acc;
}

#include "tile_walk.h"

/* The 16 bytes of nibbles of every row: code[0..3] low, code[4..7] high. */
TILE_INLINE void unpack_nibbles(const tile_rows *t, size_t offset, vec code[8])
{
    vec q[4], low = v_set8(0x0f);
    load_lanes(t, offset, q);
    for (int j = 0; j < 4; j++) {
        code[j] = v_and(q[j], low);
        code[4 + j] = v_and(v_srli(q[j], 4), low);
    }
}

/* Bits 4i .. 4i + 3 of every row's 32 become bit 4 of the four bytes of code[i]. */
TILE_INLINE void add_fifth_bits(const tile_rows *t, size_t offset, vec code[8])
{
    int32_t words[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++)
        words[r] = (int32_t)fomoe_load_u32(t->row[r] + offset);
    vec bits = v_load(words);
    for (int i = 0; i < 8; i++)
        code[i] = v_or(code[i], v_fifth_bits(v_srli(bits, 4 * i)));
}

TILE_INLINE void look_up(const int8_t values[16], int offset, vec code[8])
{
    vec table = v_broadcast128(_mm_loadu_si128((const void *)values));
    table = v_add8(table, v_set8((char)offset));
    for (int i = 0; i < 8; i++)
        code[i] = v_shuffle8(table, code[i]);
}

TILE_INLINE void unpack_q8_0(const tile_rows *t, size_t offset, tile_block *out)
{
    out->d = load_halves(t, offset);
    load_lanes(t, offset + 2, out->code);
    load_lanes(t, offset + 18, out->code + 4);
    if (WIDE_SUMS)
        for (int i = 0; i < 8; i++)
            out->code[i] = v_xor(out->code[i], v_set8((char)0x80));
}

TILE_INLINE void unpack_q4_0(const tile_rows *t, size_t offset, tile_block *out)
{
    out->d = load_halves(t, offset);
    unpack_nibbles(t, offset + 2, out->code);
}

TILE_INLINE void unpack_q4_1(const tile_rows *t, size_t offset, tile_block *out)
{
    out->d = load_halves(t, offset);
    out->m = load_halves(t, offset + 2);
    unpack_nibbles(t, offset + 4, out->code);
}

TILE_INLINE void unpack_q5_0(const tile_rows *t, size_t offset, tile_block *out)
{
    out->d = load_halves(t, offset);
    unpack_nibbles(t, offset + 6, out->code);
    add_fifth_bits(t, offset + 2, out->code);
}

TILE_INLINE void unpack_q5_1(const tile_rows *t, size_t offset, tile_block *out)
{
    out->d = load_halves(t, offset);
    out->m = load_halves(t, offset + 2);
    unpack_nibbles(t, offset + 8, out->code);
    add_fifth_bits(t, offset + 4, out->code);
}

TILE_INLINE void unpack_iq4_nl(const tile_rows *t, size_t offset, tile_block *out)
{
    unpack_q4_0(t, offset, out);
    look_up(fomoe_iq4_values, WIDE_SUMS ? 128 : 0, out->code);
}

TILE_INLINE void unpack_mxfp4(const tile_rows *t, size_t offset, tile_block *out)
{
    float d[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++)
        d[r] = fomoe_e8m0_half(t->row[r][offset]);
    out->d = vf_load(d);
    unpack_nibbles(t, offset + 1, out->code);
    look_up(fomoe_mxfp4_values, 16, out->code);
}

static const tile_kind kind_q8_0 = { .offset_bits = WIDE_SUMS ? 7 : 0, .chain = 1, .signed_codes = !WIDE_SUMS };
static const tile_kind kind_q4_0 = { .offset_bits = 3, .chain = 8 };
static const tile_kind kind_q4_1 = { .has_min = 1, .chain = 8 };
static const tile_kind kind_q5_0 = { .offset_bits = 4, .chain = 4 };
static const tile_kind kind_q5_1 = { .has_min = 1, .chain = 4 };
static const tile_kind kind_iq4_nl = { .offset_bits = WIDE_SUMS ? 7 : 0, .chain = 1, .signed_codes = !WIDE_SUMS };
static const tile_kind kind_mxfp4 = { .offset_bits = 4, .chain = 4 };

TILE_ROWS_OF(q8_0)
TILE_ROWS_OF(q4_0)
TILE_ROWS_OF(q4_1)
TILE_ROWS_OF(q5_0)
TILE_ROWS_OF(q5_1)
TILE_ROWS_OF(iq4_nl)
TILE_ROWS_OF(mxfp4)

static fomoe_rows_fn rows_of_type(int type)
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
