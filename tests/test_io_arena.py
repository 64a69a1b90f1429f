"""The arena: where its parts lie, and what the system makes of it."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest

from fomoe.io.arena import HUGE_PAGE_BYTES, Arena


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_parts_do_not_overlap_and_are_aligned() -> None:
    arena = Arena(3_000_000)
    assert arena.size == 2 * HUGE_PAGE_BYTES
    assert arena.address % HUGE_PAGE_BYTES == 0
    parts = [(arena.allocate(size), size) for size in (1, 4095, 4096, 10_000)]
    odd = arena.allocate(100, alignment=64)
    assert odd % 64 == 0
    assert all(address % 4096 == 0 for address, _ in parts)
    for (address, size), (after, _) in itertools.pairwise(parts):
        assert address + size <= after
    assert odd + 100 <= arena.address + arena.used
    with pytest.raises(MemoryError, match="do not fit"):
        arena.allocate(arena.size)
    arena.close()
    arena.close()


def test_views_share_the_memory() -> None:
    arena = Arena(1)
    address = arena.allocate(1000)
    arena.view(address, 1000)[:] = np.arange(1000, dtype=np.uint8)
    assert arena.view(address + 10, 5).tolist() == [10, 11, 12, 13, 14]
    with pytest.raises(AssertionError):
        arena.view(arena.address + arena.size - 1, 2)
    arena.close()


def test_memory_is_touched_when_it_is_used() -> None:
    size = 256 << 20
    before = resident_bytes()
    arena = Arena(size)
    address = arena.allocate(size)
    assert resident_bytes() - before < size // 8
    thread = threading.Thread(target=arena.populate, args=(address + 100, 64 << 20))
    thread.start()
    thread.join()
    assert 60 << 20 < resident_bytes() - before < size // 2
    assert not arena.view(address, 1 << 20).any()
    arena.close()
    assert resident_bytes() - before < 32 << 20
