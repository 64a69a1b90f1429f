/* What a MoE step does to rows of floats, for one ISA (see each_isa.h). */

/* gate = silu(gate) * up */
static void ISA(silu_mul)(const float *gate, const float *up, int n, float *out)
{
    for (int i = 0; i < n; i += VW) {
        vf v = vf_mul(vf_silu(vf_load_upto(gate + i, n - i)), vf_load_upto(up + i, n - i));
        vf_store_upto(out + i, v, n - i);
    }
}

/* x += sum_r weights[r] * outs[r] (+ sigmoid(gate) * shared, by weight shared_weight), ranks in order. */
static void ISA(weighted_sum)(const float *const *outs, const float *weights, int k, const float *shared,
                              float shared_weight, int n, float *x)
{
    for (int i = 0; i < n; i += VW) {
        vf sum = vf_set1(0.0f);
        for (int r = 0; r < k; r++)
            sum = vf_fma(vf_set1(weights[r]), vf_load_upto(outs[r] + i, n - i), sum);
        if (shared)
            sum = vf_fma(vf_set1(shared_weight), vf_load_upto(shared + i, n - i), sum);
        vf_store_upto(x + i, vf_add(vf_load_upto(x + i, n - i), sum), n - i);
    }
}

static float ISA(sigmoid)(float x)
{
    float v[VW] = { x };
    vf_store(v, vf_sigmoid(vf_load(v)));
    return v[0];
}
