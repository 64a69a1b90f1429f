#include "route.h"

#include "norm.h"

#define ISA_BODY "route_body.h"
#include "each_isa.h"

#define TOKENS_PER_TASK 8
#define LEAST_SUM 6.103515625e-5f /* 2^-14, llama.cpp's clamp of the sum of the picked probabilities */
#define ALIGN64(n) (((size_t)(n) + 63) & ~(size_t)63)

typedef struct {
    const fomoe_route *route;
    void (*softmax)(const float *z, int n, float *p);
    float *p; /* per thread */
    int tokens;
} route_job;

size_t fomoe_route_scratch(int num_threads, int tokens, int hidden, int num_experts)
{
    return fomoe_linear_scratch(num_threads, tokens, hidden) + num_threads * ALIGN64(num_experts * sizeof(float));
}

/* An insertion into the k best so far; NaN never enters, so every id stays valid. */
static void pick(const float *z, int n, int k, int32_t *ids)
{
    int num = 0;
    for (int e = 0; e < n; e++) {
        if (num == k && !(z[e] > z[ids[k - 1]]))
            continue;
        int at = num < k ? num++ : k - 1;
        for (; at > 0 && z[e] > z[ids[at - 1]]; at--)
            ids[at] = ids[at - 1];
        ids[at] = e;
    }
}

static void route_task(void *arg, int task, int thread)
{
    const route_job *job = arg;
    const fomoe_route *route = job->route;
    int n = route->num_experts, k = route->top_k, end = (task + 1) * TOKENS_PER_TASK;
    float *p = job->p + thread * (ALIGN64(n * sizeof(float)) / sizeof(float));
    for (int t = task * TOKENS_PER_TASK; t < end && t < job->tokens; t++) {
        const float *z = route->logits + (int64_t)t * n;
        int32_t *ids = route->ids + t * k;
        float *weights = route->weights + t * k, sum = 0.0f;
        pick(z, n, k, ids);
        job->softmax(z, n, p);
        for (int r = 0; r < k; r++)
            sum += p[ids[r]];
        sum = sum > LEAST_SUM ? sum : LEAST_SUM;
        for (int r = 0; r < k; r++)
            weights[r] = (route->renormalise ? p[ids[r]] / sum : p[ids[r]]) * route->weights_scale;
    }
}

void fomoe_route_run(const fomoe_route *route, const float *x, int64_t ldx, int tokens, const float *norm)
{
    fomoe_norm_rows(route->pool, x, ldx, tokens, route->hidden, norm, route->eps, route->h, route->ldh);
    fomoe_linear linear = {
        .pool = route->pool, .scratch = route->scratch, .cols = route->hidden, .num_products = 1,
        .products = { { route->router, route->router_row_bytes, route->router_type, route->num_experts, route->logits,
                        route->num_experts } },
    };
    fomoe_linear_run(&linear, route->h, route->ldh, tokens, NULL);
    int num_threads = fomoe_pool_num_threads(route->pool);
    char *p = (char *)route->scratch + fomoe_linear_scratch(num_threads, tokens, route->hidden);
    route_job job = { route, ISA_PICK(softmax), (float *)p, tokens };
    fomoe_pool_run(route->pool, (tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK, route_task, &job);
}
