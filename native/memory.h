/* Large memory and what the system says of a file, for io/.
 *
 * Owns: the system calls that Python lacks. Does not know: who uses the memory.
 */
#ifndef FOMOE_MEMORY_H
#define FOMOE_MEMORY_H

#include <stdint.h>

/* Zeroed private memory at a multiple of 2 MiB, in huge pages where the system has them, touched lazily and not
 * inherited by forked processes. `bytes` is a multiple of 2 MiB. The address, or -errno. */
int64_t fomoe_memory_map(int64_t bytes);
int fomoe_memory_unmap(int64_t address, int64_t bytes);

/* Touch the pages now. Any thread may. 0 or -errno. */
int fomoe_memory_populate(int64_t address, int64_t bytes);

/* What direct reads of the file must be aligned to, offset and memory alike; 0 when the system does not say,
 * -EOPNOTSUPP when the file allows none. */
int fomoe_file_alignment(int fd);

#endif
