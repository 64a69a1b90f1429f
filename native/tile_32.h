/* Types with blocks of 32 as tiles: included once by each ISA, after its tile_ISA.h.
 *
 * Owns: how each type's packed codes become a tile, and the walk over blocks and tokens. Does not know:
 * the ISA; its vectors are `vec`, and it brings multiply_tokens.
 */
/* A block of TILE_ROWS rows. */
typedef struct {
    vec code[8];        /* vector i: columns 4i .. 4i + 3; unsigned but for signed_codes */
    vecf d, m;
} tile32;

/* What differs between types when a tile is multiplied; constants wherever it is used. */
typedef struct {
    int offset_bits;        /* codes are that power of two too large; 0: exact */
    int has_min;
    int chain;              /* vectors of codes whose products a 16-bit sum holds */
    int signed_codes;
} tile_kind;

/* acc[t] += block b of the rows times tokens a[0] .. a[tokens - 1]; the ISA's. */
TILE_INLINE void multiply_tokens(const tile32 *w, tile_kind kind, const fomoe_act32 *a, int tokens, int b,
                                 vecf *acc);

typedef void (*unpack_fn)(const tile_rows *t, size_t offset, tile32 *out);

TILE_INLINE void rows_of_kind(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                                int row_begin, int row_end, float *y, int64_t ldy, tile_kind kind,
                                int block_bytes, unpack_fn unpack)
{
    fomoe_act32 a[TILE_TOKENS];
    vecf acc[TILE_TOKENS];
    /* Rows of equal distance, 16 at a time; the distance is no power of two. */
    size_t stride = TILE_GATHERS ? fomoe_pad64(act->cols) + 64 : 0;
    int8_t gathered[TILE_GATHERS ? TILE_TOKENS * stride : 1] __attribute__((aligned(64)));
    tile32 tile;
    for (int t0 = 0; t0 < num_rows; t0 += TILE_TOKENS) {
        int tokens = num_rows - t0 < TILE_TOKENS ? num_rows - t0 : TILE_TOKENS;
        for (int t = 0; t < tokens; t++)
            a[t] = fomoe_act32_at(act->forms[FOMOE_FORMAT_32], rows ? rows[t0 + t] : t0 + t, act->cols);
        for (int t = 0; TILE_GATHERS && t < TILE_TOKENS; t++) {
            if (t < tokens)
                memcpy(gathered + t * stride, a[t].q, act->cols);
            a[t].q = gathered + t * stride;
        }
        for (int r = row_begin; r < row_end; r += TILE_ROWS) {
            tile_rows tr = tile_rows_at(w, r, row_end);
            for (int t = 0; t < tokens; t++)
                acc[t] = vf_zero();
            for (int b = 0; b < w->cols / 32; b++) {
                unpack(&tr, (size_t)b * block_bytes, &tile);
                multiply_tokens(&tile, kind, a, tokens, b, acc);
            }
            for (int t = 0; t < tokens; t++)
                tile_store(y + (t0 + t) * ldy + r, tr.n, acc[t]);
        }
    }
}

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

TILE_INLINE void unpack_q8_0(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = load_halves(t, offset);
    load_lanes(t, offset + 2, out->code);
    load_lanes(t, offset + 18, out->code + 4);
    if (WIDE_SUMS)
        for (int i = 0; i < 8; i++)
            out->code[i] = v_xor(out->code[i], v_set8((char)0x80));
}

TILE_INLINE void unpack_q4_0(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = load_halves(t, offset);
    unpack_nibbles(t, offset + 2, out->code);
}

TILE_INLINE void unpack_q4_1(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = load_halves(t, offset);
    out->m = load_halves(t, offset + 2);
    unpack_nibbles(t, offset + 4, out->code);
}

TILE_INLINE void unpack_q5_0(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = load_halves(t, offset);
    unpack_nibbles(t, offset + 6, out->code);
    add_fifth_bits(t, offset + 2, out->code);
}

TILE_INLINE void unpack_q5_1(const tile_rows *t, size_t offset, tile32 *out)
{
    out->d = load_halves(t, offset);
    out->m = load_halves(t, offset + 2);
    unpack_nibbles(t, offset + 8, out->code);
    add_fifth_bits(t, offset + 4, out->code);
}

TILE_INLINE void unpack_iq4_nl(const tile_rows *t, size_t offset, tile32 *out)
{
    unpack_q4_0(t, offset, out);
    look_up(fomoe_iq4_values, WIDE_SUMS ? 128 : 0, out->code);
}

TILE_INLINE void unpack_mxfp4(const tile_rows *t, size_t offset, tile32 *out)
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

#define ROWS_32(name)                                                                               \
    static TILE_TARGET void rows_##name(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, \
                                          int num_rows, int row_begin, int row_end, float *y, int64_t ldy) \
    {                                                                                                      \
        rows_of_kind(w, act, rows, num_rows, row_begin, row_end, y, ldy, kind_##name,                      \
                     sizeof(fomoe_##name), unpack_##name);                                                 \
    }

ROWS_32(q8_0)
ROWS_32(q4_0)
ROWS_32(q4_1)
ROWS_32(q5_0)
ROWS_32(q5_1)
ROWS_32(iq4_nl)
ROWS_32(mxfp4)


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
