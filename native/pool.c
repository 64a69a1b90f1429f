#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Between two layers the loop needs some tens of microseconds: spinning that long keeps the hand-over
 * at a fraction of a microsecond, where a futex wake costs tens of them on a virtual machine. */
#define SPIN_ROUNDS 20000

struct fomoe_pool {
    int num_threads;
    pthread_t *threads;
    fomoe_task_fn fn;
    void *arg;
    int num_tasks;
    _Atomic int stop;
    _Alignas(64) _Atomic int epoch;     /* one per run(); workers wait for it to change */
    _Alignas(64) _Atomic int sleepers;
    _Alignas(64) _Atomic int next_task;
    _Alignas(64) _Atomic int working;   /* workers that have not finished the current epoch */
};

typedef struct {
    fomoe_pool *pool;
    int thread;
} worker_arg;

static void work(fomoe_pool *pool, int thread)
{
    fomoe_task_fn fn = pool->fn;
    void *arg = pool->arg;
    int num_tasks = pool->num_tasks;
    for (;;) {
        int task = atomic_fetch_add_explicit(&pool->next_task, 1, memory_order_relaxed);
        if (task >= num_tasks)
            return;
        fn(arg, task, thread);
    }
}

static int wait_for_epoch(fomoe_pool *pool, int seen)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        int now = atomic_load_explicit(&pool->epoch, memory_order_acquire);
        if (now != seen)
            return now;
        fomoe_pool_relax();
    }
    atomic_fetch_add(&pool->sleepers, 1);
    int now;
    while ((now = atomic_load(&pool->epoch)) == seen)
        syscall(SYS_futex, &pool->epoch, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&pool->sleepers, 1);
    return now;
}

static void *worker(void *p)
{
    fomoe_pool *pool = ((worker_arg *)p)->pool;
    int thread = ((worker_arg *)p)->thread;
    free(p);
    int epoch = 0;
    for (;;) {
        epoch = wait_for_epoch(pool, epoch);
        if (atomic_load(&pool->stop))
            return NULL;
        work(pool, thread);
        atomic_fetch_sub_explicit(&pool->working, 1, memory_order_release);
    }
}

static void publish(fomoe_pool *pool)
{
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->sleepers))
        syscall(SYS_futex, &pool->epoch, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

fomoe_pool *fomoe_pool_create(int num_threads)
{
    if (num_threads < 1)
        num_threads = 1;
    fomoe_pool *pool = aligned_alloc(64, (sizeof *pool + 63) & ~(size_t)63);
    if (!pool)
        return NULL;
    *pool = (fomoe_pool){ .num_threads = 1 };
    pool->threads = calloc(num_threads, sizeof *pool->threads);
    if (!pool->threads) {
        free(pool);
        return NULL;
    }
    for (int i = 1; i < num_threads; i++) {
        worker_arg *a = malloc(sizeof *a);
        if (a)
            *a = (worker_arg){ pool, i };
        if (!a || pthread_create(&pool->threads[i], NULL, worker, a)) {
            free(a);
            fomoe_pool_destroy(pool);
            return NULL;
        }
        pool->num_threads = i + 1;
    }
    return pool;
}

void fomoe_pool_destroy(fomoe_pool *pool)
{
    if (!pool)
        return;
    atomic_store(&pool->stop, 1);
    publish(pool);
    for (int i = 1; i < pool->num_threads; i++)
        pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool);
}

int fomoe_pool_num_threads(const fomoe_pool *pool)
{
    return pool->num_threads;
}

void fomoe_pool_run(fomoe_pool *pool, int num_tasks, fomoe_task_fn fn, void *arg)
{
    if (pool->num_threads == 1 || num_tasks <= 1) {
        for (int i = 0; i < num_tasks; i++)
            fn(arg, i, 0);
        return;
    }
    pool->fn = fn;
    pool->arg = arg;
    pool->num_tasks = num_tasks;
    atomic_store_explicit(&pool->next_task, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->working, pool->num_threads - 1, memory_order_relaxed);
    publish(pool);
    work(pool, 0);
    while (atomic_load_explicit(&pool->working, memory_order_acquire))
        fomoe_pool_relax();
}
