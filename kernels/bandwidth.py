"""How fast the machine reads memory: the limit that generation is measured against.

Owns: the measurement. Does not know: what is read when it matters.
"""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor

from fomoe.native import ffi, lib

# Larger than the caches; every thread reads its own.
BYTES_PER_THREAD = 256 << 20
# Of less a good part might come from the caches.
LEAST_BYTES_PER_THREAD = 64 << 20
PASSES = 5


def measure_read_bandwidth(threads: int, bytes_per_thread: int = BYTES_PER_THREAD) -> float:
    """Bytes per second that this many threads read from memory together, the best of 5 passes."""
    total = threads * bytes_per_thread
    with (
        mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        ffi.from_buffer("char[]", memory) as base,
        ThreadPoolExecutor(threads) as pool,
    ):
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, total, mmap.PAGESIZE):
            memory[offset] = 1

        def read(thread: int) -> None:
            lib.fomoe_bandwidth_read(base + thread * bytes_per_thread, bytes_per_thread)

        best = float("inf")
        for _ in range(PASSES):
            begin = time.perf_counter()
            list(pool.map(read, range(threads)))
            best = min(best, time.perf_counter() - begin)
    return total / best
