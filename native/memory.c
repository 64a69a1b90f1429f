#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define HUGE_PAGE (2LL << 20)

int64_t fomoe_memory_map(int64_t bytes)
{
    /* Python's mmap.mmap(-1, n) is a shared mapping, which gets no huge pages. */
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *p = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED)
        return -errno;
    int64_t before = (HUGE_PAGE - (intptr_t)p % HUGE_PAGE) % HUGE_PAGE;
    if (before)
        munmap(p, before);
    munmap(p + before + bytes, HUGE_PAGE - before);
    p += before;
    madvise(p, bytes, MADV_HUGEPAGE);   /* refused where huge pages are off: small ones do */
    /* Pages pinned for reads are copied at fork, all of them, before an exec could drop them again. */
    madvise(p, bytes, MADV_DONTFORK);
    return (intptr_t)p;
}

int fomoe_memory_unmap(int64_t address, int64_t bytes)
{
    return munmap((void *)(intptr_t)address, bytes) ? -errno : 0;
}

int fomoe_memory_populate(int64_t address, int64_t bytes)
{
#ifdef MADV_POPULATE_WRITE
    if (!madvise((void *)(intptr_t)address, bytes, MADV_POPULATE_WRITE))
        return 0;
    if (errno != EINVAL)
        return -errno;
#endif
    /* Before Linux 5.14. Another thread may be writing: add nothing, atomically, to a byte of each page. */
    for (int64_t at = address; at < address + bytes; at += 4096)
        __atomic_fetch_or((char *)(intptr_t)at, 0, __ATOMIC_RELAXED);
    return 0;
}

int fomoe_file_alignment(int fd)
{
#ifdef STATX_DIOALIGN
    struct statx st;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st))
        return errno == ENOSYS ? 0 : -errno;
    if (!(st.stx_mask & STATX_DIOALIGN))
        return 0;
    if (!st.stx_dio_offset_align)
        return -EOPNOTSUPP;
    return st.stx_dio_offset_align > st.stx_dio_mem_align ? st.stx_dio_offset_align : st.stx_dio_mem_align;
#else
    (void)fd;
    return 0;
#endif
}
