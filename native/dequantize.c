/* Blocks unpacked, and dequantisation to float32.
 *
 * Owns: the scalar reading of every type's codes, scales and minima; w = d * scale * code - minimum,
 * rounded as gguf.quants rounds it. Does not know: activations, products.
 */
#include <errno.h>

#include "matmul.h"
#include "quant.h"

int fomoe_type_block_bytes(int type)
{
    switch (type) {
    case FOMOE_F32: return 4;
    case FOMOE_F16: case FOMOE_BF16: return 2;
    case FOMOE_Q4_0: return sizeof(fomoe_q4_0);
    case FOMOE_Q4_1: return sizeof(fomoe_q4_1);
    case FOMOE_Q5_0: return sizeof(fomoe_q5_0);
    case FOMOE_Q5_1: return sizeof(fomoe_q5_1);
    case FOMOE_Q8_0: return sizeof(fomoe_q8_0);
    case FOMOE_IQ4_NL: return sizeof(fomoe_iq4_nl);
    case FOMOE_MXFP4: return sizeof(fomoe_mxfp4);
    case FOMOE_Q2_K: return sizeof(fomoe_q2_k);
    case FOMOE_Q3_K: return sizeof(fomoe_q3_k);
    case FOMOE_Q4_K: return sizeof(fomoe_q4_k);
    case FOMOE_Q5_K: return sizeof(fomoe_q5_k);
    case FOMOE_Q6_K: return sizeof(fomoe_q6_k);
    case FOMOE_IQ4_XS: return sizeof(fomoe_iq4_xs);
    default: return 0;
    }
}

int fomoe_type_block_size(int type)
{
    switch (type) {
    case FOMOE_F32: case FOMOE_F16: case FOMOE_BF16: return 1;
    case FOMOE_Q2_K: case FOMOE_Q3_K: case FOMOE_Q4_K: case FOMOE_Q5_K: case FOMOE_Q6_K:
    case FOMOE_IQ4_XS: return 256;
    default: return fomoe_type_block_bytes(type) ? 32 : 0;
    }
}

/* 16 bytes hold 32 nibbles: the low ones first, then the high ones. */
static void unpack_nibbles(const uint8_t qs[16], int8_t *code)
{
    for (int i = 0; i < 16; i++) {
        code[i] = qs[i] & 15;
        code[i + 16] = qs[i] >> 4;
    }
}

static void add_fifth_bits(const uint8_t qh[4], int8_t *code)
{
    uint32_t bits = fomoe_load_u32(qh);
    for (int i = 0; i < 32; i++)
        code[i] |= (bits >> i & 1) << 4;
}

static void subtract(int8_t *code, int offset)
{
    for (int i = 0; i < 32; i++)
        code[i] -= offset;
}

static void look_up(const int8_t values[16], int8_t *code, int n)
{
    for (int i = 0; i < n; i++)
        code[i] = values[code[i]];
}

static void unpack_32(int type, const uint8_t *bytes, fomoe_block *out)
{
    out->sub = 32;
    out->scale[0] = 1;
    out->min[0] = 1;
    switch (type) {
    case FOMOE_Q4_0: {
        const fomoe_q4_0 *b = (const void *)bytes;
        out->d = fomoe_f16(b->d);
        unpack_nibbles(b->qs, out->code);
        subtract(out->code, 8);
        break;
    }
    case FOMOE_Q4_1: {
        const fomoe_q4_1 *b = (const void *)bytes;
        out->d = fomoe_f16(b->d);
        out->dmin = -fomoe_f16(b->m);
        unpack_nibbles(b->qs, out->code);
        break;
    }
    case FOMOE_Q5_0: {
        const fomoe_q5_0 *b = (const void *)bytes;
        out->d = fomoe_f16(b->d);
        unpack_nibbles(b->qs, out->code);
        add_fifth_bits(b->qh, out->code);
        subtract(out->code, 16);
        break;
    }
    case FOMOE_Q5_1: {
        const fomoe_q5_1 *b = (const void *)bytes;
        out->d = fomoe_f16(b->d);
        out->dmin = -fomoe_f16(b->m);
        unpack_nibbles(b->qs, out->code);
        add_fifth_bits(b->qh, out->code);
        break;
    }
    case FOMOE_Q8_0: {
        const fomoe_q8_0 *b = (const void *)bytes;
        out->d = fomoe_f16(b->d);
        memcpy(out->code, b->qs, 32);
        break;
    }
    case FOMOE_IQ4_NL: {
        const fomoe_iq4_nl *b = (const void *)bytes;
        out->d = fomoe_f16(b->d);
        unpack_nibbles(b->qs, out->code);
        look_up(fomoe_iq4_values, out->code, 32);
        break;
    }
    case FOMOE_MXFP4: {
        const fomoe_mxfp4 *b = (const void *)bytes;
        out->d = fomoe_e8m0_half(b->e);
        unpack_nibbles(b->qs, out->code);
        look_up(fomoe_mxfp4_values, out->code, 32);
        break;
    }
    }
}

static void unpack_q2_k(const fomoe_q2_k *b, fomoe_block *out)
{
    out->d = fomoe_f16(b->d);
    out->dmin = fomoe_f16(b->dmin);
    out->sub = 16;
    for (int j = 0; j < 16; j++) {
        out->scale[j] = b->scales[j] & 15;
        out->min[j] = b->scales[j] >> 4;
    }
    for (int i = 0; i < 256; i++)
        out->code[i] = b->qs[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
}

static void unpack_q3_k(const fomoe_q3_k *b, fomoe_block *out)
{
    out->d = fomoe_f16(b->d);
    out->sub = 16;
    for (int j = 0; j < 16; j++) {
        int low = j < 8 ? b->scales[j] & 15 : b->scales[j - 8] >> 4;
        out->scale[j] = (low | (b->scales[8 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32;
    }
    for (int i = 0; i < 256; i++) {
        int low = b->qs[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
        out->code[i] = low - (b->hmask[i % 32] >> (i / 32) & 1 ? 0 : 4);
    }
}

/* The 6-bit scales and minima of Q4_K and Q5_K. */
static void unpack_q4k_scales(const uint8_t s[12], fomoe_block *out)
{
    out->sub = 32;
    for (int j = 0; j < 4; j++) {
        out->scale[j] = s[j] & 63;
        out->min[j] = s[j + 4] & 63;
        out->scale[j + 4] = (s[j + 8] & 15) | (s[j] >> 6) << 4;
        out->min[j + 4] = s[j + 8] >> 4 | (s[j + 4] >> 6) << 4;
    }
}

/* Q4_K and Q5_K: 32 bytes hold 64 nibbles, the low ones first. */
static void unpack_q4k_nibbles(const uint8_t qs[128], int8_t *code)
{
    for (int i = 0; i < 128; i++) {
        code[i / 32 * 64 + i % 32] = qs[i] & 15;
        code[i / 32 * 64 + 32 + i % 32] = qs[i] >> 4;
    }
}

static void unpack_q4_k(const fomoe_q4_k *b, fomoe_block *out)
{
    out->d = fomoe_f16(b->d);
    out->dmin = fomoe_f16(b->dmin);
    unpack_q4k_scales(b->scales, out);
    unpack_q4k_nibbles(b->qs, out->code);
}

static void unpack_q5_k(const fomoe_q5_k *b, fomoe_block *out)
{
    out->d = fomoe_f16(b->d);
    out->dmin = fomoe_f16(b->dmin);
    unpack_q4k_scales(b->scales, out);
    unpack_q4k_nibbles(b->qs, out->code);
    for (int i = 0; i < 256; i++)
        out->code[i] |= (b->qh[i % 32] >> (i / 32) & 1) << 4;
}

static void unpack_q6_k(const fomoe_q6_k *b, fomoe_block *out)
{
    out->d = fomoe_f16(b->d);
    out->sub = 16;
    for (int j = 0; j < 16; j++)
        out->scale[j] = b->scales[j];
    for (int i = 0; i < 256; i++) {
        int half = i / 128, quarter = i / 32 % 4, l = i % 32;
        int low = b->ql[64 * half + 32 * (quarter % 2) + l] >> (4 * (quarter / 2)) & 15;
        int high = b->qh[32 * half + l] >> (2 * quarter) & 3;
        out->code[i] = (low | high << 4) - 32;
    }
}

static void unpack_iq4_xs(const fomoe_iq4_xs *b, fomoe_block *out)
{
    out->d = fomoe_f16(b->d);
    out->sub = 32;
    for (int j = 0; j < 8; j++) {
        int low = b->scales_l[j / 2] >> (4 * (j % 2)) & 15;
        int high = fomoe_load_u16(b->scales_h) >> (2 * j) & 3;
        out->scale[j] = (low | high << 4) - 32;
        unpack_nibbles(b->qs + 16 * j, out->code + 32 * j);
    }
    look_up(fomoe_iq4_values, out->code, 256);
}

void fomoe_block_unpack(int type, const uint8_t *bytes, fomoe_block *out)
{
    out->has_min = type == FOMOE_Q4_1 || type == FOMOE_Q5_1 || type == FOMOE_Q2_K || type == FOMOE_Q4_K
                   || type == FOMOE_Q5_K;
    switch (type) {
    case FOMOE_Q2_K: unpack_q2_k((const void *)bytes, out); break;
    case FOMOE_Q3_K: unpack_q3_k((const void *)bytes, out); break;
    case FOMOE_Q4_K: unpack_q4_k((const void *)bytes, out); break;
    case FOMOE_Q5_K: unpack_q5_k((const void *)bytes, out); break;
    case FOMOE_Q6_K: unpack_q6_k((const void *)bytes, out); break;
    case FOMOE_IQ4_XS: unpack_iq4_xs((const void *)bytes, out); break;
    default: unpack_32(type, bytes, out); break;
    }
}

static void dequantize_blocks(int type, const uint8_t *bytes, float *out, int64_t n)
{
    int size = fomoe_type_block_size(type), block_bytes = fomoe_type_block_bytes(type);
    fomoe_block b;
    for (int64_t i = 0; i < n; i += size, bytes += block_bytes) {
        fomoe_block_unpack(type, bytes, &b);
        for (int j = 0; j < size / b.sub; j++) {
            float scale = b.d * b.scale[j], min = b.has_min ? b.dmin * b.min[j] : 0.0f;
            for (int c = j * b.sub; c < (j + 1) * b.sub; c++)
                out[i + c] = scale * b.code[c] - min;
        }
    }
}

int fomoe_dequantize(int type, const void *data, float *out, int64_t n)
{
    const uint8_t *bytes = data;
    if (!fomoe_type_block_size(type))
        return -ENOTSUP;
    if (n % fomoe_type_block_size(type))
        return -EINVAL;
    switch (type) {
    case FOMOE_F32:
        memcpy(out, data, (size_t)n * 4);
        break;
    case FOMOE_F16:
        for (int64_t i = 0; i < n; i++)
            out[i] = fomoe_f16(bytes + 2 * i);
        break;
    case FOMOE_BF16:
        for (int64_t i = 0; i < n; i++)
            out[i] = fomoe_bf16(bytes + 2 * i);
        break;
    default:
        dequantize_blocks(type, bytes, out, n);
    }
    return 0;
}
