#include "linear.h"

#include "norm.h"

#define LEAST_TASK_BYTES 32768
#define TASKS_PER_THREAD 4 /* of a few tokens: each begins to stream anew, which 16 paid for with 3 to 10 % */
#define TILE_ROWS 16 /* that the products with one token compute at a time */
#define PREFILL_TOKENS 8 /* from here on arithmetic bounds a product, not the weights' bytes */
#define PREFILL_TASKS_PER_THREAD 8

#define ALIGN64(n) (((size_t)(n) + 63) & ~(size_t)63)

typedef struct {
    const fomoe_linear *linear;
    fomoe_act act;
    float *tiles; /* per thread, for y += */
    int rows_per_task[FOMOE_LINEAR_MAX_PRODUCTS];
    int first_task[FOMOE_LINEAR_MAX_PRODUCTS + 1];
} linear_job;

/* With many tokens, every product gathers its tokens once more: rows by the hundred pay, as long as the results of one
 * task stay in the cache. */
int fomoe_rows_per_task(int64_t row_bytes, int tokens, int64_t total_bytes, int num_threads)
{
    int64_t bytes = total_bytes / (num_threads * (tokens < PREFILL_TOKENS ? TASKS_PER_THREAD : PREFILL_TASKS_PER_THREAD));
    int most = FOMOE_TILE_FLOATS / (tokens < FOMOE_TOKEN_BLOCK ? tokens : FOMOE_TOKEN_BLOCK);
    most = most < FOMOE_MAX_ROWS_PER_TASK ? most & -TILE_ROWS : FOMOE_MAX_ROWS_PER_TASK;
    int64_t rows = (bytes < LEAST_TASK_BYTES ? LEAST_TASK_BYTES : bytes) / row_bytes & -(int64_t)TILE_ROWS;
    return rows < TILE_ROWS ? TILE_ROWS : rows > most ? most : (int)rows;
}

size_t fomoe_linear_scratch(int num_threads, int tokens, int cols)
{
    size_t normed = ALIGN64((size_t)tokens * cols * sizeof(float));
    return normed + ALIGN64(fomoe_act_bytes(tokens, cols)) + num_threads * (FOMOE_TILE_FLOATS * sizeof(float));
}

static void add_rows(const linear_job *job, const fomoe_product *p, const fomoe_matrix *w, int begin, int end,
                     float *tile)
{
    int tokens = job->act.tokens, width = end - begin;
    int32_t rows[FOMOE_TOKEN_BLOCK];
    for (int t0 = 0; t0 < tokens; t0 += FOMOE_TOKEN_BLOCK) {
        int n = tokens - t0 < FOMOE_TOKEN_BLOCK ? tokens - t0 : FOMOE_TOKEN_BLOCK;
        for (int t = 0; t < n; t++)
            rows[t] = t0 + t;
        fomoe_matmul_rows(w, &job->act, rows, n, begin, end, tile - begin, width);
        for (int t = 0; t < n; t++)
            for (int r = 0; r < width; r++)
                p->y[(t0 + t) * p->ldy + begin + r] += tile[t * width + r];
    }
}

static void linear_task(void *arg, int task, int thread)
{
    const linear_job *job = arg;
    int i = 0;
    while (task >= job->first_task[i + 1])
        i++;
    const fomoe_product *p = &job->linear->products[i];
    int begin = (task - job->first_task[i]) * job->rows_per_task[i], end = begin + job->rows_per_task[i];
    end = end < p->rows ? end : p->rows;
    fomoe_matrix w = { p->data, p->row_bytes, p->type, p->rows, job->linear->cols };
    if (job->linear->add)
        add_rows(job, p, &w, begin, end, job->tiles + thread * FOMOE_TILE_FLOATS);
    else
        fomoe_matmul_rows(&w, &job->act, NULL, job->act.tokens, begin, end, p->y, p->ldy);
}

void fomoe_linear_run(const fomoe_linear *linear, const float *x, int64_t ldx, int tokens, const float *norm)
{
    linear_job job = { .linear = linear };
    int cols = linear->cols;
    char *scratch = linear->scratch;
    if (norm) {
        fomoe_norm_rows(linear->pool, x, ldx, tokens, cols, norm, linear->eps, (float *)scratch, cols);
        x = (const float *)scratch;
        ldx = cols;
    }
    scratch += ALIGN64((size_t)tokens * cols * sizeof(float));
    int32_t types[FOMOE_LINEAR_MAX_PRODUCTS];
    int num_threads = fomoe_pool_num_threads(linear->pool);
    int64_t bytes = 0;
    for (int i = 0; i < linear->num_products; i++)
        bytes += linear->products[i].rows * linear->products[i].row_bytes;
    for (int i = 0; i < linear->num_products; i++) {
        const fomoe_product *p = &linear->products[i];
        types[i] = p->type;
        job.rows_per_task[i] = fomoe_rows_per_task(p->row_bytes, tokens, bytes, num_threads);
        job.first_task[i + 1] = job.first_task[i] + (p->rows + job.rows_per_task[i] - 1) / job.rows_per_task[i];
    }
    fomoe_act_prepare(linear->pool, &job.act, x, ldx, tokens, cols, types, linear->num_products, scratch);
    job.tiles = (float *)(scratch + ALIGN64(fomoe_act_bytes(tokens, cols)));
    fomoe_pool_run(linear->pool, job.first_task[linear->num_products], linear_task, &job);
}
