/* Attention of one tile of queries over a range of keys, for one ISA (see each_isa.h).
 *
 * Scores are kept transposed, [key][query]: the products then take keys and values as they lie in the cache, and the
 * softmax runs over vectors of queries without any sum across lanes.
 */
#include "gemm.h"
#include "norm_body.h"

/* The rows of one kv head: a run of up to KEY_BLOCK keys as float32, in place or converted. */
static const float *ISA(cache_rows)(const fomoe_attention *a, const void *cache, const int32_t *pages, int kv_head,
                                    int key, int n, float *block)
{
    int d = a->head_dim, page = pages[key / a->page_tokens], in_page = key % a->page_tokens;
    int64_t at = (((int64_t)page * a->kv_heads + kv_head) * a->page_tokens + in_page) * d;
    if (!a->cache_f16)
        return (const float *)cache + at;
    const uint16_t *half = (const uint16_t *)cache + at;
    for (int i = 0, total = n * d; i < total; i += VW)
        vf_store_upto(block + i, vf_load_f16_upto(half + i, total - i), total - i);
    return block;
}

/* One block of scores [n][stride] -> probabilities, with the running maximum and sum of every query. Returns whether
 * any maximum moved; `shrink` then says by how much what was summed so far must be scaled. */
static int ISA(softmax_block)(float *s, int n, int stride, float *top, float *sum, float *shrink)
{
    int moved = 0;
    for (int r = 0; r < stride; r += VW) {
        vf old = vf_load(top + r), m = old, total = vf_set1(0.0f);
        for (int j = 0; j < n; j++)
            m = vf_max(m, vf_load(s + j * stride + r));
        for (int j = 0; j < n; j++) {
            vf p = vf_exp(vf_sub(vf_load(s + j * stride + r), m));
            vf_store(s + j * stride + r, p);
            total = vf_add(total, p);
        }
        vf factor = vf_exp(vf_sub(old, m));
        vf_store(top + r, m);
        vf_store(shrink + r, factor);
        vf_store(sum + r, vf_fma(vf_load(sum + r), factor, total));
        for (int i = 0; i < VW; i++)
            moved |= shrink[r + i] != 1.0f;
    }
    return moved;
}

/* The queries t->qt [head_dim][stride] over keys [begin, end). Query r is token (first_query + r) / group of a segment
 * that starts at `position`. */
static void ISA(tile_keys)(const fomoe_attention *a, attention_tile *t, const int32_t *pages, int kv_head, int begin,
                           int end, int first_query, int position, int group)
{
    int d = a->head_dim;
    for (int r = 0; r < QUERIES; r++) {
        t->top[r] = NO_SCORE;
        t->sum[r] = 0.0f;
    }
    memset(t->out, 0, (size_t)t->num_queries * d * sizeof(float));
    for (int key = begin, n; key < end; key += n) {
        int left = a->page_tokens - key % a->page_tokens;
        n = end - key < KEY_BLOCK ? end - key : KEY_BLOCK;
        n = n < left ? n : left;
        const float *k = ISA(cache_rows)(a, a->k_cache, pages, kv_head, key, n, t->block);
        gemm(n, t->stride, d, k, d, 1, t->qt, t->stride, t->scores, t->stride, 0);
        for (int r = 0; r < t->num_queries; r++) { /* the causal mask: touches the last blocks only */
            int visible = position + (first_query + r) / group + 1 - key;
            for (int j = visible > 0 ? visible : 0; j < n; j++)
                t->scores[j * t->stride + r] = -INFINITY;
        }
        if (ISA(softmax_block)(t->scores, n, t->stride, t->top, t->sum, t->shrink))
            for (int r = 0; r < t->num_queries; r++)
                for (int i = 0; i < d; i += VW)
                    vf_store_upto(t->out + r * d + i,
                                  vf_mul(vf_load_upto(t->out + r * d + i, d - i), vf_set1(t->shrink[r])), d - i);
        const float *v = ISA(cache_rows)(a, a->v_cache, pages, kv_head, key, n, t->block);
        gemm(t->num_queries, d, n, t->scores, 1, t->stride, v, d, t->out, d, 1);
    }
}

/* dst = (accumulated / sum) [* sigmoid(gate)] */
static void ISA(write_out)(const float *acc, float sum, const float *gate, int d, float *dst)
{
    vf scale = vf_set1(1.0f / sum);
    for (int i = 0; i < d; i += VW) {
        vf v = vf_mul(vf_load_upto(acc + i, d - i), scale);
        if (gate)
            v = vf_mul(v, vf_sigmoid(vf_load_upto(gate + i, d - i)));
        vf_store_upto(dst + i, v, d - i);
    }
}

/* acc = acc * a + other * b */
static void ISA(blend)(float *acc, float a, const float *other, float b, int d)
{
    for (int i = 0; i < d; i += VW) {
        vf v = vf_mul(vf_load_upto(acc + i, d - i), vf_set1(a));
        vf_store_upto(acc + i, vf_fma(vf_load_upto(other + i, d - i), vf_set1(b), v), d - i);
    }
}

static float ISA(exp_one)(float x)
{
    float v[VW] = { x };
    vf_store(v, vf_exp(vf_load(v)));
    return v[0];
}

/* One head: norm, rotation of the first rope_dims, scale; in place. cos and sin [rope_dims / 2]. */
static void ISA(prepare_head)(float *x, const float *norm, float eps, int d, int rope_dims, const float *cosines,
                              const float *sines, float scale)
{
    int half = rope_dims / 2;
    if (norm)
        row_norm(x, norm, eps, d, x);
    for (int i = 0; i < half; i += VW) {
        vf c = vf_load_upto(cosines + i, half - i), s = vf_load_upto(sines + i, half - i);
        vf a = vf_load_upto(x + i, half - i), b = vf_load_upto(x + half + i, half - i);
        vf_store_upto(x + i, vf_sub(vf_mul(a, c), vf_mul(b, s)), half - i);
        vf_store_upto(x + half + i, vf_fma(a, s, vf_mul(b, c)), half - i);
    }
    if (scale != 1.0f)
        for (int i = 0; i < d; i += VW)
            vf_store_upto(x + i, vf_mul(vf_load_upto(x + i, d - i), vf_set1(scale)), d - i);
}

static void ISA(store_half)(const float *x, int n, uint16_t *out)
{
    for (int i = 0; i < n; i += VW)
        vf_store_f16_upto(out + i, vf_load_upto(x + i, n - i), n - i);
}
