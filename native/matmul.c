/* Which kernel runs: the processor's ISA, and the dispatch of matmul.h.
 *
 * Owns: detection and choice. Does not know: how any product is computed.
 */
#include "matmul.h"

#include <errno.h>
#include <stdatomic.h>

#include "matmul_kernels.h"
#include "quant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

/* AMX int8, and the kernel's leave to use its registers: once a process, before threads that do. */
static int amx_is_permitted(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1))
        return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

int fomoe_isa_best(void)
{
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return FOMOE_ISA_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")
        || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")
        || !__builtin_cpu_supports("avx512vnni"))
        return FOMOE_ISA_AVX2;
    return amx_is_permitted() ? FOMOE_ISA_AMX : FOMOE_ISA_AVX512;
#else
    return FOMOE_ISA_SCALAR;
#endif
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

/* The kernel of a type on the ISA in use, for so many tokens. */
static fomoe_rows_fn kernel_of(int type, int num_rows)
{
#if defined(__x86_64__)
    int size = fomoe_type_block_size(type), isa = fomoe_isa_get();
    fomoe_rows_fn row = num_rows != 1 || isa < FOMOE_ISA_AVX2 ? 0
                        : isa >= FOMOE_ISA_AVX512 ? fomoe_row_avx512(type) : fomoe_row_avx2(type);
    if (row)
        return row;
    if (isa == FOMOE_ISA_AMX && size > 1)
        return size == 256 ? fomoe_rows_amx_256 : fomoe_rows_amx_32;
    if (isa >= FOMOE_ISA_AVX512)
        return size == 256 ? fomoe_rows_avx512_256(type)
             : size == 32 ? fomoe_rows_avx512_32(type) : fomoe_rows_avx512_float(type);
    if (isa >= FOMOE_ISA_AVX2)
        return size == 256 ? fomoe_rows_avx2_256(type)
             : size == 32 ? fomoe_rows_avx2_32(type) : fomoe_rows_avx2_float(type);
#endif
    (void)type;
    return fomoe_rows_scalar;
}

void fomoe_matmul_rows(const fomoe_matrix *w, const fomoe_act *act, const int32_t *rows, int num_rows,
                       int row_begin, int row_end, float *y, int64_t ldy)
{
    kernel_of(w->type, num_rows)(w, act, rows, num_rows, row_begin, row_end, y, ldy);
}
