/* Block layouts of the ggml types, and the scalar reading of their packed parts.
 *
 * Owns: what the bytes of a block mean (after ggml-common.h). Does not know: products, activations.
 */
#ifndef FOMOE_QUANT_H
#define FOMOE_QUANT_H

#include <stdint.h>
#include <string.h>

enum fomoe_type {
    FOMOE_F32 = 0,
    FOMOE_F16 = 1,
    FOMOE_Q4_0 = 2,
    FOMOE_Q4_1 = 3,
    FOMOE_Q5_0 = 6,
    FOMOE_Q5_1 = 7,
    FOMOE_Q8_0 = 8,
    FOMOE_Q2_K = 10,
    FOMOE_Q3_K = 11,
    FOMOE_Q4_K = 12,
    FOMOE_Q5_K = 13,
    FOMOE_Q6_K = 14,
    FOMOE_IQ4_NL = 20,
    FOMOE_IQ4_XS = 23,
    FOMOE_BF16 = 30,
    FOMOE_MXFP4 = 39,
    FOMOE_NUM_TYPES = 40,
};

/* Blocks lie at any alignment: bytes only, the fields wider than a byte are read with fomoe_load_*. */
typedef struct { uint8_t d[2], qs[16]; } fomoe_q4_0;
typedef struct { uint8_t d[2], m[2], qs[16]; } fomoe_q4_1;
typedef struct { uint8_t d[2], qh[4], qs[16]; } fomoe_q5_0;
typedef struct { uint8_t d[2], m[2], qh[4], qs[16]; } fomoe_q5_1;
typedef struct { uint8_t d[2]; int8_t qs[32]; } fomoe_q8_0;
typedef struct { uint8_t d[2], qs[16]; } fomoe_iq4_nl;
typedef struct { uint8_t e, qs[16]; } fomoe_mxfp4;
typedef struct { uint8_t scales[16], qs[64], d[2], dmin[2]; } fomoe_q2_k;
typedef struct { uint8_t hmask[32], qs[64], scales[12], d[2]; } fomoe_q3_k;
typedef struct { uint8_t d[2], dmin[2], scales[12], qs[128]; } fomoe_q4_k;
typedef struct { uint8_t d[2], dmin[2], scales[12], qh[32], qs[128]; } fomoe_q5_k;
typedef struct { uint8_t ql[128], qh[64]; int8_t scales[16]; uint8_t d[2]; } fomoe_q6_k;
typedef struct { uint8_t d[2], scales_h[2], scales_l[4], qs[128]; } fomoe_iq4_xs;

_Static_assert(sizeof(fomoe_q3_k) == 110 && sizeof(fomoe_q6_k) == 210, "blocks have no padding");

static const int8_t fomoe_iq4_values[16] = { -127, -104, -83, -65, -49, -35, -22, -10,
                                             1, 13, 25, 38, 53, 69, 89, 113 };
static const int8_t fomoe_mxfp4_values[16] = { 0, 1, 2, 3, 4, 6, 8, 12,
                                               0, -1, -2, -3, -4, -6, -8, -12 };

static inline uint16_t fomoe_load_u16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t fomoe_load_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float fomoe_bits_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* IEEE half to float, exactly. */
static inline float fomoe_f16(const uint8_t *p)
{
    uint16_t h = fomoe_load_u16(p);
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00)
        return fomoe_bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400)
        return fomoe_bits_float(sign | (magnitude + (112 << 10)) << 13);
    float f = (float)magnitude * 0x1p-24f;
    return sign ? -f : f;
}

static inline float fomoe_bf16(const uint8_t *p)
{
    return fomoe_bits_float((uint32_t)fomoe_load_u16(p) << 16);
}

/* Half of 2^(e - 127): MXFP4 codes are doubled. */
static inline float fomoe_e8m0_half(uint8_t e)
{
    return fomoe_bits_float(e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23);
}

/* One block, unpacked: w[c] = d * scale[c / sub] * code[c], and, where the type has minima, - dmin *
 * min[c / sub]; Q4_1 and Q5_1 have min = 1 and dmin = -m. */
typedef struct {
    float d, dmin;
    int has_min;
    int sub;                /* columns that share a scale: 16, 32 */
    int16_t scale[16];
    uint8_t min[16];
    int8_t code[256];
} fomoe_block;

/* Unpacks a block of any type but F32, F16 and BF16. */
void fomoe_block_unpack(int type, const uint8_t *bytes, fomoe_block *out);

/* Values and bytes of a block; 0 for an unknown type. */
int fomoe_type_block_size(int type);
int fomoe_type_block_bytes(int type);

#endif
