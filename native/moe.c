#include "moe.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>

#define ISA_BODY "moe_body.h"
#include "each_isa.h"

#define MAX_TOP_K 64
#define LEAST_WAVE 64 /* pairs */
#define SUM_TOKENS_PER_TASK 8
#define ROW_GAP 16 /* floats between outputs: rows a power of two apart share few sets of a cache */
#define ALIGN64(n) (((size_t)(n) + 63) & ~(size_t)63)

/* One expert of a wave. `ready` tells its down tasks that the last gate-up task has quantised mid. */
typedef struct {
    fomoe_matrix gate, up, down;
    const fomoe_act *x; /* rows of it: tokens[0..num) */
    const int32_t *tokens;
    int num;
    int ff, hidden;
    float *mid; /* [num][ff] */
    float *out; /* [num][hidden + ROW_GAP] */
    void *mid_scratch;
    fomoe_act mid_act;
    int up_rows_per_task, up_tasks, down_rows_per_task, down_tasks;
    _Atomic int up_left;
    _Atomic int ready;
} expert_job;

enum { TODO, STARTED, DONE };

/* Experts that are computed together. */
typedef struct {
    fomoe_moe *moe;
    expert_job *jobs;
    int num;
    int up_tasks; /* of all experts: they are claimed before any down task, so waiting on them cannot deadlock */
    void (*silu_mul)(const float *gate, const float *up, int n, float *out);
} wave;

struct fomoe_moe {
    const fomoe_moe_layer *layer;
    fomoe_pool *pool;
    fomoe_moe_shape shape;
    int wave_pairs;
    int32_t *first;      /* [num_experts]: an expert's first pair */
    int32_t *count;      /* [num_experts]: and how many it has */
    int32_t *pair_token; /* [pairs] */
    int32_t *pair_of;    /* [token * top_k + rank] */
    int32_t *all_tokens; /* 0, 1, 2, ... */
    uint8_t *done;       /* [num_experts]: TODO, STARTED or DONE */
    expert_job *jobs;    /* [num_experts] */
    float *mid;          /* [wave_pairs][max(ff, shared_ff)] */
    char *mid_scratch;
    size_t mid_scratch_bytes;
    float *tiles;        /* per thread: gate and up rows of one task */
    char *act_scratch;
    float *out;          /* [pairs][hidden + ROW_GAP] */
    float *shared_out;   /* [tokens][hidden + ROW_GAP] */
    float *shared_scale; /* [tokens] */
    fomoe_act act;
    int tokens, pairs_left;
    const int32_t *ids;
    const float *weights;
    wave wave; /* the last one that was started */
};

typedef struct {
    char *at;
    size_t used;
} layout;

static void *take(layout *l, size_t bytes)
{
    void *p = l->at ? l->at + l->used : NULL;
    l->used += ALIGN64(bytes);
    return p;
}

static int max_int(int a, int b)
{
    return a > b ? a : b;
}

/* The one definition of the memory's layout: with l->at NULL it only measures. */
static void lay_out(fomoe_moe *moe, layout *l, int num_threads, int tokens, const fomoe_moe_shape *shape,
                    int shared_ff)
{
    size_t pairs = (size_t)tokens * shape->top_k, ff = max_int(shape->ff, shared_ff);
    /* A wave has room for any one expert, which every token may have picked, and for all experts of a token. */
    moe->wave_pairs = max_int(max_int(tokens, LEAST_WAVE), shape->top_k + 1);
    moe->first = take(l, shape->num_experts * sizeof(int32_t));
    moe->count = take(l, shape->num_experts * sizeof(int32_t));
    moe->pair_token = take(l, pairs * sizeof(int32_t));
    moe->pair_of = take(l, pairs * sizeof(int32_t));
    moe->all_tokens = take(l, tokens * sizeof(int32_t));
    moe->done = take(l, shape->num_experts);
    moe->jobs = take(l, (shape->num_experts + 1) * sizeof(expert_job));
    moe->mid = take(l, moe->wave_pairs * ff * sizeof(float));
    moe->mid_scratch_bytes = ALIGN64(fomoe_act_bytes(moe->wave_pairs, ff))
                             + (LEAST_WAVE + 1) * ALIGN64(fomoe_act_bytes(1, ff));
    moe->mid_scratch = take(l, moe->mid_scratch_bytes);
    moe->tiles = take(l, num_threads * 2 * FOMOE_TILE_FLOATS * sizeof(float));
    moe->act_scratch = take(l, fomoe_act_bytes(tokens, shape->hidden));
    size_t out_bytes = (shape->hidden + ROW_GAP) * sizeof(float);
    moe->out = take(l, pairs * out_bytes);
    moe->shared_out = take(l, shared_ff ? tokens * out_bytes : 0);
    moe->shared_scale = take(l, tokens * sizeof(float));
}

size_t fomoe_moe_bytes(int num_threads, int max_tokens, const fomoe_moe_shape *shape, int shared_ff)
{
    fomoe_moe moe;
    layout l = { NULL, ALIGN64(sizeof moe) };
    lay_out(&moe, &l, num_threads, max_tokens, shape, shared_ff);
    return l.used;
}

/* A counting sort of the pairs by expert; within an expert by token. */
static void sort_pairs(fomoe_moe *moe, const int32_t *ids)
{
    int num_experts = moe->shape.num_experts, top_k = moe->shape.top_k, pairs = moe->tokens * top_k;
    int32_t *first = moe->first, *count = moe->count;
    memset(count, 0, num_experts * sizeof *count);
    for (int i = 0; i < pairs; i++)
        count[ids[i]]++;
    for (int e = 0, at = 0; e < num_experts; e++) {
        first[e] = at;
        at += count[e];
    }
    for (int i = 0; i < pairs; i++) {
        int at = moe->tokens > 1 ? first[ids[i]]++ : i;
        moe->pair_token[at] = i / top_k;
        moe->pair_of[i] = at;
        if (moe->tokens == 1)
            first[ids[i]] = at;
    }
    for (int e = 0; moe->tokens > 1 && e < num_experts; e++)
        first[e] -= count[e];
}

int fomoe_moe_find(const fomoe_moe *moe, const int64_t *table, int64_t *experts)
{
    int num = 0;
    for (int e = 0; e < moe->shape.num_experts; e++) {
        if (!moe->count[e])
            continue;
        if (!table[3 * e])
            return -1;
        int64_t *found = experts + 4 * num++;
        found[0] = e;
        memcpy(found + 1, table + 3 * e, 3 * sizeof *table);
    }
    return num;
}

static void up_task(const wave *w, expert_job *job, int chunk, int thread)
{
    int begin = chunk * job->up_rows_per_task, end = begin + job->up_rows_per_task;
    end = end < job->ff ? end : job->ff;
    int width = end - begin;
    float *gate = w->moe->tiles + (int64_t)thread * 2 * FOMOE_TILE_FLOATS, *up = gate + FOMOE_TILE_FLOATS;
    for (int t0 = 0; t0 < job->num; t0 += FOMOE_TOKEN_BLOCK) {
        int n = job->num - t0 < FOMOE_TOKEN_BLOCK ? job->num - t0 : FOMOE_TOKEN_BLOCK;
        fomoe_matmul_rows(&job->gate, job->x, job->tokens + t0, n, begin, end, gate - begin, width);
        fomoe_matmul_rows(&job->up, job->x, job->tokens + t0, n, begin, end, up - begin, width);
        for (int t = 0; t < n; t++)
            w->silu_mul(gate + t * width, up + t * width, width, job->mid + (int64_t)(t0 + t) * job->ff + begin);
    }
    if (atomic_fetch_sub_explicit(&job->up_left, 1, memory_order_acq_rel) == 1) {
        fomoe_act_prepare(w->moe->layer->serial, &job->mid_act, job->mid, job->ff, job->num, job->ff, &job->down.type, 1,
                          job->mid_scratch);
        atomic_store_explicit(&job->ready, 1, memory_order_release);
    }
}

static void down_task(expert_job *job, int chunk)
{
    int begin = chunk * job->down_rows_per_task, end = begin + job->down_rows_per_task;
    for (int i = 1; !atomic_load_explicit(&job->ready, memory_order_acquire); i++)
        fomoe_pool_relax(i);
    fomoe_matmul_rows(&job->down, &job->mid_act, NULL, job->num, begin, end < job->hidden ? end : job->hidden, job->out,
                      job->hidden + ROW_GAP);
}

static void wave_task(void *arg, int task, int thread)
{
    const wave *w = arg;
    expert_job *job = w->jobs;
    if (task < w->up_tasks) {
        for (; task >= job->up_tasks; job++)
            task -= job->up_tasks;
        up_task(w, job, task, thread);
    } else {
        for (task -= w->up_tasks; task >= job->down_tasks; job++)
            task -= job->down_tasks;
        down_task(job, task);
    }
}

static void set_tasks(expert_job *job, int num_jobs, int num_threads)
{
    int64_t both = job->gate.row_bytes + job->up.row_bytes;
    job->up_rows_per_task = fomoe_rows_per_task(both, job->num, num_jobs * job->ff * both, num_threads);
    job->up_tasks = (job->ff + job->up_rows_per_task - 1) / job->up_rows_per_task;
    int64_t down_bytes = num_jobs * job->hidden * job->down.row_bytes;
    job->down_rows_per_task = fomoe_rows_per_task(job->down.row_bytes, job->num, down_bytes, num_threads);
    job->down_tasks = (job->hidden + job->down_rows_per_task - 1) / job->down_rows_per_task;
    atomic_init(&job->up_left, job->up_tasks);
    atomic_init(&job->ready, 0);
}

/* The wave before it must be finished: waves share the memory between gate-up and down. */
static void start_wave(fomoe_moe *moe, expert_job *jobs, int num)
{
    wave *w = &moe->wave;
    *w = (wave){ moe, jobs, num, 0, ISA_PICK(silu_mul) };
    int tasks = 0, num_threads = fomoe_pool_num_threads(moe->pool);
    for (int i = 0; i < num; i++) {
        set_tasks(&jobs[i], num, num_threads);
        w->up_tasks += jobs[i].up_tasks;
        tasks += jobs[i].up_tasks + jobs[i].down_tasks;
    }
    fomoe_pool_start(moe->pool, tasks, wave_task, w);
}

static void run_wave(fomoe_moe *moe, expert_job *jobs, int num)
{
    start_wave(moe, jobs, num);
    fomoe_pool_finish(moe->pool);
}

static fomoe_matrix matrix(int64_t address, int64_t row_bytes, int type, int rows, int cols)
{
    return (fomoe_matrix){ (const void *)(intptr_t)address, row_bytes, type, rows, cols };
}

/* The job of an expert that picks wait for, with room at `row` of mid and `scratch`; its bytes of scratch. */
static size_t set_job(fomoe_moe *moe, expert_job *job, int expert, const int64_t *addresses, float *mid, char *scratch)
{
    const fomoe_moe_shape *s = &moe->shape;
    int first = moe->first[expert], num = moe->count[expert];
    *job = (expert_job){
        .gate = matrix(addresses[0], s->gate_row_bytes, s->gate_type, s->ff, s->hidden),
        .up = matrix(addresses[1], s->up_row_bytes, s->up_type, s->ff, s->hidden),
        .down = matrix(addresses[2], s->down_row_bytes, s->down_type, s->hidden, s->ff),
        .x = &moe->act, .tokens = moe->pair_token + first, .num = num, .ff = s->ff, .hidden = s->hidden,
        .mid = mid, .out = moe->out + (int64_t)first * (s->hidden + ROW_GAP), .mid_scratch = scratch,
    };
    moe->pairs_left -= num;
    return ALIGN64(fomoe_act_bytes(num, s->ff));
}

int fomoe_moe_run(fomoe_moe *moe, const int64_t *experts, int num)
{
    fomoe_pool_finish(moe->pool); /* what was started may be under way, in the memory used here */
    const fomoe_moe_shape *s = &moe->shape;
    int in_wave = 0, wave_pairs = 0;
    size_t scratch = 0;
    for (int i = 0; i < num; i++) {
        const int64_t *e = experts + 4 * i;
        if (e[0] < 0 || e[0] >= s->num_experts || moe->done[e[0]] == DONE)
            return -EINVAL;
        int started = moe->done[e[0]] == STARTED, n = moe->count[e[0]];
        moe->done[e[0]] = DONE;
        if (!n || started)
            continue;
        size_t bytes = ALIGN64(fomoe_act_bytes(n, s->ff));
        if (wave_pairs + n > moe->wave_pairs || scratch + bytes > moe->mid_scratch_bytes) {
            run_wave(moe, moe->jobs, in_wave);
            in_wave = wave_pairs = 0;
            scratch = 0;
        }
        float *mid = moe->mid + (int64_t)wave_pairs * s->ff;
        scratch += set_job(moe, &moe->jobs[in_wave++], e[0], e + 1, mid, moe->mid_scratch + scratch);
        wave_pairs += n;
    }
    if (in_wave)
        run_wave(moe, moe->jobs, in_wave);
    return 0;
}

static fomoe_matrix product_matrix(const fomoe_product *p, int cols)
{
    return (fomoe_matrix){ p->data, p->row_bytes, p->type, p->rows, cols };
}

static void set_shared_job(fomoe_moe *moe, expert_job *job)
{
    const fomoe_moe_layer *layer = moe->layer;
    int hidden = moe->shape.hidden;
    for (int t = 0; t < moe->tokens; t++)
        moe->all_tokens[t] = t;
    *job = (expert_job){
        .gate = product_matrix(&layer->shared_gate, hidden), .up = product_matrix(&layer->shared_up, hidden),
        .down = product_matrix(&layer->shared_down, layer->shared_ff), .x = &moe->act, .tokens = moe->all_tokens,
        .num = moe->tokens, .ff = layer->shared_ff, .hidden = hidden, .mid = moe->mid, .out = moe->shared_out,
        .mid_scratch = moe->mid_scratch,
    };
    if (layer->shared_scale.data) {
        fomoe_matrix w = product_matrix(&layer->shared_scale, hidden);
        fomoe_matmul_rows(&w, &moe->act, NULL, moe->tokens, 0, 1, moe->shared_scale, 1);
    }
}

int fomoe_moe_start(fomoe_moe *moe, const int64_t *table)
{
    int num = 0, shared_ff = moe->layer->shared_ff, ff = moe->shape.ff;
    float *mid = moe->mid;
    char *scratch = moe->mid_scratch;
    if (shared_ff) {
        set_shared_job(moe, &moe->jobs[num++]);
        mid += (int64_t)moe->tokens * shared_ff;
        scratch += ALIGN64(fomoe_act_bytes(moe->tokens, shared_ff));
    }
    for (int r = 0; table && moe->tokens == 1 && r < moe->shape.top_k; r++) {
        int e = moe->ids[r];
        if (!table[3 * e])
            continue;
        scratch += set_job(moe, &moe->jobs[num++], e, table + 3 * e, mid, scratch);
        mid += ff;
        moe->done[e] = STARTED;
    }
    if (num)
        start_wave(moe, moe->jobs, num);
    return moe->pairs_left;
}

int fomoe_moe_start_expert(fomoe_moe *moe, const int64_t *expert)
{
    if (moe->done[expert[0]] != TODO || !moe->count[expert[0]] || fomoe_pool_num_threads(moe->pool) == 1)
        return 0;
    if (moe->tokens > 1 && !fomoe_pool_idle(moe->pool))
        return 0;
    fomoe_pool_finish(moe->pool);
    set_job(moe, &moe->jobs[0], (int)expert[0], expert + 1, moe->mid, moe->mid_scratch);
    moe->done[expert[0]] = STARTED;
    start_wave(moe, moe->jobs, 1);
    return 1;
}

void fomoe_moe_settle(const fomoe_moe_layer *layer)
{
    fomoe_pool_finish(layer->pool);
}

fomoe_moe *fomoe_moe_begin(const fomoe_moe_layer *layer, const float *h, int64_t ldh, int tokens)
{
    fomoe_pool_finish(layer->pool); /* of a step that was given up, in the same memory */
    fomoe_moe *moe = layer->memory;
    const fomoe_moe_shape *shape = &layer->shape;
    layout l = { layer->memory, ALIGN64(sizeof *moe) };
    *moe = (fomoe_moe){ .layer = layer, .pool = layer->pool, .shape = *shape, .tokens = tokens,
                        .pairs_left = tokens * shape->top_k };
    lay_out(moe, &l, fomoe_pool_num_threads(layer->pool), tokens, shape, layer->shared_ff);
    int32_t types[] = { shape->gate_type, shape->up_type, layer->shared_gate.type, layer->shared_up.type,
                        layer->shared_scale.type };
    int num_types = !layer->shared_ff ? 2 : layer->shared_scale.data ? 5 : 4;
    fomoe_act_prepare(layer->pool, &moe->act, h, ldh, tokens, shape->hidden, types, num_types, moe->act_scratch);
    memset(moe->done, TODO, shape->num_experts);
    return moe;
}

void fomoe_moe_pick(fomoe_moe *moe, const int32_t *ids, const float *weights)
{
    moe->weights = weights;
    moe->ids = ids;
    sort_pairs(moe, ids);
}

typedef struct {
    const fomoe_moe *moe;
    float *x;
    int64_t ldx;
    void (*weighted_sum)(const float *const *outs, const float *weights, int k, const float *shared,
                         float shared_weight, int n, float *x);
    float (*sigmoid)(float x);
} sum_job;

static void sum_task(void *arg, int task, int thread)
{
    (void)thread;
    const sum_job *job = arg;
    const fomoe_moe *moe = job->moe;
    int k = moe->shape.top_k, hidden = moe->shape.hidden, end = (task + 1) * SUM_TOKENS_PER_TASK;
    for (int t = task * SUM_TOKENS_PER_TASK; t < end && t < moe->tokens; t++) {
        const float *outs[MAX_TOP_K], *weights = moe->weights + t * k;
        float some[MAX_TOP_K];
        int n = 0;
        for (int r = 0; r < k; r++)
            if (moe->done[moe->ids[t * k + r]] != TODO) {
                some[n] = weights[r];
                outs[n++] = moe->out + (int64_t)moe->pair_of[t * k + r] * (hidden + ROW_GAP);
            }
        const float *shared = moe->layer->shared_ff ? moe->shared_out + (int64_t)t * (hidden + ROW_GAP) : NULL;
        float shared_weight = moe->layer->shared_scale.data ? job->sigmoid(moe->shared_scale[t]) : 1.0f;
        job->weighted_sum(outs, some, n, shared, shared_weight, hidden, job->x + t * job->ldx);
    }
}

int fomoe_moe_finish(fomoe_moe *moe, float *x, int64_t ldx)
{
    if (!moe->pairs_left)
        fomoe_moe_finish_some(moe, x, ldx);
    return moe->pairs_left;
}

void fomoe_moe_finish_some(fomoe_moe *moe, float *x, int64_t ldx)
{
    fomoe_pool_finish(moe->pool);
    sum_job job = { moe, x, ldx, ISA_PICK(weighted_sum), ISA_PICK(sigmoid) };
    fomoe_pool_run(moe->pool, (moe->tokens + SUM_TOKENS_PER_TASK - 1) / SUM_TOKENS_PER_TASK, sum_task, &job);
}
