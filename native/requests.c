#include "requests.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void fomoe_requests_append(fomoe_request_list *list, fomoe_request *q)
{
    q->next = NULL;
    q->prev = list->tail;
    if (list->tail)
        list->tail->next = q;
    else
        list->head = q;
    list->tail = q;
}

void fomoe_requests_unlink(fomoe_request_list *list, fomoe_request *q)
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

void fomoe_request_stop_waiting(fomoe_reader *r, fomoe_request *q)
{
    if (q->waiting)
        fomoe_requests_unlink(&r->waiting[q->lane], q);
    q->waiting = 0;
}

void fomoe_request_land_when_complete(fomoe_reader *r, fomoe_request *q)
{
    if (q->waiting || q->num_pieces)
        return;
    q->landed_ns = now_ns();
    fomoe_requests_append(&r->landed, q);
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

int fomoe_requests_add(fomoe_reader *r, int lane, const fomoe_extent *extents, const int32_t *counts,
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
        fomoe_requests_append(&r->waiting[lane], q);
        q->waiting = 1;
    }
    return 0;
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
            fomoe_request_stop_waiting(r, q);
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
    if (result > 0 && error != AGAIN)
        r->counts.bytes += p->length;
    if (error == AGAIN) {
        p->next = r->again;
        r->again = p;
        return;
    }
    if (error && !q->error) {
        q->error = error;
        q->error_file = p->file;
        q->error_offset = p->offset + p->done;
        fomoe_request_stop_waiting(r, q);
    }
    p->next = r->free;
    r->free = p;
    q->num_pieces--;
    fomoe_request_land_when_complete(r, q);
}

int fomoe_reader_num_in_flight(const fomoe_reader *r)
{
    return r->in_flight[FOMOE_DEMAND] + r->in_flight[FOMOE_BACKGROUND];
}
