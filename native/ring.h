/* Reading by io_uring.
 *
 * Owns: the ring, its registered files and the table of registered memory. Does not know: what a piece is part of.
 * One ring carries both lanes: one thread reaps, always to the end, so that a second ring would not let
 * a demand completion pass earlier background ones; it would pin the arena twice.
 */
#ifndef FOMOE_RING_H
#define FOMOE_RING_H

#include "reader.h"

/* A reader of these files. `event_fd` (non-blocking, the caller's) becomes readable when there is something to
 * reap. Used by the opening thread only. -ENOSYS, -EPERM or -ENOMEM where the system refuses io_uring. */
int fomoe_ring_open(const int *fds, int num_files, int event_fd, const fomoe_read_options *options,
                    fomoe_reader **reader);
/* 1 when the kernel holds the files, 0 when it looks them up for each read. */
int fomoe_ring_files_registered(const fomoe_reader *reader);

#endif
