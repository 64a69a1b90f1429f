/* Reading by a pool of threads, each in one pread at a time.
 *
 * Owns: the threads. Does not know: what a piece is part of. For systems that refuse io_uring.
 */
#ifndef FOMOE_PREADS_H
#define FOMOE_PREADS_H

#include "reader.h"

/* A reader of these files with a thread for each piece in flight. `event_fd` (non-blocking, the caller's) becomes
 * readable when there is something to reap. */
int fomoe_preads_open(const int *fds, int num_files, int event_fd, const fomoe_read_options *options,
                      fomoe_reader **reader);

#endif
