/* AVX-512 products of one token.
 *
 * Owns: nothing but the choice by type. Does not know: how a product is computed (row_256.h, row_32.h).
 */
#if defined(__x86_64__)
#include "row_avx512.h"
#include "row_256.h"
#include "row_32.h"

fomoe_rows_fn fomoe_row_avx512(int type)
{
    fomoe_rows_fn row = row_of_type_256(type);
    return row ? row : row_of_type_32(type);
}
#endif
