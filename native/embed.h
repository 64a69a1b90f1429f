/* Token embeddings.
 *
 * Owns: dequantising rows of the embedding matrix as they were read from the file. Does not know: which tokens.
 */
#ifndef FOMOE_EMBED_H
#define FOMOE_EMBED_H

#include <stdint.h>

#include "pool.h"

/* rows [num_rows][row_bytes] of ggml type `type` -> out [num_rows][ldo], `cols` wide. 0, or -ENOTSUP for an unknown type. */
int fomoe_embed_rows(fomoe_pool *pool, int type, const void *rows, int64_t row_bytes, int num_rows, int cols, float *out,
                     int64_t ldo);

#endif
