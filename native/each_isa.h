/* Compiles the header named by ISA_BODY once per instruction set.
 *
 * A .c file defines ISA_BODY, the header with its inner code written in vec.h's operations, and includes this: a function
 * `f` declared there as ISA(f) exists as f_scalar, f_avx2 and f_avx512 afterwards, and ISA_PICK(f) is the one to call.
 * The target is switched on around each inclusion, so no compiler flags are needed.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "half.h"
#include "matmul.h"

#define ISA_JOIN_(name, suffix) name##suffix
#define ISA_JOIN(name, suffix) ISA_JOIN_(name, suffix)
#define ISA(name) ISA_JOIN(name, ISA_SUFFIX)

#define ISA_SUFFIX _scalar
#define ISA_LEVEL 0
#include "vec.h"
#include ISA_BODY
#undef ISA_SUFFIX
#undef ISA_LEVEL

#if defined(__x86_64__)

#define ISA_SUFFIX _avx2
#define ISA_LEVEL 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "vec.h"
#include ISA_BODY
#pragma GCC pop_options
#undef ISA_SUFFIX
#undef ISA_LEVEL

#define ISA_SUFFIX _avx512
#define ISA_LEVEL 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "vec.h"
#include ISA_BODY
#pragma GCC pop_options
#undef ISA_SUFFIX
#undef ISA_LEVEL

#define ISA_PICK(f)                                                                                                    \
    (fomoe_isa_get() >= FOMOE_ISA_AVX512 ? f##_avx512 : fomoe_isa_get() == FOMOE_ISA_AVX2 ? f##_avx2 : f##_scalar)
#else
#define ISA_PICK(f) f##_scalar
#endif
