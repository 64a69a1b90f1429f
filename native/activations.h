/* Activations quantised to 8 bits: what the kernels of quantised types multiply with.
 *
 * Owns: the two formats and where their parts lie in the scratch. Does not know: weights.
 *
 * Format 256 (K-quants, IQ4_XS): a scale per 256 columns. Format 32 (the other quantised types): a
 * scale per 32. q = round(x / d), d = max|x| / 127, ties to even; d stays float32.
 * One record a token, its parts one after the other, each at a multiple of 64 bytes.
 */
#ifndef FOMOE_ACTIVATIONS_H
#define FOMOE_ACTIVATIONS_H

#include <stddef.h>
#include <stdint.h>

enum fomoe_format { FOMOE_FORMAT_256 = 0, FOMOE_FORMAT_32 = 1, FOMOE_FORMAT_F32 = 2 };

static inline size_t fomoe_pad64(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

/* A token of format 256; n = cols / 256. */
typedef struct {
    const int8_t *q;        /* [cols] */
    const float *d;         /* [n] */
    const int16_t *sum32;   /* [n][8] sums of q over 32 columns */
    const int16_t *sum16;   /* [n][16] */
} fomoe_act256;

/* A token of format 32; n = cols / 32. */
typedef struct {
    const int8_t *q;        /* [cols] */
    const float *d;         /* [n] */
    const float *s;         /* [n]: d * sum */
    const int32_t *sum;     /* [n] sums of q */
} fomoe_act32;

static inline size_t fomoe_act256_bytes(int cols)
{
    size_t n = cols / 256;
    return fomoe_pad64(cols) + fomoe_pad64(4 * n) + fomoe_pad64(16 * n) + fomoe_pad64(32 * n);
}

static inline size_t fomoe_act32_bytes(int cols)
{
    size_t n = cols / 32;
    return fomoe_pad64(cols) + 3 * fomoe_pad64(4 * n);
}

static inline fomoe_act256 fomoe_act256_at(const void *form, int64_t token, int cols)
{
    size_t n = cols / 256;
    const char *p = (const char *)form + token * fomoe_act256_bytes(cols);
    fomoe_act256 a = { .q = (const int8_t *)p };
    p += fomoe_pad64(cols);
    a.d = (const float *)p;
    p += fomoe_pad64(4 * n);
    a.sum32 = (const int16_t *)p;
    p += fomoe_pad64(16 * n);
    a.sum16 = (const int16_t *)p;
    return a;
}

static inline fomoe_act32 fomoe_act32_at(const void *form, int64_t token, int cols)
{
    size_t n = cols / 32;
    const char *p = (const char *)form + token * fomoe_act32_bytes(cols);
    fomoe_act32 a = { .q = (const int8_t *)p };
    p += fomoe_pad64(cols);
    a.d = (const float *)p;
    p += fomoe_pad64(4 * n);
    a.s = (const float *)p;
    p += fomoe_pad64(4 * n);
    a.sum = (const int32_t *)p;
    return a;
}

/* The format that a type's kernels take. */
enum fomoe_format fomoe_format_of(int type);

/* 127 / largest, or 0 for a block so small that it is zero to every product. */
static inline float fomoe_quantize_inverse(float largest)
{
    return largest > 0x1p-120f ? 127.0f / largest : 0.0f;
}

/* Quantises n columns (a multiple of 32) with one scale, which is returned; sum16 takes the sums of q
 * over 16 columns. The same bits on every ISA. */
typedef float (*fomoe_quantize_fn)(const float *x, int n, int8_t *q, int32_t *sum16);
float fomoe_quantize_avx2(const float *x, int n, int8_t *q, int32_t *sum16);

#endif
