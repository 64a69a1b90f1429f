#include "embed.h"

#include "matmul.h"

#define ROWS_PER_TASK 16

typedef struct {
    const char *rows;
    float *out;
    int64_t row_bytes, ldo;
    int type, num_rows, cols;
} embed_job;

static void embed_task(void *arg, int task, int thread)
{
    (void)thread;
    const embed_job *job = arg;
    int end = (task + 1) * ROWS_PER_TASK;
    for (int r = task * ROWS_PER_TASK; r < end && r < job->num_rows; r++)
        fomoe_dequantize(job->type, job->rows + r * job->row_bytes, job->out + r * job->ldo, job->cols);
}

int fomoe_embed_rows(fomoe_pool *pool, int type, const void *rows, int64_t row_bytes, int num_rows, int cols, float *out,
                     int64_t ldo)
{
    embed_job job = { rows, out, row_bytes, ldo, type, num_rows, cols };
    int rc = fomoe_dequantize(type, rows, out, 0);
    if (rc < 0)
        return rc;
    fomoe_pool_run(pool, (num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, embed_task, &job);
    return 0;
}
