#include "reader.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct fomoe_request {
    fomoe_request *prev;        /* in waiting[lane] while something is left to cut, then in landed */
    fomoe_request *next;
    int32_t lane;
    int32_t waiting;            /* 1 while in waiting[lane] */
    int32_t num_extents;
    int32_t extent;             /* where the next piece is cut */
    int64_t position;
    int32_t num_pieces;         /* in flight or to go out again */
    int32_t error;
    int64_t error_file;
    int64_t error_offset;
    int64_t submitted_ns;
    int64_t landed_ns;
    fomoe_extent extents[];
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void append(fomoe_request_list *list, fomoe_request *q)
{
    q->next = NULL;
    q->prev = list->tail;
    if (list->tail)
        list->tail->next = q;
    else
        list->head = q;
    list->tail = q;
}

static void unlink_from(fomoe_request_list *list, fomoe_request *q)
{
    if (q->prev)
        q->prev->next = q->next;
    else
        list->head = q->next;
    if (q->next)
        q->next->prev = q->prev;
    else
        list->tail = q->prev;
}

static void stop_waiting(fomoe_reader *r, fomoe_request *q)
{
    if (q->waiting)
        unlink_from(&r->waiting[q->lane], q);
    q->waiting = 0;
}

static void land_when_complete(fomoe_reader *r, fomoe_request *q)
{
    if (q->waiting || q->num_pieces)
        return;
    q->landed_ns = now_ns();
    append(&r->landed, q);
}

static int64_t round_up(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit * unit;
}

static int is_sound(const fomoe_reader *r, const fomoe_extent *e)
{
    int64_t a = r->options.alignment;
    return e->offset >= 0 && e->needed > 0 && e->needed <= e->length && e->offset % a == 0 &&
           e->length % a == 0 && e->address % a == 0;
}

static fomoe_request *make_request(fomoe_reader *r, int lane, const fomoe_extent *extents, int count)
{
    fomoe_request *q = malloc(sizeof *q + count * sizeof *extents);
    if (!q)
        return NULL;
    *q = (fomoe_request){ .lane = lane, .num_extents = count };
    for (int i = 0; i < count; i++) {
        q->extents[i] = extents[i];
        q->extents[i].length = round_up(extents[i].needed, r->options.alignment);   /* the rest is nobody's wish */
    }
    return q;
}

static int enqueue(fomoe_reader *r, int lane, const fomoe_extent *extents, const int32_t *counts,
                   int num_requests, int64_t *ids)
{
    int num_extents = 0;
    for (int i = 0; i < num_requests; i++) {
        if (counts[i] < 1)
            return -EINVAL;
        num_extents += counts[i];
    }
    for (int i = 0; i < num_extents; i++)
        if (!is_sound(r, &extents[i]))
            return -EINVAL;
    for (int i = 0; i < num_requests; i++) {
        fomoe_request *q = make_request(r, lane, extents, counts[i]);
        ids[i] = (int64_t)(intptr_t)q;
        if (!q) {
            while (i--)
                free((void *)(intptr_t)ids[i]);
            return -ENOMEM;
        }
        extents += counts[i];
    }
    for (int i = 0; i < num_requests; i++) {
        fomoe_request *q = (void *)(intptr_t)ids[i];
        append(&r->waiting[lane], q);
        q->waiting = 1;
    }
    return 0;
}

int fomoe_reader_submit(fomoe_reader *r, int lane, const fomoe_extent *extents, const int32_t *counts,
                        int num_requests, int64_t *ids)
{
    pthread_mutex_lock(&r->lock);
    int rc = enqueue(r, lane, extents, counts, num_requests, ids);
    pthread_mutex_unlock(&r->lock);
    return rc ? rc : r->ops->issue(r);
}

static fomoe_piece *cut(fomoe_reader *r, int lane)
{
    fomoe_request *q = r->waiting[lane].head;
    const fomoe_extent *e = &q->extents[q->extent];
    int64_t address = e->address + q->position;
    int64_t length = e->length - q->position;
    int64_t parts = (length + r->options.read_bytes[lane] - 1) / r->options.read_bytes[lane];
    if (parts > 1)      /* equal parts, of whole pages: a small remainder costs as much as a piece */
        length = round_up(round_up(length, parts) / parts, r->options.alignment > 4096 ? r->options.alignment : 4096);
    if (r->ops->region_end) {
        int64_t in_region = r->ops->region_end(r, address) - address;
        if (in_region < length && in_region % r->options.alignment == 0)
            length = in_region;
    }
    int64_t needed = e->needed - q->position;

    fomoe_piece *p = r->free;
    r->free = p->next;
    *p = (fomoe_piece){ .request = q, .offset = e->offset + q->position, .address = address,
                        .file = e->file, .length = length, .needed = needed < length ? needed : length,
                        .lane = lane };
    q->num_pieces++;
    q->position += length;
    if (q->position == e->length) {
        q->position = 0;
        if (++q->extent == q->num_extents)
            stop_waiting(r, q);
    }
    return p;
}

/* Background work goes out only while no demand read waits or is in flight: what is in flight at the
 * moment a demand read arrives is all that can delay it, and that is capped by the lane's depth. */
static fomoe_piece *choose(fomoe_reader *r)
{
    if (r->in_flight[FOMOE_DEMAND] < r->options.depth[FOMOE_DEMAND]) {
        fomoe_piece *p = r->again;
        if (p) {
            r->again = p->next;
            p->lane = FOMOE_DEMAND;
            return p;
        }
        if (r->waiting[FOMOE_DEMAND].head)
            return cut(r, FOMOE_DEMAND);
    }
    if (r->in_flight[FOMOE_DEMAND] == 0 && r->in_flight[FOMOE_BACKGROUND] < r->options.depth[FOMOE_BACKGROUND] &&
        r->waiting[FOMOE_BACKGROUND].head)
        return cut(r, FOMOE_BACKGROUND);
    return NULL;
}

fomoe_piece *fomoe_reader_next(fomoe_reader *r)
{
    fomoe_piece *p = choose(r);
    if (!p)
        return NULL;
    if (!p->request->submitted_ns)
        p->request->submitted_ns = now_ns();
    r->in_flight[p->lane]++;
    r->counts.in_flight_bytes += p->length - p->done;
    return p;
}

/* 0 when the piece is whole, AGAIN when it must go out again, else the errno it failed with. */
enum { AGAIN = -1 };

static int judge(fomoe_reader *r, fomoe_piece *p, int64_t result)
{
    if (p->request->error)
        return p->request->error;
    if (result < 0) {
        int error = -result;
        if (error != EIO && error != ETIMEDOUT && error != EAGAIN && error != EINTR)
            return error;
        if (++p->tries >= r->options.tries)
            return error;
        r->counts.retries++;
        return AGAIN;
    }
    int64_t done = p->done + result;
    if (done >= p->needed)
        return 0;
    done -= done % r->options.alignment;    /* direct reads go on at a whole block */
    if (done <= p->done)
        return ENODATA;                     /* the file ends here */
    p->done = done;
    r->counts.short_reads++;
    return AGAIN;
}

void fomoe_reader_finish(fomoe_reader *r, fomoe_piece *p, int64_t result)
{
    fomoe_request *q = p->request;
    r->in_flight[p->lane]--;
    r->counts.in_flight_bytes -= p->length - p->done;
    int error = judge(r, p, result);
    if (error == AGAIN) {
        p->next = r->again;
        r->again = p;
        return;
    }
    if (!error) {
        r->counts.bytes += p->length;
    } else if (!q->error) {
        q->error = error;
        q->error_file = p->file;
        q->error_offset = p->offset + p->done;
        stop_waiting(r, q);
    }
    p->next = r->free;
    r->free = p;
    q->num_pieces--;
    land_when_complete(r, q);
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
        unlink_from(&r->landed, q);
        landings[n++] = (fomoe_landing){ (intptr_t)q, q->error, q->error_file, q->error_offset,
                                         q->submitted_ns, q->landed_ns };
        free(q);
    }
    pthread_mutex_unlock(&r->lock);
    return n;
}

int fomoe_reader_cancel(fomoe_reader *r, int64_t id)
{
    fomoe_request *q = (void *)(intptr_t)id;
    pthread_mutex_lock(&r->lock);
    int fresh = q->waiting && !q->submitted_ns;
    if (fresh) {
        stop_waiting(r, q);
        free(q);
    }
    pthread_mutex_unlock(&r->lock);
    int rc = fresh ? r->ops->issue(r) : 0;  /* background work may have waited for it */
    return rc < 0 ? rc : fresh;
}

int fomoe_reader_promote(fomoe_reader *r, int64_t id)
{
    fomoe_request *q = (void *)(intptr_t)id;
    pthread_mutex_lock(&r->lock);
    if (q->waiting && q->lane == FOMOE_BACKGROUND) {
        unlink_from(&r->waiting[FOMOE_BACKGROUND], q);
        append(&r->waiting[FOMOE_DEMAND], q);
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
            stop_waiting(r, q);
            land_when_complete(r, q);
        }
    pthread_mutex_unlock(&r->lock);
}

int fomoe_reader_num_in_flight(const fomoe_reader *r)
{
    return r->in_flight[FOMOE_DEMAND] + r->in_flight[FOMOE_BACKGROUND];
}

int fomoe_reader_drain(fomoe_reader *r)
{
    for (;;) {
        int rc = r->ops->collect(r);
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
        unlink_from(&r->landed, q);
        free(q);
    }
    free(r->pieces);
    pthread_mutex_destroy(&r->lock);
}
