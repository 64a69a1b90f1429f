/* One K head of the gated delta-net with the V heads that read it, for one ISA (see each_isa.h). */
#include "gemm.h"
#include "norm_body.h"

/* Channel range [ch, ch + n) of the convolution at token t of a segment, then silu: y[n]. Inputs before the segment
 * come from the conv state. */
static void ISA(convolve)(const fomoe_delta *d, const fomoe_delta_segment *seg, int t, int ch, int n, float *y)
{
    int taps = d->conv_kernel, conv_dim = (2 * d->k_heads + d->v_heads) * d->head_dim;
    const float *input[MAX_TAPS];
    for (int j = 0; j < taps; j++) {
        int at = t - (taps - 1) + j;
        input[j] = ch + (at < 0 ? seg->conv + (int64_t)(at + taps - 1) * conv_dim
                                : d->qkv + (int64_t)(seg->start + at) * d->ld_qkv);
    }
    for (int i = 0; i < n; i += VW) {
        vf sum = vf_set1(0.0f);
        for (int j = 0; j < taps; j++)
            sum = vf_fma(vf_load_upto(d->conv_weight + (int64_t)j * conv_dim + ch + i, n - i),
                         vf_load_upto(input[j] + i, n - i), sum);
        __builtin_prefetch(input[taps - 1] + PREFETCH_ROWS * d->ld_qkv + i); /* rows are pages apart */
        vf_store_upto(y + i, vf_silu(sum), n - i);
    }
}

static void ISA(scale_row)(float *x, float scale, int n)
{
    for (int i = 0; i < n; i += VW)
        vf_store_upto(x + i, vf_mul(vf_load_upto(x + i, n - i), vf_set1(scale)), n - i);
}

/* q and k of token t: convolved, L2-normalised; q also scaled by 1/sqrt(head_dim). */
static void ISA(query_key)(const fomoe_delta *d, const fomoe_delta_segment *seg, int t, int k_head, float *q, float *k)
{
    int n = d->head_dim, at = k_head * n;
    ISA(convolve)(d, seg, t, at, n, q);
    ISA(convolve)(d, seg, t, d->k_heads * n + at, n, k);
    ISA(scale_row)(q, 1.0f / sqrtf((row_square_sum(q, n) + d->eps) * (float)n), n);
    ISA(scale_row)(k, 1.0f / sqrtf(row_square_sum(k, n) + d->eps), n);
}

static inline float ISA(row_dot)(const float *a, const float *b, int n)
{
    vf sum = vf_set1(0.0f);
    for (int i = 0; i < n; i += VW)
        sum = vf_fma(vf_load_upto(a + i, n - i), vf_load_upto(b + i, n - i), sum);
    return vf_sum(sum);
}

/* o * RMS weight * silu(z) */
static void ISA(gated_norm)(const float *o, const float *norm, float eps, const float *z, int64_t ld_z, int n, float *out)
{
    vf scale = vf_set1(1.0f / sqrtf(row_square_sum(o, n) / (float)n + eps));
    for (int i = 0; i < n; i += VW) {
        vf v = vf_mul(vf_mul(vf_load_upto(o + i, n - i), scale), vf_load_upto(norm + i, n - i));
        vf_store_upto(out + i, vf_mul(v, vf_silu(vf_load_upto(z + i, n - i))), n - i);
        __builtin_prefetch(z + PREFETCH_ROWS * ld_z + i);
    }
}

/* One token: S <- e^g S; delta = beta (v - S k); S <- S + delta k^T; o = S q. One pass over S: o is taken from the old
 * S as e^g S q + delta (k.q). */
static void ISA(recur)(float *s, int n, const float *q, const float *k, const float *v, float decay, float beta,
                       float *o)
{
    float kq = ISA(row_dot)(k, q, n);
    for (int j = 0; j < n; j++) {
        float *row = s + (int64_t)j * n;
        vf sum_k = vf_set1(0.0f), sum_q = vf_set1(0.0f);
        for (int i = 0; i < n; i += VW) {
            vf x = vf_load_upto(row + i, n - i);
            sum_k = vf_fma(x, vf_load_upto(k + i, n - i), sum_k);
            sum_q = vf_fma(x, vf_load_upto(q + i, n - i), sum_q);
        }
        float delta = beta * (v[j] - decay * vf_sum(sum_k));
        o[j] = decay * vf_sum(sum_q) + delta * kq;
        for (int i = 0; i < n; i += VW) {
            vf x = vf_mul(vf_load_upto(row + i, n - i), vf_set1(decay));
            vf_store_upto(row + i, vf_fma(vf_load_upto(k + i, n - i), vf_set1(delta), x), n - i);
        }
    }
}

static void ISA(short_segment)(const fomoe_delta *d, const fomoe_delta_segment *seg, int k_head, delta_tile *w)
{
    int n = d->head_dim, group = d->v_heads / d->k_heads;
    for (int t = 0; t < seg->length; t++) {
        int64_t row = seg->start + t;
        ISA(query_key)(d, seg, t, k_head, w->q, w->k);
        for (int j = 0; j < group; j++) {
            int h = v_head(d, k_head, j);
            ISA(convolve)(d, seg, t, (2 * d->k_heads + h) * n, n, w->v);
            ISA(recur)(seg->s + (int64_t)h * n * n, n, w->q, w->k, w->v, expf(log_decay(d, row, h)),
                       write_strength(d, row, h), w->o);
            ISA(gated_norm)(w->o, d->norm, d->eps, d->z + row * d->ld_z + h * n, d->ld_z, n,
                            d->out + row * d->ld_out + (int64_t)h * n);
        }
    }
}

/* Forward substitution: v <- (I + A)^-1 v for unit lower triangular I + A, given `minus_a` = -A. Blocks of 8 rows. */
static void ISA(solve)(const float *minus_a, int rows, int n, float *v)
{
    for (int b = 0; b < rows; b += 8) {
        int end = b + 8 < rows ? b + 8 : rows;
        gemm(end - b, n, b, minus_a + b * CHUNK, CHUNK, 1, v, n, v + (int64_t)b * n, n, 1);
        for (int t = b + 1; t < end; t++)
            gemm(1, n, t - b, minus_a + t * CHUNK + b, CHUNK, 1, v + (int64_t)b * n, n, v + (int64_t)t * n, n, 1);
    }
}

/* The decays of a chunk: w->decay[t] = e^G_t with G the running sum of the log decays, and for s <= t
 * w->score[t][s] = (q_t.k_s) e^(G_t - G_s), w->minus_a[t][s] = -beta_t (k_t.k_s) e^(G_t - G_s) for s < t; 0 above. */
static void ISA(decay_chunk)(const delta_tile *w, int rows, const float *log_sum, const float *beta)
{
    for (int t = 0; t < rows; t++) {
        for (int s = 0; s < rows; s += VW) {
            vf e = vf_exp(vf_min(vf_sub(vf_set1(log_sum[t]), vf_load(log_sum + s)), vf_set1(0.0f)));
            vf_store(w->score + t * CHUNK + s, vf_mul(e, vf_load(w->qk + t * CHUNK + s)));
            vf_store(w->minus_a + t * CHUNK + s,
                     vf_mul(vf_mul(e, vf_set1(-beta[t])), vf_load(w->kk + t * CHUNK + s)));
        }
        for (int s = t; s < rows; s++)
            w->minus_a[t * CHUNK + s] = 0.0f;
        for (int s = t + 1; s < rows; s++)
            w->score[t * CHUNK + s] = 0.0f;
    }
}

/* One chunk of one V head. st is S transposed, [k][v]; w holds q, k, kk, qk of the chunk and v convolved. Leaves the
 * outputs in w->o. */
static void ISA(chunk_head)(const fomoe_delta *d, delta_tile *w, int64_t row, int rows, int h, float *st)
{
    int n = d->head_dim;
    float log_sum[CHUNK + 16], beta[CHUNK], decay[CHUNK];
    float sum = 0.0f;
    for (int t = 0; t < rows; t++) {
        sum += log_decay(d, row + t, h);
        log_sum[t] = sum;
        decay[t] = expf(sum);
        beta[t] = write_strength(d, row + t, h);
    }
    for (int t = rows; t < CHUNK + 16; t++)
        log_sum[t] = sum;
    ISA(decay_chunk)(w, rows, log_sum, beta);
    gemm(rows, n, n, w->k, n, 1, st, n, w->o, n, 0);
    for (int t = 0; t < rows; t++)
        for (int i = 0; i < n; i += VW) {
            vf u = vf_fma(vf_load_upto(w->o + t * n + i, n - i), vf_set1(-decay[t]), vf_load_upto(w->v + t * n + i, n - i));
            vf_store_upto(w->v + t * n + i, vf_mul(u, vf_set1(beta[t])), n - i);
        }
    ISA(solve)(w->minus_a, rows, n, w->v);
    gemm(rows, n, n, w->q, n, 1, st, n, w->o, n, 0);
    for (int t = 0; t < rows; t++)
        ISA(scale_row)(w->o + t * n, decay[t], n);
    gemm(rows, n, rows, w->score, CHUNK, 1, w->v, n, w->o, n, 1);
    for (int t = 0; t < rows; t++)
        ISA(scale_row)(w->v + t * n, expf(sum - log_sum[t]), n);
    for (int i = 0; i < n; i++)
        ISA(scale_row)(st + i * n, decay[rows - 1], n);
    gemm(n, n, rows, w->k, 1, n, w->v, n, st, n, 1);
}

static void ISA(long_segment)(const fomoe_delta *d, const fomoe_delta_segment *seg, int k_head, delta_tile *w)
{
    int n = d->head_dim, group = d->v_heads / d->k_heads;
    for (int j = 0; j < group; j++)
        transpose(seg->s + (int64_t)v_head(d, k_head, j) * n * n, n, n, n, w->st + (int64_t)j * n * n, n);
    for (int t0 = 0; t0 < seg->length; t0 += CHUNK) {
        int rows = seg->length - t0 < CHUNK ? seg->length - t0 : CHUNK;
        int64_t row = seg->start + t0;
        for (int t = 0; t < rows; t++)
            ISA(query_key)(d, seg, t0 + t, k_head, w->q + t * n, w->k + t * n);
        transpose(w->k, n, rows, n, w->kt, CHUNK);
        gemm(rows, rows, n, w->k, n, 1, w->kt, CHUNK, w->kk, CHUNK, 0);
        gemm(rows, rows, n, w->q, n, 1, w->kt, CHUNK, w->qk, CHUNK, 0);
        for (int j = 0; j < group; j++) {
            int h = v_head(d, k_head, j);
            for (int t = 0; t < rows; t++)
                ISA(convolve)(d, seg, t0 + t, (2 * d->k_heads + h) * n, n, w->v + t * n);
            ISA(chunk_head)(d, w, row, rows, h, w->st + (int64_t)j * n * n);
            for (int t = 0; t < rows; t++)
                ISA(gated_norm)(w->o + t * n, d->norm, d->eps, d->z + (row + t) * d->ld_z + h * n, d->ld_z, n,
                                d->out + (row + t) * d->ld_out + (int64_t)h * n);
        }
    }
    for (int j = 0; j < group; j++)
        transpose(w->st + (int64_t)j * n * n, n, n, n, seg->s + (int64_t)v_head(d, k_head, j) * n * n, n);
}
