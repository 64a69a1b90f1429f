#include "norm.h"

#define ISA_BODY "norm_body.h"
#include "each_isa.h"

#define TOKENS_PER_TASK 16

typedef struct {
    void (*row)(const float *x, const float *w, float eps, int n, float *y);
    const float *x, *w;
    float *y;
    int64_t ldx, ldy;
    int tokens, cols;
    float eps;
} norm_job;

static void norm_task(void *arg, int task, int thread)
{
    (void)thread;
    const norm_job *job = arg;
    int end = (task + 1) * TOKENS_PER_TASK;
    for (int t = task * TOKENS_PER_TASK; t < end && t < job->tokens; t++)
        job->row(job->x + t * job->ldx, job->w, job->eps, job->cols, job->y + t * job->ldy);
}

void fomoe_norm_rows(fomoe_pool *pool, const float *x, int64_t ldx, int tokens, int cols, const float *w, float eps,
                     float *y, int64_t ldy)
{
    norm_job job = { ISA_PICK(row_norm), x, w, y, ldx, ldy, tokens, cols, eps };
    fomoe_pool_run(pool, (tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK, norm_task, &job);
}
