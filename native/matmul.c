/* Which kernel runs: the processor's ISA, and the dispatch of matmul.h.
 *
 * Owns: detection and choice. Does not know: how any product is computed.
 */
#include "matmul.h"

#include <errno.h>
#include <stdatomic.h>

#include "matmul_kernels.h"

int fomoe_isa_best(void)
{
    return FOMOE_ISA_SCALAR;
}

/* The ISA in use, chosen once; -1 until someone asks. */
static _Atomic int current_isa = -1;

int fomoe_isa_get(void)
{
    int isa = atomic_load_explicit(&current_isa, memory_order_relaxed);
    if (isa < 0) {
        isa = fomoe_isa_best();
        atomic_store(&current_isa, isa);
    }
    return isa;
}

int fomoe_isa_set(int isa)
{
    if (isa < FOMOE_ISA_SCALAR || isa > fomoe_isa_best())
        return -ENOTSUP;
    atomic_store(&current_isa, isa);
    return 0;
}

void fomoe_matmul_rows(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                       int row_begin, int row_end, float *y, int64_t ldy)
{
    fomoe_rows_scalar(w, act, rows, num_rows, row_begin, row_end, y, ldy);
}
