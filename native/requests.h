/* Requests, and the pieces they are cut into as there is room in flight.
 *
 * Owns: the order of pieces, short reads, retries, when a request has landed. Does not know: threads, the
 * kernel, Python; reader.c holds the lock for every function here.
 */
#ifndef FOMOE_REQUESTS_H
#define FOMOE_REQUESTS_H

#include "reader.h"

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

void fomoe_requests_append(fomoe_request_list *list, fomoe_request *q);
void fomoe_requests_unlink(fomoe_request_list *list, fomoe_request *q);

/* Put new requests at the end of a lane; the ids are their addresses. As fomoe_reader_submit. */
int fomoe_requests_add(fomoe_reader *r, int lane, const fomoe_extent *extents, const int32_t *counts,
                       int num_requests, int64_t *ids);
/* Cut nothing more from it. */
void fomoe_request_stop_waiting(fomoe_reader *r, fomoe_request *q);
/* Put it among the landed when nothing of it is to be cut or in flight. */
void fomoe_request_land_when_complete(fomoe_reader *r, fomoe_request *q);

#endif
