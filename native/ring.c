#include "ring.h"

#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_REGIONS 16384           /* the kernel's limit */
#define MAX_REGION_BYTES (1LL << 30)    /* likewise */

typedef struct {
    int64_t begin;
    int64_t end;
    int slot;
} region;

typedef struct {
    fomoe_reader base;
    struct io_uring ring;
    int *fds;
    int files_registered;
    int table_ready;        /* the sparse table of buffers exists */
    int num_regions;
    region *regions;        /* by address */
} ring;

static ring *of(const fomoe_reader *r)
{
    return (ring *)r;
}

/* The last region that begins at or before the address, or -1. */
static int find(const ring *g, int64_t address)
{
    int low = 0, high = g->num_regions;
    while (low < high) {
        int mid = (low + high) / 2;
        if (g->regions[mid].begin <= address)
            low = mid + 1;
        else
            high = mid;
    }
    return low - 1;
}

static int64_t ring_region_end(fomoe_reader *r, int64_t address)
{
    ring *g = of(r);
    int i = find(g, address);
    return i >= 0 && address < g->regions[i].end ? g->regions[i].end : INT64_MAX;
}

static void prepare(ring *g, struct io_uring_sqe *sqe, fomoe_piece *p)
{
    void *to = (void *)(intptr_t)(p->address + p->done);
    unsigned length = p->length - p->done;
    int fd = g->files_registered ? p->file : g->fds[p->file];
    int i = find(g, p->address);
    if (i >= 0 && p->address + p->length <= g->regions[i].end)
        io_uring_prep_read_fixed(sqe, fd, to, length, p->offset + p->done, g->regions[i].slot);
    else
        io_uring_prep_read(sqe, fd, to, length, p->offset + p->done);
    if (g->files_registered)
        sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, p);
}

/* Makes the loop call reap soon although nothing came back. */
static void ring_bell(ring *g)
{
    uint64_t one = 1;
    ssize_t ignored = write(g->base.event_fd, &one, sizeof one);
    (void)ignored;      /* a full counter is readable too */
}

static int ring_issue(fomoe_reader *r)
{
    ring *g = of(r);
    fomoe_piece *p;
    while (io_uring_sq_space_left(&g->ring) && (p = fomoe_reader_next(r)))
        prepare(g, io_uring_get_sqe(&g->ring), p);
    while (io_uring_sq_ready(&g->ring)) {
        int rc = io_uring_submit(&g->ring);
        if (rc == -EAGAIN || rc == -EBUSY || rc == 0) {
            ring_bell(g);       /* the kernel is short of memory for now: the entries stay queued */
            return 0;
        }
        if (rc < 0 && rc != -EINTR)
            return rc;
    }
    return 0;
}

static int ring_collect(fomoe_reader *r)
{
    ring *g = of(r);
    uint64_t bell;
    ssize_t ignored = read(r->event_fd, &bell, sizeof bell);
    (void)ignored;              /* not rung: collect what there is all the same */
    int rc = io_uring_get_events(&g->ring);
    if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY)
        return rc;
    struct io_uring_cqe *cqe;
    unsigned head, n = 0;
    io_uring_for_each_cqe(&g->ring, head, cqe) {
        fomoe_reader_finish(r, io_uring_cqe_get_data(cqe), cqe->res);
        n++;
    }
    io_uring_cq_advance(&g->ring, n);
    return 0;
}

static int ring_wait(fomoe_reader *r)
{
    struct io_uring_cqe *cqe;
    if (!fomoe_reader_num_in_flight(r))
        return 0;
    int rc = io_uring_wait_cqe(&of(r)->ring, &cqe);
    return rc == -EINTR ? 0 : rc;
}

static int add_region(ring *g, int64_t begin, int64_t end)
{
    if (g->num_regions == MAX_REGIONS)
        return -ENOSPC;
    region *grown = realloc(g->regions, (g->num_regions + 1) * sizeof *grown);
    if (!grown)
        return -ENOMEM;
    g->regions = grown;
    int slot = g->num_regions;
    struct iovec iov = { (void *)(intptr_t)begin, end - begin };
    __u64 tag = 0;
    int rc = io_uring_register_buffers_update_tag(&g->ring, slot, &iov, &tag, 1);
    if (rc < 0)
        return rc;
    int at = find(g, begin) + 1;
    memmove(&g->regions[at + 1], &g->regions[at], (g->num_regions - at) * sizeof *g->regions);
    g->regions[at] = (region){ begin, end, slot };
    g->num_regions++;
    return 0;
}

static int ring_register_memory(fomoe_reader *r, int64_t address, int64_t length)
{
    ring *g = of(r);
    if (!g->table_ready) {
        int rc = io_uring_register_buffers_sparse(&g->ring, MAX_REGIONS);
        if (rc < 0)
            return rc;
        g->table_ready = 1;
    }
    for (int64_t at = address; at < address + length; at += MAX_REGION_BYTES) {
        int64_t end = at + MAX_REGION_BYTES < address + length ? at + MAX_REGION_BYTES : address + length;
        int rc = add_region(g, at, end);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void ring_close(fomoe_reader *r)
{
    ring *g = of(r);
    io_uring_queue_exit(&g->ring);
    fomoe_reader_destroy(r);
    free(g->regions);
    free(g->fds);
    free(g);
}

static const fomoe_reader_ops RING_OPS = {
    .issue = ring_issue,
    .collect = ring_collect,
    .wait = ring_wait,
    .register_memory = ring_register_memory,
    .region_end = ring_region_end,
    .close = ring_close,
};

/* The best set of flags that this kernel has: deferred task work runs when we reap, and interrupts nobody. */
static int init_ring(struct io_uring *u, unsigned entries)
{
    static const unsigned FLAGS[] = {
        IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,  /* 6.1 */
        IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN,                                /* 5.19 */
        0,
    };
    int rc = -EINVAL;
    for (unsigned i = 0; i < sizeof FLAGS / sizeof *FLAGS && rc == -EINVAL; i++)
        rc = io_uring_queue_init(entries, u, FLAGS[i]);
    return rc;
}

int fomoe_ring_open(const int *fds, int num_files, int event_fd, const fomoe_read_options *options,
                    fomoe_reader **reader)
{
    ring *g = calloc(1, sizeof *g);
    int *copy = malloc(num_files * sizeof *fds);
    if (!g || !copy) {
        free(g);
        free(copy);
        return -ENOMEM;
    }
    memcpy(copy, fds, num_files * sizeof *fds);
    int rc = fomoe_reader_init(&g->base, &RING_OPS, event_fd, options);
    if (!rc && (rc = init_ring(&g->ring, options->depth[0] + options->depth[1])))
        fomoe_reader_destroy(&g->base);
    if (rc) {
        free(g);
        free(copy);
        return rc;
    }
    g->fds = copy;
    rc = io_uring_register_eventfd(&g->ring, event_fd);
    if (rc) {
        ring_close(&g->base);
        return rc;
    }
    g->files_registered = !io_uring_register_files(&g->ring, fds, num_files);
    *reader = &g->base;
    return 0;
}

int fomoe_ring_files_registered(const fomoe_reader *reader)
{
    return of(reader)->files_registered;
}
