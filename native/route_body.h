/* Softmax over all experts, in place, for one ISA (see each_isa.h). */

static void ISA(softmax)(const float *z, int n, float *p)
{
    float top = z[0];
    for (int i = 1; i < n; i++)
        top = z[i] > top ? z[i] : top;
    vf shift = vf_set1(top), sums = vf_set1(0.0f);
    for (int i = 0; i < n; i += VW)
        vf_store_upto(p + i, vf_exp(vf_sub(vf_load_upto(z + i, n - i), shift)), n - i);
    for (int i = 0; i < n; i += VW)
        sums = vf_add(sums, vf_load_upto(p + i, n - i));
    vf sum = vf_set1(vf_sum(sums));
    for (int i = 0; i < n; i += VW)
        vf_store_upto(p + i, vf_div(vf_load_upto(p + i, n - i), sum), n - i);
}
