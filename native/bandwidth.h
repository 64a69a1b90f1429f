/* A plain read of memory, to know its bandwidth. */
#ifndef FOMOE_BANDWIDTH_H
#define FOMOE_BANDWIDTH_H

#include <stddef.h>
#include <stdint.h>

/* Reads `bytes` (8-byte aligned; a multiple of 64) and returns the sum of their words. */
uint64_t fomoe_bandwidth_read(const void *data, size_t bytes);

#endif
