/* The end of a block of 256 for AVX-512 and AMX, after tile_256.h: integer sums to floats.
 *
 * Owns: minima, corrections and the rounding. Does not know: how the sums were made.
 */
/* acc + a token's block, `total` being its sums of scale * code * q. */
TILE_INLINE __m512 multiply_block(const tile256 *w, tile_kind kind, const fomoe_act256 *a, int b,
                                    __m512i total, __m512 acc)
{
    __m512 da = _mm512_set1_ps(a->d[b]);
    __m512i m = _mm512_setzero_si512();
    const int16_t *sums = kind.pairs == 8 ? a->sum16 + 16 * b : a->sum32 + 8 * b;
    for (int i = 0; i < kind.pairs; i++)
        m = _mm512_dpwssd_epi32(m, w->pair[i], broadcast4(sums + 2 * i));
    if (kind.shift)
        total = _mm512_srai_epi32(total, kind.shift);
    if (kind.pairs && kind.correction_bits)
        total = _mm512_sub_epi32(total, _mm512_slli_epi32(m, kind.correction_bits));
    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(w->d, da), acc);
    if (kind.pairs && !kind.correction_bits)
        acc = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(m), _mm512_mul_ps(w->dmin, da), acc);
    return acc;
}
