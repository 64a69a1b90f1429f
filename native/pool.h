/* A pool of compute threads.
 *
 * Owns: the threads and how they wait (spin briefly, then sleep on a futex).
 * Does not know: what is computed.
 */
#ifndef FOMOE_POOL_H
#define FOMOE_POOL_H

typedef struct fomoe_pool fomoe_pool;

/* Called once per task; `thread` is 0 (the caller) .. num_threads-1. */
typedef void (*fomoe_task_fn)(void *arg, int task, int thread);

/* A pool of `num_threads` threads, the caller of run() being one of them. NULL when out of memory. */
fomoe_pool *fomoe_pool_create(int num_threads);
void fomoe_pool_destroy(fomoe_pool *pool);
int fomoe_pool_num_threads(const fomoe_pool *pool);

/* Runs fn(arg, 0..num_tasks-1, thread); tasks are claimed one by one, in order. Returns when all are done.
 * One caller at a time. */
void fomoe_pool_run(fomoe_pool *pool, int num_tasks, fomoe_task_fn fn, void *arg);

/* The same without waiting: the other threads compute while the caller goes on. The next fomoe_pool_run or _start, or
 * fomoe_pool_finish, helps with what is left and waits; `arg` must last until then. */
void fomoe_pool_start(fomoe_pool *pool, int num_tasks, fomoe_task_fn fn, void *arg);
void fomoe_pool_finish(fomoe_pool *pool);
/* Whether nothing is left of what was started. */
int fomoe_pool_idle(const fomoe_pool *pool);

/* What to do in round `i` of a loop that waits for another thread: pause, and now and then let others run. */
void fomoe_pool_relax(int i);

#endif
