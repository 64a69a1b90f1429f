#include "pool.h"

#include <assert.h>
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
#define YIELD_ROUNDS 1000

/* A run in one word, so that claiming a task is one compare-and-swap: which run (its low bits), how many tasks it has,
 * the next to be claimed. fn and arg may be read as long as tasks are left: they change only after all are done.
 * A caller thus waits for claimed tasks, never for a worker that was not even scheduled. */
#define TASK_BITS 20
#define TASK_MASK ((1u << TASK_BITS) - 1)

struct fomoe_pool {
    int num_threads;
    pthread_t *threads;
    _Atomic(fomoe_task_fn) fn;
    void *_Atomic arg;
    _Atomic int stop;
    _Alignas(64) _Atomic uint64_t ticket; /* run << 40 | num_tasks << 20 | next task */
    _Alignas(64) _Atomic int epoch;       /* what sleepers wait on: changes with every run */
    _Atomic int sleepers;
    _Alignas(64) _Atomic int unfinished; /* tasks of the run */
};

typedef struct {
    fomoe_pool *pool;
    int thread;
} worker_arg;

void fomoe_pool_relax(int i)
{
    if (i % YIELD_ROUNDS == 0)
        sched_yield(); /* more threads than cores: the one waited for may need this one's */
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int tasks_left(uint64_t ticket)
{
    return (int)(ticket >> TASK_BITS & TASK_MASK) - (int)(ticket & TASK_MASK);
}

/* Claims and computes tasks until none is left. */
static void work(fomoe_pool *pool, int thread)
{
    int finished = 0;
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    while (tasks_left(ticket) > 0) {
        fomoe_task_fn fn = atomic_load_explicit(&pool->fn, memory_order_relaxed);
        void *arg = atomic_load_explicit(&pool->arg, memory_order_relaxed);
        if (!atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket + 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        fn(arg, (int)(ticket & TASK_MASK), thread);
        finished++;
        ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    }
    if (finished)
        atomic_fetch_sub_explicit(&pool->unfinished, finished, memory_order_release);
}

static void wait_for_tasks(fomoe_pool *pool)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (tasks_left(atomic_load_explicit(&pool->ticket, memory_order_relaxed)) > 0 || atomic_load(&pool->stop))
            return;
        fomoe_pool_relax(1);
    }
    atomic_fetch_add(&pool->sleepers, 1);
    for (;;) {
        int epoch = atomic_load(&pool->epoch);
        if (tasks_left(atomic_load(&pool->ticket)) > 0 || atomic_load(&pool->stop))
            break;
        syscall(SYS_futex, &pool->epoch, FUTEX_WAIT_PRIVATE, epoch, NULL, NULL, 0);
    }
    atomic_fetch_sub(&pool->sleepers, 1);
}

static void *worker(void *p)
{
    fomoe_pool *pool = ((worker_arg *)p)->pool;
    int thread = ((worker_arg *)p)->thread;
    free(p);
    while (!atomic_load(&pool->stop)) {
        wait_for_tasks(pool);
        work(pool, thread);
    }
    return NULL;
}

static void wake(fomoe_pool *pool)
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
    wake(pool);
    for (int i = 1; i < pool->num_threads; i++)
        pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool);
}

int fomoe_pool_num_threads(const fomoe_pool *pool)
{
    return pool->num_threads;
}

void fomoe_pool_start(fomoe_pool *pool, int num_tasks, fomoe_task_fn fn, void *arg)
{
    fomoe_pool_finish(pool);
    if (pool->num_threads == 1 || num_tasks <= 1) {
        for (int i = 0; i < num_tasks; i++)
            fn(arg, i, 0);
        return;
    }
    assert((uint32_t)num_tasks <= TASK_MASK);
    atomic_store_explicit(&pool->fn, fn, memory_order_relaxed);
    atomic_store_explicit(&pool->arg, arg, memory_order_relaxed);
    atomic_store_explicit(&pool->unfinished, num_tasks, memory_order_relaxed);
    uint64_t run = (atomic_load_explicit(&pool->ticket, memory_order_relaxed) >> 2 * TASK_BITS) + 1;
    atomic_store(&pool->ticket, run << 2 * TASK_BITS | (uint64_t)num_tasks << TASK_BITS);
    wake(pool);
}

void fomoe_pool_finish(fomoe_pool *pool)
{
    if (fomoe_pool_idle(pool))
        return;
    work(pool, 0);
    for (int i = 1; !fomoe_pool_idle(pool); i++)
        fomoe_pool_relax(i);
}

int fomoe_pool_idle(const fomoe_pool *pool)
{
    return !atomic_load_explicit(&pool->unfinished, memory_order_acquire);
}

void fomoe_pool_run(fomoe_pool *pool, int num_tasks, fomoe_task_fn fn, void *arg)
{
    fomoe_pool_start(pool, num_tasks, fn, arg);
    fomoe_pool_finish(pool);
}
