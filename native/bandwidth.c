/* What the memory itself gives: the ceiling that kernels are measured against.
 *
 * Owns: a plain read of memory. Does not know: what lies there.
 */
#include "bandwidth.h"

uint64_t fomoe_bandwidth_read(const void *data, size_t bytes)
{
    const uint64_t *p = data;
    uint64_t sum[8] = { 0 };
    for (size_t i = 0; i + 8 <= bytes / 8; i += 8)
        for (int j = 0; j < 8; j++)
            sum[j] += p[i + j];
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}
