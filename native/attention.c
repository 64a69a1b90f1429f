#include "attention.h"

#define QUERIES 64     /* rows of a tile: tokens times the heads that share a kv head */
#define KEY_BLOCK 64
#define NO_SCORE -1e30f
#define SPLIT_TOKENS 8    /* segments up to this length split their keys over tasks */
#define SPLIT_KEYS 512
#define PREPARE_TOKENS 4  /* per task */

typedef struct {
    int num_queries;
    int stride; /* num_queries in whole vectors of any ISA */
    float *qt, *block, *scores, *out; /* [head_dim][stride], [KEY_BLOCK][head_dim], [KEY_BLOCK][stride], [queries][head_dim] */
    float top[QUERIES], sum[QUERIES], shrink[QUERIES];
} attention_tile;

#define ISA_BODY "attention_body.h"
#include "each_isa.h"

#define ALIGN64(n) (((size_t)(n) + 63) & ~(size_t)63)

/* Partial results of split segments: [rows][head_dim + 2], the row's accumulated values, maximum and sum. */
#define PARTIAL_ROWS_PER_HEAD 256

/* Queries [query, query + num) of a segment, counted token by token over the heads that share `kv_head`. */
typedef struct {
    int32_t segment, kv_head, query, num;
    int32_t key_begin, key_end;
    int32_t partial; /* first row of its partial results, -1 when it sees all keys */
    int32_t num_parts; /* on the first part: how many parts follow each other, `num` rows each */
} tile_task;

typedef struct {
    const fomoe_attention *a;
    tile_task *tasks;
    int num_tasks, num_partials;
    int32_t *combine; /* indices of first parts */
    int num_combine;
    float *partials;
    char *tiles; /* per thread */
    size_t tile_bytes;
    int group;
    void (*prepare_head)(float *x, const float *norm, float eps, int d, int rope_dims, const float *cosines,
                         const float *sines, float scale);
    void (*store_half)(const float *x, int n, uint16_t *out);
    void (*tile_keys)(const fomoe_attention *a, attention_tile *t, const int32_t *pages, int kv_head, int begin, int end,
                      int first_query, int position, int group);
    void (*write_out)(const float *acc, float sum, const float *gate, int d, float *dst);
    void (*blend)(float *acc, float a, const float *other, float b, int d);
    float (*exp_one)(float x);
} attention_job;

static int max_int(int a, int b)
{
    return a > b ? a : b;
}

static int min_int(int a, int b)
{
    return a < b ? a : b;
}

static size_t tile_bytes(int head_dim)
{
    size_t floats = (size_t)head_dim * (2 * QUERIES + KEY_BLOCK) + KEY_BLOCK * QUERIES;
    return ALIGN64(sizeof(attention_tile)) + ALIGN64(floats * sizeof(float));
}

static size_t max_tasks(int tokens, int heads, int kv_heads)
{
    return (size_t)tokens * (heads / QUERIES + 2 * kv_heads) + (size_t)PARTIAL_ROWS_PER_HEAD * heads;
}

size_t fomoe_attention_scratch(int num_threads, int tokens, int heads, int kv_heads, int head_dim)
{
    size_t tasks = max_tasks(tokens, heads, kv_heads);
    return ALIGN64(tasks * sizeof(tile_task)) + ALIGN64(tasks * sizeof(int32_t))
           + ALIGN64((size_t)PARTIAL_ROWS_PER_HEAD * heads * (head_dim + 2) * sizeof(float))
           + num_threads * tile_bytes(head_dim);
}

/* ---- norm, rotation, cache ---- */

static void append(const attention_job *job, const fomoe_segment *seg, int token)
{
    const fomoe_attention *a = job->a;
    int position = seg->position + token - seg->start, d = a->head_dim;
    int page = seg->pages[position / a->page_tokens];
    for (int h = 0; h < a->kv_heads; h++) {
        int64_t at = (((int64_t)page * a->kv_heads + h) * a->page_tokens + position % a->page_tokens) * d;
        const float *k = a->k + token * a->ldk + h * d, *v = a->v + token * a->ldv + h * d;
        if (a->cache_f16) {
            job->store_half(k, d, (uint16_t *)a->k_cache + at);
            job->store_half(v, d, (uint16_t *)a->v_cache + at);
        } else {
            memcpy((float *)a->k_cache + at, k, d * sizeof *k);
            memcpy((float *)a->v_cache + at, v, d * sizeof *v);
        }
    }
}

static void prepare_token(const attention_job *job, const fomoe_segment *seg, int token, float *cosines)
{
    const fomoe_attention *a = job->a;
    int half = a->rope_dims / 2, d = a->head_dim, position = seg->position + token - seg->start;
    float *sines = cosines + half;
    for (int i = 0; i < half; i++) {
        double angle = position * a->rope_frequencies[i];
        cosines[i] = (float)cos(angle);
        sines[i] = (float)sin(angle);
    }
    for (int h = 0; h < a->kv_heads; h++)
        job->prepare_head(a->k + token * a->ldk + h * d, a->k_norm, a->eps, d, a->rope_dims, cosines, sines, 1.0f);
    for (int h = 0; h < a->heads; h++)
        job->prepare_head(a->q + token * a->ldq + (int64_t)h * d * (a->gated ? 2 : 1), a->q_norm, a->eps, d,
                          a->rope_dims, cosines, sines, a->scale);
    append(job, seg, token);
}

static void prepare_task(void *arg, int task, int thread)
{
    const attention_job *job = arg;
    const fomoe_segment *seg = job->a->segments;
    float *angles = (float *)(job->tiles + thread * job->tile_bytes);
    int skip = task * PREPARE_TOKENS, num = PREPARE_TOKENS; /* counted along the segments */
    for (int i = 0; i < job->a->num_segments && num > 0; i++, seg++) {
        for (; skip < seg->length && num > 0; skip++, num--)
            prepare_token(job, seg, seg->start + skip, angles);
        skip = skip > seg->length ? skip - seg->length : 0;
    }
}

/* ---- attention ---- */

static float *query_row(const attention_job *job, const tile_task *task, int r)
{
    const fomoe_attention *a = job->a;
    int query = task->query + r, token = job->a->segments[task->segment].start + query / job->group;
    int head = task->kv_head * job->group + query % job->group;
    return a->q + token * a->ldq + (int64_t)head * a->head_dim * (a->gated ? 2 : 1);
}

static void finish_row(const attention_job *job, const tile_task *task, int r, const float *acc, float sum)
{
    const fomoe_attention *a = job->a;
    int query = task->query + r, token = a->segments[task->segment].start + query / job->group;
    int head = task->kv_head * job->group + query % job->group;
    const float *gate = a->gated ? query_row(job, task, r) + a->head_dim : NULL;
    job->write_out(acc, sum, gate, a->head_dim, a->out + token * a->ldo + (int64_t)head * a->head_dim);
}

static void attend_task(void *arg, int index, int thread)
{
    const attention_job *job = arg;
    const fomoe_attention *a = job->a;
    const tile_task *task = &job->tasks[index];
    const fomoe_segment *seg = &a->segments[task->segment];
    int d = a->head_dim;
    attention_tile *tile = (attention_tile *)(job->tiles + thread * job->tile_bytes);
    tile->num_queries = task->num;
    tile->stride = (task->num + 15) & ~15;
    tile->qt = (float *)((char *)tile + ALIGN64(sizeof *tile));
    tile->block = tile->qt + (size_t)d * QUERIES;
    tile->scores = tile->block + (size_t)d * KEY_BLOCK;
    tile->out = tile->scores + KEY_BLOCK * QUERIES;
    memset(tile->qt, 0, (size_t)d * tile->stride * sizeof(float));
    for (int r = 0; r < task->num; r++) {
        const float *q = query_row(job, task, r);
        for (int i = 0; i < d; i++)
            tile->qt[i * tile->stride + r] = q[i];
    }
    job->tile_keys(a, tile, seg->pages, task->kv_head, task->key_begin, task->key_end, task->query, seg->position,
                   job->group);
    for (int r = 0; r < task->num; r++) {
        const float *acc = tile->out + (int64_t)r * d;
        if (task->partial < 0) {
            finish_row(job, task, r, acc, tile->sum[r]);
        } else {
            float *part = job->partials + (int64_t)(task->partial + r) * (d + 2);
            memcpy(part, acc, d * sizeof *part);
            part[d] = tile->top[r];
            part[d + 1] = tile->sum[r];
        }
    }
}

static void combine_task(void *arg, int index, int thread)
{
    (void)thread;
    const attention_job *job = arg;
    const tile_task *task = &job->tasks[job->combine[index]];
    int d = job->a->head_dim;
    for (int r = 0; r < task->num; r++) {
        float *acc = job->partials + (int64_t)(task->partial + r) * (d + 2);
        for (int p = 1; p < task->num_parts; p++) {
            const float *part = acc + (int64_t)p * task->num * (d + 2);
            float top = acc[d] > part[d] ? acc[d] : part[d];
            float mine = job->exp_one(acc[d] - top), theirs = job->exp_one(part[d] - top);
            job->blend(acc, mine, part, theirs, d);
            acc[d] = top;
            acc[d + 1] = acc[d + 1] * mine + part[d + 1] * theirs;
        }
        finish_row(job, task, r, acc, acc[d + 1]);
    }
}

/* Cuts one segment into tiles; a short one also by keys, into at most `max_parts`. The last tiles see most keys and come
 * first, so that the threads end together. */
static void cut_segment(attention_job *job, int index, int max_parts)
{
    const fomoe_segment *seg = &job->a->segments[index];
    int queries = seg->length * job->group;
    for (int q = (queries - 1) / QUERIES * QUERIES; q >= 0; q -= QUERIES) {
        int num = min_int(QUERIES, queries - q), keys = seg->position + (q + num - 1) / job->group + 1;
        int parts = seg->length > SPLIT_TOKENS ? 1 : min_int(max_parts, (keys + SPLIT_KEYS - 1) / SPLIT_KEYS);
        int part_keys = ((keys + parts - 1) / parts + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
        parts = (keys + part_keys - 1) / part_keys;
        for (int h = 0; h < job->a->kv_heads; h++) {
            if (parts > 1)
                job->combine[job->num_combine++] = job->num_tasks;
            for (int p = 0; p < parts; p++) {
                int begin = p * part_keys;
                job->tasks[job->num_tasks++] = (tile_task){
                    index, h, q, num, begin, min_int(begin + part_keys, keys), parts > 1 ? job->num_partials : -1, parts,
                };
                job->num_partials += parts > 1 ? num : 0;
            }
        }
    }
}

static void cut(attention_job *job)
{
    const fomoe_attention *a = job->a;
    int short_tokens = 0;
    for (int s = 0; s < a->num_segments; s++)
        short_tokens += a->segments[s].length <= SPLIT_TOKENS ? a->segments[s].length : 0;
    int max_parts = max_int(1, PARTIAL_ROWS_PER_HEAD / max_int(1, short_tokens));
    for (int s = 0; s < a->num_segments; s++)
        cut_segment(job, s, max_parts);
}

void fomoe_attention_run(const fomoe_attention *a)
{
    int tokens = 0;
    for (int s = 0; s < a->num_segments; s++)
        tokens += a->segments[s].length;
    size_t tasks = max_tasks(tokens, a->heads, a->kv_heads);
    attention_job job = {
        .a = a, .group = a->heads / a->kv_heads, .tile_bytes = tile_bytes(a->head_dim),
        .prepare_head = ISA_PICK(prepare_head), .store_half = ISA_PICK(store_half), .tile_keys = ISA_PICK(tile_keys),
        .write_out = ISA_PICK(write_out), .blend = ISA_PICK(blend), .exp_one = ISA_PICK(exp_one),
    };
    char *scratch = a->scratch;
    job.tasks = (tile_task *)scratch;
    scratch += ALIGN64(tasks * sizeof(tile_task));
    job.combine = (int32_t *)scratch;
    scratch += ALIGN64(tasks * sizeof(int32_t));
    job.partials = (float *)scratch;
    job.tiles = scratch + ALIGN64((size_t)PARTIAL_ROWS_PER_HEAD * a->heads * (a->head_dim + 2) * sizeof(float));
    fomoe_pool_run(a->pool, (tokens + PREPARE_TOKENS - 1) / PREPARE_TOKENS, prepare_task, &job);
    cut(&job);
    fomoe_pool_run(a->pool, job.num_tasks, attend_task, &job);
    fomoe_pool_run(a->pool, job.num_combine, combine_task, &job);
}
