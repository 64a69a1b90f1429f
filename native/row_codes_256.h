/* How the types with blocks of 256 pack codes, scales and minima: included by row_256.h.
 *
 * Owns: reading them from a block as it lies in memory. Does not know: activations beyond their sums.
 */
/* 8 bytes of every lane as words, to where scales or minima of a group lie. */
TILE_INLINE void store_scales(row_head *out, int half, int h, vec words)
{
    v_store(&out->scale[half][h * VEC_LANES], words);
}

/* 6-bit scales and minima of Q4_K and Q5_K: bytes 4 .. 15 of a block. */
TILE_INLINE void heads_q4_k(const uint8_t *const *block, const int16_t *sums, row_head *out)
{
    vec low = v_lane32(0x07060504, 0x0f0e0d0c, 0x0b0a0908, 0x0f0e0d0c);
    vec top = v_lane32(0x80808080, 0x07060504, 0x80808080, 0x0b0a0908);
    vec mask = v_lane32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f);
    for (int h = 0; h < HEADS; h++) {
        vec v = v_load_lanes(block + h * VEC_LANES, 0);
        vec bytes = v_and(v_srlv(v_shuffle8(v, low), v_lane32(0, 0, 0, 4)), mask);
        bytes = v_and_or(v_srli(v_shuffle8(v, top), 2), v_set8(0x30), bytes);
        store_scales(out, 0, h, v_low_bytes(bytes, v_zero()));
        out->minima[h] = v_madd(v_high_bytes(bytes, v_zero()), v_load(sums + 8 * VEC_LANES * h));
    }
}

TILE_INLINE void codes_q4_k(const uint8_t *block, vec *code)
{
    vec low = v_set8(0x0f);
    for (int p = 0; p < VECS / 2; p++) {
        vec q = v_load(block + 16 + p * VEC_BYTES);
        code[2 * p] = v_and(q, low);
        code[2 * p + 1] = v_and(v_srli(q, 4), low);
    }
}

TILE_INLINE void heads_q5_k(const uint8_t *const *block, const int16_t *sums, row_head *out)
{
    heads_q4_k(block, sums, out);
}

TILE_INLINE void codes_q5_k(const uint8_t *block, vec *code)
{
    vec low = v_set8(0x0f), fifth = v_set8(0x10), bits = v_load_twice(block + 16);
#pragma GCC unroll 4
    for (int p = 0; p < VECS / 2; p++) {
        int c = p * VEC_BYTES / 32; /* 32 bytes of codes: bits 2c and 2c + 1 */
        vec q = v_load(block + 48 + p * VEC_BYTES);
        code[2 * p] = v_and_or(v_bits_up(bits, 4 - 2 * c, 2 - 2 * c), fifth, v_and(q, low));
        code[2 * p + 1] = v_and_or(v_bits_up(bits, 3 - 2 * c, 1 - 2 * c), fifth, v_and(v_srli(q, 4), low));
    }
}

/* Signed bytes of every lane as words. */
TILE_INLINE void store_signed_scales(row_head *out, int h, vec bytes)
{
    store_scales(out, 0, h, v_srai16(v_low_bytes(bytes, bytes), 8));
    store_scales(out, 1, h, v_srai16(v_high_bytes(bytes, bytes), 8));
}

TILE_INLINE void heads_q6_k(const uint8_t *const *block, const int16_t *sums, row_head *out)
{
    (void)sums;
    for (int h = 0; h < HEADS; h++)
        store_signed_scales(out, h, v_load_lanes(block + h * VEC_LANES, 192));
}

TILE_INLINE void codes_q6_k(const uint8_t *block, vec *code)
{
    vec low = v_set8(0x0f), high = v_set8(0x30);
#pragma GCC unroll 4
    for (int p = 0; p < VECS / 2; p++) {
        int half = p * VEC_BYTES / 64, part = p * VEC_BYTES / 32 % 2, at = 128 / VEC_BYTES * half + part;
        vec q = v_load(block + p * VEC_BYTES), bits = v_load_twice(block + 128 + 32 * half);
        code[at] = v_and_or(v_bits_up(bits, 4 - 2 * part, 2 - 2 * part), high, v_and(q, low));
        code[at + 64 / VEC_BYTES] = v_and_or(v_bits_up(bits, -2 * part, -2 - 2 * part), high, v_and(v_srli(q, 4), low));
    }
}

/* The 16 bytes of every lane, from the order of columns to that of the codes. */
TILE_INLINE vec order_crumbs(vec scales)
{
    uint8_t at[16];
    for (int i = 0; i < 16; i++)
        at[i] = (uint8_t)(column_of(ORDER_CRUMBS, i / VEC_LANES, i % VEC_LANES) / 16);
    return v_shuffle8(scales, v_broadcast128(_mm_loadu_si128((const void *)at)));
}

TILE_INLINE void heads_q2_k(const uint8_t *const *block, const int16_t *sums, row_head *out)
{
    vec low = v_set8(0x0f);
    for (int h = 0; h < HEADS; h++) {
        vec v = v_load_lanes(block + h * VEC_LANES, 0), minima = v_and(v_srli(v, 4), low);
        store_signed_scales(out, h, order_crumbs(v_and(v, low)));
        const int16_t *at = sums + 16 * VEC_LANES * h;
        out->minima[h] = v_add(v_madd(v_low_bytes(minima, v_zero()), load_halves_of_pairs(at)),
                               v_madd(v_high_bytes(minima, v_zero()), load_halves_of_pairs(at + 8)));
    }
}

TILE_INLINE void codes_q2_k(const uint8_t *block, vec *code)
{
    for (int i = 0; i < VECS; i++) {
        vec q = v_load(block + 16 + i / 4 * VEC_BYTES);
        code[i] = v_and(v_srli(q, 2 * (i % 4)), v_set8(3));
    }
}

/* The 6-bit scales of Q3_K are read from two bytes before them, where the last block ends 16 bytes on. */
TILE_INLINE void heads_q3_k(const uint8_t *const *block, const int16_t *sums, row_head *out)
{
    (void)sums;
    vec nibbles = v_lane32(0x05040302, 0x09080706, 0x05040302, 0x09080706), tops = v_set32(0x0d0c0b0a);
    for (int h = 0; h < HEADS; h++) {
        vec v = v_load_lanes(block + h * VEC_LANES, 94);
        vec low = v_and(v_srlv(v_shuffle8(v, nibbles), v_lane32(0, 0, 4, 4)), v_set8(0x0f));
        vec high = v_and(v_srlv(v_shuffle8(v, tops), v_lane32(0, 2, 4, 6)), v_set8(3));
        store_signed_scales(out, h, order_crumbs(v_sub8(v_or(low, v_slli(high, 4)), v_set8(32))));
    }
}

TILE_INLINE void codes_q3_k(const uint8_t *block, vec *code)
{
    vec bits = v_load_twice(block);
#pragma GCC unroll 8
    for (int i = 0; i < VECS; i++) {
        int s = i % 4, up = 2 - s - 4 * (i / 4);
        vec q = v_load(block + 32 + i / 4 * VEC_BYTES);
        code[i] = v_and_or(v_bits_up(bits, up, up - 4), v_set8(4), v_and(v_srli(q, 2 * s), v_set8(3)));
    }
}

TILE_INLINE void heads_iq4_xs(const uint8_t *const *block, const int16_t *sums, row_head *out)
{
    (void)sums;
    vec low = v_lane32(0x80048004, 0x80058005, 0x80068006, 0x80078007), top = v_set32(0x03020302);
    vec low_up = v_set32(0x00010010), top_up = v_lane32(0x10004000, 0x01000400, 0x00100040, 0x00010004);
    for (int h = 0; h < HEADS; h++) {
        vec v = v_load_lanes(block + h * VEC_LANES, 0);
        vec nibbles = v_and(v_srli16(v_mullo16(v_shuffle8(v, low), low_up), 4), v_set32(0x000f000f));
        vec bits = v_srli16(v_mullo16(v_shuffle8(v, top), top_up), 14);
        store_scales(out, 0, h, v_sub16(v_or(nibbles, v_slli16(bits, 4)), v_set32(0x00200020)));
    }
}

TILE_INLINE void codes_iq4_xs(const uint8_t *block, vec *code)
{
    vec low = v_set8(0x0f), values = v_lookup(fomoe_iq4_values);
    for (int p = 0; p < VECS / 2; p++) {
        vec q = v_load(block + 8 + p * VEC_BYTES);
        code[2 * p] = v_shuffle8(values, v_and(q, low));
        code[2 * p + 1] = v_shuffle8(values, v_and(v_srli(q, 4), low));
    }
}
