/* RMS norm of one row, for one ISA (see each_isa.h). */
#define row_square_sum ISA(row_square_sum)
#define row_norm ISA(row_norm)

/* Sums in 4 vectors of partial sums, which is as good as pairwise for the widths of models. */
static inline float row_square_sum(const float *x, int n)
{
    vf s[4] = { vf_set1(0.0f), vf_set1(0.0f), vf_set1(0.0f), vf_set1(0.0f) };
    int i = 0;
    for (; i + 4 * VW <= n; i += 4 * VW)
        for (int j = 0; j < 4; j++) {
            vf v = vf_load(x + i + j * VW);
            s[j] = vf_fma(v, v, s[j]);
        }
    for (; i < n; i += VW) {
        vf v = vf_load_upto(x + i, n - i);
        s[0] = vf_fma(v, v, s[0]);
    }
    return vf_sum(vf_add(vf_add(s[0], s[1]), vf_add(s[2], s[3])));
}

static inline void row_norm(const float *x, const float *w, float eps, int n, float *y)
{
    vf scale = vf_set1(1.0f / sqrtf(row_square_sum(x, n) / (float)n + eps));
    for (int i = 0; i < n; i += VW)
        vf_store_upto(y + i, vf_mul(vf_mul(vf_load_upto(x + i, n - i), scale), vf_load_upto(w + i, n - i)), n - i);
}
