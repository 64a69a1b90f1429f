#include "preads.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    fomoe_reader base;
    pthread_cond_t work;        /* there may be a piece to read */
    pthread_cond_t came_back;
    int stop;
    int num_threads;
    pthread_t *threads;
    int *fds;
} preads;

static preads *of(fomoe_reader *r)
{
    return (preads *)r;
}

static void read_one(preads *t, fomoe_piece *p)
{
    int fd = t->fds[p->file];
    int64_t offset = p->offset + p->done;
    void *to = (void *)(intptr_t)(p->address + p->done);
    size_t length = p->length - p->done;
    pthread_mutex_unlock(&t->base.lock);
    ssize_t n = pread(fd, to, length, offset);
    int64_t result = n < 0 ? -errno : n;
    pthread_mutex_lock(&t->base.lock);
    fomoe_reader_finish(&t->base, p, result);
}

static void *reader_thread(void *arg)
{
    preads *t = arg;
    pthread_mutex_lock(&t->base.lock);
    while (!t->stop) {
        fomoe_piece *p = fomoe_reader_next(&t->base);
        if (!p) {
            pthread_cond_wait(&t->work, &t->base.lock);
            continue;
        }
        read_one(t, p);
        pthread_cond_broadcast(&t->came_back);
        if (!t->base.in_flight[FOMOE_DEMAND])
            pthread_cond_broadcast(&t->work);       /* background work may go out now */
        if (t->base.landed.head) {
            uint64_t one = 1;
            ssize_t ignored = write(t->base.event_fd, &one, sizeof one);
            (void)ignored;      /* a full counter is readable too */
        }
    }
    pthread_mutex_unlock(&t->base.lock);
    return NULL;
}

static int preads_issue(fomoe_reader *r)
{
    pthread_mutex_lock(&r->lock);
    if (r->again || r->waiting[FOMOE_DEMAND].head || r->waiting[FOMOE_BACKGROUND].head)
        pthread_cond_broadcast(&of(r)->work);
    pthread_mutex_unlock(&r->lock);
    return 0;
}

static int preads_collect(fomoe_reader *r)
{
    uint64_t bell;
    ssize_t ignored = read(r->event_fd, &bell, sizeof bell);
    (void)ignored;              /* not rung: landings are taken all the same */
    return 0;
}

static int preads_wait(fomoe_reader *r)
{
    pthread_mutex_lock(&r->lock);
    while (fomoe_reader_num_in_flight(r) || r->again)
        pthread_cond_wait(&of(r)->came_back, &r->lock);
    pthread_mutex_unlock(&r->lock);
    return 0;
}

static void preads_close(fomoe_reader *r)
{
    preads *t = of(r);
    pthread_mutex_lock(&r->lock);
    t->stop = 1;
    pthread_cond_broadcast(&t->work);
    pthread_mutex_unlock(&r->lock);
    for (int i = 0; i < t->num_threads; i++)
        pthread_join(t->threads[i], NULL);
    pthread_cond_destroy(&t->work);
    pthread_cond_destroy(&t->came_back);
    fomoe_reader_destroy(r);
    free(t->threads);
    free(t->fds);
    free(t);
}

static const fomoe_reader_ops PREADS_OPS = {
    .issue = preads_issue,
    .collect = preads_collect,
    .wait = preads_wait,
    .close = preads_close,
};

/* Signals are for the threads of the program, not for these. */
static int start_threads(preads *t, int num_threads)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = 0;
    while (!rc && t->num_threads < num_threads) {
        rc = -pthread_create(&t->threads[t->num_threads], NULL, reader_thread, t);
        t->num_threads += !rc;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

int fomoe_preads_open(const int *fds, int num_files, int event_fd, const fomoe_read_options *options,
                      fomoe_reader **reader)
{
    int num_threads = options->depth[FOMOE_DEMAND] + options->depth[FOMOE_BACKGROUND];
    preads *t = calloc(1, sizeof *t);
    pthread_t *threads = calloc(num_threads, sizeof *threads);
    int *copy = malloc(num_files * sizeof *fds);
    if (!t || !threads || !copy || fomoe_reader_init(&t->base, &PREADS_OPS, event_fd, options)) {
        free(t);
        free(threads);
        free(copy);
        return -ENOMEM;
    }
    memcpy(copy, fds, num_files * sizeof *fds);
    t->fds = copy;
    t->threads = threads;
    pthread_cond_init(&t->work, NULL);
    pthread_cond_init(&t->came_back, NULL);
    int rc = start_threads(t, num_threads);
    if (rc) {
        preads_close(&t->base);
        return rc;
    }
    *reader = &t->base;
    return 0;
}
