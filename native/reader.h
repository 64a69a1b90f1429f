/* Reads: requests of several extents, cut into pieces, in two lanes.
 *
 * Owns: what callers do with requests (requests.c owns their pieces), and the lock over them.
 * Does not know: how a piece reaches the drive (ring.c, preads.c), or what the bytes are.
 */
#ifndef FOMOE_READER_H
#define FOMOE_READER_H

#include <pthread.h>
#include <stdint.h>

enum { FOMOE_DEMAND = 0, FOMOE_BACKGROUND = 1, FOMOE_LANES = 2 };

/* `length` bytes at `offset` of file number `file` to memory at `address`; the first `needed` must exist. */
typedef struct {
    int64_t file;
    int64_t offset;
    int64_t length;
    int64_t address;
    int64_t needed;
} fomoe_extent;

/* A request that the kernel is done with. */
typedef struct {
    int64_t request;        /* what submit returned for it; not valid any more */
    int64_t error;          /* 0 or the errno of the first piece that failed for good */
    int64_t file;           /* where it failed */
    int64_t offset;
    int64_t submitted_ns;   /* CLOCK_MONOTONIC, first piece out */
    int64_t landed_ns;      /* last piece back */
} fomoe_landing;

typedef struct {
    int64_t bytes;          /* that the drive gave, wanted or not */
    int64_t retries;
    int64_t short_reads;
    int64_t in_flight_bytes;
} fomoe_read_counts;

typedef struct {
    int64_t alignment;                  /* of offset, length and address; 1 when not direct */
    int64_t read_bytes[FOMOE_LANES];    /* largest piece; a multiple of the alignment, below 2^30 */
    int32_t depth[FOMOE_LANES];         /* pieces in flight */
    int32_t tries;                      /* of a piece before its error counts */
} fomoe_read_options;

typedef struct fomoe_reader fomoe_reader;
typedef struct fomoe_request fomoe_request;

typedef struct fomoe_piece {
    struct fomoe_piece *next;
    fomoe_request *request;
    int64_t offset;
    int64_t address;
    int32_t file;
    int32_t length;
    int32_t needed;
    int32_t done;       /* bytes landed; a multiple of the alignment while the piece is not finished */
    int32_t tries;
    int32_t lane;       /* whose depth it counts against */
} fomoe_piece;

/* What a way of reading adds. `issue` sends out what fomoe_reader_next gives, `collect` hands what came
 * back to fomoe_reader_finish, `wait` blocks until something came back or nothing is out. Called unlocked. */
typedef struct {
    int (*issue)(fomoe_reader *reader);
    int (*collect)(fomoe_reader *reader);
    int (*wait)(fomoe_reader *reader);
    int (*register_memory)(fomoe_reader *reader, int64_t address, int64_t length);
    /* The registered region's end when `address` lies in one, else INT64_MAX: no piece straddles it. */
    int64_t (*region_end)(fomoe_reader *reader, int64_t address);
    void (*close)(fomoe_reader *reader);
} fomoe_reader_ops;

typedef struct {
    fomoe_request *head;
    fomoe_request *tail;
} fomoe_request_list;

struct fomoe_reader {
    const fomoe_reader_ops *ops;
    pthread_mutex_t lock;           /* over everything below; only preads.c has other threads */
    int event_fd;                   /* the caller's; written when there may be something to reap */
    fomoe_read_options options;
    fomoe_request_list waiting[FOMOE_LANES];    /* requests with something left to cut */
    fomoe_request_list landed;
    fomoe_piece *again;             /* short and failed pieces, to go out before anything else */
    fomoe_piece *free;
    fomoe_piece *pieces;
    int32_t in_flight[FOMOE_LANES];
    fomoe_read_counts counts;
};

/* Queue requests, request i having counts[i] of the extents, and issue what fits. Writes an id for each.
 * -EINVAL, and nothing queued, when one breaks the alignment or needs more than its length. */
int fomoe_reader_submit(fomoe_reader *reader, int lane, const fomoe_extent *extents, const int32_t *counts,
                        int num_requests, int64_t *ids);
/* Collect what came back and write up to `max` landings. Their number, or -errno. To be followed by an issue, which the
 * landings need not wait for: to send 16 pieces takes 50 to 150 us. */
int fomoe_reader_reap(fomoe_reader *reader, fomoe_landing *landings, int max);
/* Send what fits. */
int fomoe_reader_issue(fomoe_reader *reader);
/* 1 when the request had not started and is gone now, 0 when it runs to its end. */
int fomoe_reader_cancel(fomoe_reader *reader, int64_t id);
/* Read nothing more of a request: it lands with ECANCELED once its pieces in flight are back, or whole when all of it
 * is in flight. 1 when it has landed by that, without a sign to the event descriptor. */
int fomoe_reader_abandon(fomoe_reader *reader, int64_t id);
/* Put what is left of a background request at the end of the demand lane. */
int fomoe_reader_promote(fomoe_reader *reader, int64_t id);
/* Cut nothing any more: what waits lands with ECANCELED once its pieces in flight are back. */
void fomoe_reader_stop(fomoe_reader *reader);
/* Block until nothing is in flight. */
int fomoe_reader_drain(fomoe_reader *reader);
int fomoe_reader_register(fomoe_reader *reader, int64_t address, int64_t length);
void fomoe_reader_counts(fomoe_reader *reader, fomoe_read_counts *counts);
/* Release everything; drained before. */
void fomoe_reader_close(fomoe_reader *reader);

/* For the ways of reading; next and finish are called with the lock held. */
int fomoe_reader_init(fomoe_reader *reader, const fomoe_reader_ops *ops, int event_fd,
                      const fomoe_read_options *options);
void fomoe_reader_destroy(fomoe_reader *reader);
fomoe_piece *fomoe_reader_next(fomoe_reader *reader);
/* `result` is bytes read or -errno. */
void fomoe_reader_finish(fomoe_reader *reader, fomoe_piece *piece, int64_t result);
int fomoe_reader_num_in_flight(const fomoe_reader *reader);

#endif
