/* The end of a block of 32 for AVX-512 and AMX, after tile_32.h: integer sums to floats.
 *
 * Owns: minima, offsets and the rounding. Does not know: how the sums were made.
 */
/* acc + a token's block, `dot` being its sums of code * q. */
TILE_INLINE __m512 multiply_block(const tile32 *w, tile_kind kind, const fomoe_act32 *a, int b, __m512i dot,
                                  __m512 acc)
{
    if (kind.offset_bits)
        dot = _mm512_sub_epi32(dot, _mm512_set1_epi32(a->sum[b] * (1 << kind.offset_bits)));
    __m512 scale = _mm512_mul_ps(w->d, _mm512_set1_ps(a->d[b]));
    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, acc);
    return kind.has_min ? _mm512_fmadd_ps(w->m, _mm512_set1_ps(a->s[b]), acc) : acc;
}
