#include "reader.h"
#include "requests.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int fomoe_reader_submit(fomoe_reader *r, int lane, const fomoe_extent *extents, const int32_t *counts,
                        int num_requests, int64_t *ids)
{
    pthread_mutex_lock(&r->lock);
    int rc = fomoe_requests_add(r, lane, extents, counts, num_requests, ids);
    pthread_mutex_unlock(&r->lock);
    return rc ? rc : r->ops->issue(r);
}

int fomoe_reader_reap(fomoe_reader *r, fomoe_landing *landings, int max)
{
    int rc = r->ops->collect(r);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&r->lock);
    int n = 0;
    while (n < max && r->landed.head) {
        fomoe_request *q = r->landed.head;
        fomoe_requests_unlink(&r->landed, q);
        landings[n++] = (fomoe_landing){ (intptr_t)q, q->error, q->error_file, q->error_offset,
                                         q->submitted_ns, q->landed_ns };
        free(q);
    }
    pthread_mutex_unlock(&r->lock);
    return n;
}

int fomoe_reader_issue(fomoe_reader *r)
{
    return r->ops->issue(r);
}

int fomoe_reader_cancel(fomoe_reader *r, int64_t id)
{
    fomoe_request *q = (void *)(intptr_t)id;
    pthread_mutex_lock(&r->lock);
    int fresh = q->waiting && !q->submitted_ns;
    if (fresh) {
        fomoe_request_stop_waiting(r, q);
        free(q);
    }
    pthread_mutex_unlock(&r->lock);
    int rc = fresh ? r->ops->issue(r) : 0;  /* background work may have waited for it */
    return rc < 0 ? rc : fresh;
}

int fomoe_reader_abandon(fomoe_reader *r, int64_t id)
{
    fomoe_request *q = (void *)(intptr_t)id;
    int landed = 0;
    pthread_mutex_lock(&r->lock);
    if (q->waiting) {
        q->error = ECANCELED;
        fomoe_request_stop_waiting(r, q);
        landed = !q->num_pieces;
        fomoe_request_land_when_complete(r, q);
    }
    pthread_mutex_unlock(&r->lock);
    return landed;
}

int fomoe_reader_promote(fomoe_reader *r, int64_t id)
{
    fomoe_request *q = (void *)(intptr_t)id;
    pthread_mutex_lock(&r->lock);
    if (q->waiting && q->lane == FOMOE_BACKGROUND) {
        fomoe_requests_unlink(&r->waiting[FOMOE_BACKGROUND], q);
        fomoe_requests_append(&r->waiting[FOMOE_DEMAND], q);
    }
    q->lane = FOMOE_DEMAND;
    pthread_mutex_unlock(&r->lock);
    return r->ops->issue(r);
}

void fomoe_reader_stop(fomoe_reader *r)
{
    pthread_mutex_lock(&r->lock);
    for (int lane = 0; lane < FOMOE_LANES; lane++)
        while (r->waiting[lane].head) {
            fomoe_request *q = r->waiting[lane].head;
            q->error = ECANCELED;
            fomoe_request_stop_waiting(r, q);
            fomoe_request_land_when_complete(r, q);
        }
    pthread_mutex_unlock(&r->lock);
}

int fomoe_reader_drain(fomoe_reader *r)
{
    for (;;) {
        int rc = r->ops->collect(r);
        if (rc >= 0)
            rc = r->ops->issue(r);
        pthread_mutex_lock(&r->lock);
        int busy = fomoe_reader_num_in_flight(r) || r->again;
        pthread_mutex_unlock(&r->lock);
        if (rc < 0 || !busy)
            return rc;
        rc = r->ops->wait(r);
        if (rc < 0)
            return rc;
    }
}

int fomoe_reader_register(fomoe_reader *r, int64_t address, int64_t length)
{
    return r->ops->register_memory ? r->ops->register_memory(r, address, length) : -EOPNOTSUPP;
}

void fomoe_reader_counts(fomoe_reader *r, fomoe_read_counts *counts)
{
    pthread_mutex_lock(&r->lock);
    *counts = r->counts;
    pthread_mutex_unlock(&r->lock);
}

void fomoe_reader_close(fomoe_reader *r)
{
    r->ops->close(r);
}

int fomoe_reader_init(fomoe_reader *r, const fomoe_reader_ops *ops, int event_fd,
                      const fomoe_read_options *options)
{
    memset(r, 0, sizeof *r);
    r->ops = ops;
    r->event_fd = event_fd;
    r->options = *options;
    /* A piece to go out again keeps its place and comes before any new one: the two depths are enough. */
    int n = options->depth[FOMOE_DEMAND] + options->depth[FOMOE_BACKGROUND];
    r->pieces = calloc(n, sizeof *r->pieces);
    if (!r->pieces)
        return -ENOMEM;
    for (int i = 0; i < n; i++) {
        r->pieces[i].next = r->free;
        r->free = &r->pieces[i];
    }
    pthread_mutex_init(&r->lock, NULL);
    return 0;
}

void fomoe_reader_destroy(fomoe_reader *r)
{
    while (r->landed.head) {
        fomoe_request *q = r->landed.head;
        fomoe_requests_unlink(&r->landed, q);
        free(q);
    }
    free(r->pieces);
    pthread_mutex_destroy(&r->lock);
}
