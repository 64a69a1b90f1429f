#include "delta.h"

#include <math.h>

#define MAX_TAPS 8
#define CHUNK 64
#define PREFETCH_ROWS 6
#define SHORT_SEGMENT 16 /* up to this length, token by token */

/* One thread's working memory. kk, qk, score, minus_a are [CHUNK][CHUNK]; st [V heads of a K head][n][n]; the others
 * [CHUNK][n], kt [n][CHUNK]. */
typedef struct {
    float *q, *k, *kt, *v, *o, *kk, *qk, *score, *minus_a, *st;
} delta_tile;

static int v_head(const fomoe_delta *d, int k_head, int j)
{
    return d->tiled ? j * d->k_heads + k_head : k_head * (d->v_heads / d->k_heads) + j;
}

/* g = a * softplus(alpha + dt_bias), at most 0 */
static float log_decay(const fomoe_delta *d, int64_t row, int h)
{
    float x = d->alpha[row * d->ld_alpha + h] + d->dt_bias[h];
    return d->a[h] * (x > 20.0f ? x : log1pf(expf(x)));
}

static float write_strength(const fomoe_delta *d, int64_t row, int h)
{
    return 1.0f / (1.0f + expf(-d->beta[row * d->ld_beta + h]));
}

#define ISA_BODY "delta_body.h"
#include "each_isa.h"

typedef struct {
    const fomoe_delta *d;
    void (*short_segment)(const fomoe_delta *d, const fomoe_delta_segment *seg, int k_head, delta_tile *w);
    void (*long_segment)(const fomoe_delta *d, const fomoe_delta_segment *seg, int k_head, delta_tile *w);
} delta_job;

/* Rounded up to whole vectors of any ISA. */
static size_t square(int n)
{
    return ((size_t)n * n + 15) & ~(size_t)15;
}

static size_t tile_floats(int k_heads, int v_heads, int n)
{
    size_t wide = ((size_t)CHUNK * n + 15) & ~(size_t)15;
    return 5 * wide + 4 * square(CHUNK) + (v_heads / k_heads) * square(n);
}

size_t fomoe_delta_scratch(int num_threads, int k_heads, int v_heads, int head_dim)
{
    return num_threads * tile_floats(k_heads, v_heads, head_dim) * sizeof(float);
}

/* The last conv_kernel - 1 inputs of the channels [ch, ch + n) become the conv state. */
static void keep_inputs(const fomoe_delta *d, const fomoe_delta_segment *seg, int ch, int n)
{
    int past = d->conv_kernel - 1, conv_dim = (2 * d->k_heads + d->v_heads) * d->head_dim;
    for (int j = 0; j < past; j++) { /* ascending: what is read lies at or after what is written */
        int t = seg->length - past + j;
        const float *from = t < 0 ? seg->conv + (int64_t)(t + past) * conv_dim
                                  : d->qkv + (int64_t)(seg->start + t) * d->ld_qkv;
        memcpy(seg->conv + (int64_t)j * conv_dim + ch, from + ch, n * sizeof(float));
    }
}

/* A state that decays becomes denormal, which costs 100 times as much per operation: such numbers count as zero here. */
static unsigned flush_denormals(void)
{
#if defined(__x86_64__)
    unsigned old = _mm_getcsr();
    _mm_setcsr(old | 0x8040); /* flush to zero, denormals are zero */
    return old;
#else
    return 0;
#endif
}

static void restore_denormals(unsigned old)
{
#if defined(__x86_64__)
    _mm_setcsr(old);
#else
    (void)old;
#endif
}

static void delta_task(void *arg, int task, int thread)
{
    unsigned mode = flush_denormals();
    const delta_job *job = arg;
    const fomoe_delta *d = job->d;
    const fomoe_delta_segment *seg = &d->segments[task / d->k_heads];
    int k_head = task % d->k_heads, n = d->head_dim;
    size_t wide = ((size_t)CHUNK * n + 15) & ~(size_t)15;
    float *at = (float *)d->scratch + thread * tile_floats(d->k_heads, d->v_heads, n);
    delta_tile w = { .q = at, .k = at + wide, .kt = at + 2 * wide, .v = at + 3 * wide, .o = at + 4 * wide };
    at += 5 * wide;
    w.kk = at;
    w.qk = at + square(CHUNK);
    w.score = at + 2 * square(CHUNK);
    w.minus_a = at + 3 * square(CHUNK);
    w.st = at + 4 * square(CHUNK);
    if (seg->length <= SHORT_SEGMENT)
        job->short_segment(d, seg, k_head, &w);
    else
        job->long_segment(d, seg, k_head, &w);
    keep_inputs(d, seg, k_head * n, n);
    keep_inputs(d, seg, (d->k_heads + k_head) * n, n);
    for (int j = 0; j < d->v_heads / d->k_heads; j++)
        keep_inputs(d, seg, (2 * d->k_heads + v_head(d, k_head, j)) * n, n);
    restore_denormals(mode);
}

void fomoe_delta_run(const fomoe_delta *d)
{
    delta_job job = { d, ISA_PICK(short_segment), ISA_PICK(long_segment) };
    fomoe_pool_run(d->pool, d->num_segments * d->k_heads, delta_task, &job);
}
