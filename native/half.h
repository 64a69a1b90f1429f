/* IEEE half precision to and from float, in plain C. */
#ifndef FOMOE_HALF_H
#define FOMOE_HALF_H

#include <stdint.h>
#include <string.h>

static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, mag = h & 0x7fff, bits;
    float f;
    if (mag >= 0x7c00) {
        bits = sign | 0x7f800000u | (mag & 0x3ff) << 13;
    } else if (mag >= 0x0400) {
        bits = sign | ((mag << 13) + 0x38000000u);
    } else { /* zero or denormal: mag * 2^-24 */
        f = (float)mag * 5.9604644775390625e-8f;
        memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Round to nearest, ties to even; too large becomes infinity. */
static inline uint16_t f32_to_f16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u)
        return sign | 0x7e00;
    if (bits >= 0x47800000u)
        return sign | 0x7c00;
    if (bits < 0x38800000u) { /* denormal half: adding 0.5 leaves the rounded mantissa in the low bits */
        float a;
        memcpy(&a, &bits, sizeof a);
        a += 0.5f;
        memcpy(&bits, &a, sizeof bits);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    bits += 0xc8000fffu + (bits >> 13 & 1);
    return sign | (uint16_t)(bits >> 13);
}

#endif
