#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Between two layers the loop needs some tens of microseconds: spinning that long keeps the hand-over
 * at a fraction of a microsecond, where a futex wake costs tens of them on a virtual machine. */
#define SPIN_ROUNDS 20000
/* The caller waits for tasks that others have claimed. When they take longer than a task may, a thread
 * was probably put to sleep in the middle of one, and may need this very processor. */
#define WAIT_ROUNDS 2000
/* No task is left to claim: more than any number of tasks. */
#define CLOSED UINT32_MAX

/* A run waits only for threads that have claimed a task: one that the system does not schedule in time
 * is simply not part of it. On a busy machine that is the difference between microseconds and a whole
 * time slice for every run. */
struct fomoe_pool {
    int num_threads;
    pthread_t *threads;
    fomoe_task_fn fn;
    void *arg;
    _Atomic uint32_t num_tasks;
    _Atomic int stop;
    _Alignas(64) _Atomic uint64_t claim;    /* epoch << 32 | next task; changed as one */
    _Alignas(64) _Atomic uint32_t epoch;    /* what sleepers wait on; one per run() */
    _Alignas(64) _Atomic int sleepers;
    _Alignas(64) _Atomic uint32_t done;     /* tasks of this run that are complete */
};

typedef struct {
    fomoe_pool *pool;
    int thread;
} worker_arg;

static void work(fomoe_pool *pool, uint32_t epoch, int thread)
{
    uint64_t claim = atomic_load_explicit(&pool->claim, memory_order_acquire);
    while (claim >> 32 == epoch) {
        uint32_t task = (uint32_t)claim;
        if (task >= atomic_load_explicit(&pool->num_tasks, memory_order_relaxed))
            return;
        if (!atomic_compare_exchange_weak_explicit(&pool->claim, &claim, claim + 1,
                                                   memory_order_acq_rel, memory_order_acquire))
            continue;
        /* The claim holds: the run cannot end before this task is done, so fn and arg are its own. */
        pool->fn(pool->arg, (int)task, thread);
        atomic_fetch_add_explicit(&pool->done, 1, memory_order_release);
        claim = atomic_load_explicit(&pool->claim, memory_order_acquire);
    }
}

static uint32_t wait_for_epoch(fomoe_pool *pool, uint32_t seen)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        uint32_t now = atomic_load_explicit(&pool->epoch, memory_order_acquire);
        if (now != seen)
            return now;
        fomoe_pool_relax();
    }
    atomic_fetch_add(&pool->sleepers, 1);
    uint32_t now;
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
    uint32_t epoch = 0;
    for (;;) {
        epoch = wait_for_epoch(pool, epoch);
        if (atomic_load(&pool->stop))
            return NULL;
        work(pool, epoch, thread);
    }
}

static void publish(fomoe_pool *pool, uint32_t epoch)
{
    atomic_store(&pool->epoch, epoch);
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
    *pool = (fomoe_pool){ .num_threads = 1, .claim = CLOSED };
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
    publish(pool, atomic_load(&pool->epoch) + 1);
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
    /* The claim is closed here, so a late worker of an earlier run takes nothing of this one. */
    pool->fn = fn;
    pool->arg = arg;
    atomic_store_explicit(&pool->num_tasks, (uint32_t)num_tasks, memory_order_relaxed);
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    uint32_t epoch = atomic_load_explicit(&pool->epoch, memory_order_relaxed) + 1;
    atomic_store_explicit(&pool->claim, (uint64_t)epoch << 32, memory_order_release);
    publish(pool, epoch);
    work(pool, epoch, 0);
    for (int i = 0; atomic_load_explicit(&pool->done, memory_order_acquire) != (uint32_t)num_tasks; i++) {
        if (i < WAIT_ROUNDS)
            fomoe_pool_relax();
        else
            sched_yield();
    }
    atomic_store_explicit(&pool->claim, (uint64_t)epoch << 32 | CLOSED, memory_order_release);
}
