"""One large mapping that reads land in and compute takes its weights from.

Owns: the mapping and who has which part of it. Does not know: readers, beyond asking whether they
are idle.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.io.reader import Reader
from fomoe.native import check, ffi, lib

HUGE_PAGE_BYTES = 2 << 20


class Arena:
    """At least `size_bytes` of private memory, in huge pages where the system has them.

    Pages are touched lazily: the first read into them pays for that (milliseconds for a slot)
    unless `populate` was there before. Parts are allocated once and never given back.
    """

    size: int
    used: int

    def __init__(self, size_bytes: int) -> None:
        assert size_bytes > 0
        self.size = -(-size_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self.used = 0
        self.address: int = check(lib.fomoe_memory_map(self.size), f"mapping {self.size} bytes")
        self._readers: list[Reader] = []

    def allocate(self, num_bytes: int, alignment: int = 4096) -> int:
        """The address of `num_bytes` bytes that nothing else has. `alignment` is a power of two."""
        assert self.address, "the arena is closed"
        assert num_bytes >= 0
        assert alignment > 0
        assert alignment & (alignment - 1) == 0
        begin = -(-self.used // alignment) * alignment
        if begin + num_bytes > self.size:
            raise MemoryError(
                f"the arena has {self.size - self.used} of {self.size} bytes left: "
                f"{num_bytes} do not fit"
            )
        self.used = begin + num_bytes
        return self.address + begin

    def view(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The bytes at `address` as an array on the same memory, not to be used after `close`."""
        assert self.address <= address
        assert address + num_bytes <= self.address + self.size
        return np.frombuffer(
            ffi.buffer(ffi.cast("char *", address), num_bytes), np.uint8, count=num_bytes
        )

    def populate(self, address: int, num_bytes: int) -> None:
        """Touch the pages now. Any thread may, while reads land too; the GIL is released."""
        assert self.address <= address
        assert address + num_bytes <= self.address + self.size
        begin = address // 4096 * 4096
        end = -(-(address + num_bytes) // 4096) * 4096
        check(lib.fomoe_memory_populate(begin, end - begin), f"touching {num_bytes} bytes")

    def attach(self, reader: Reader) -> None:
        """Note that `reader` reads into this memory: it must be idle before `close`."""
        self._readers.append(reader)

    def close(self) -> None:
        """Give the memory back to the system. Views and addresses are void."""
        assert all(reader.idle() for reader in self._readers), "reads may still land in the arena"
        if self.address:
            check(lib.fomoe_memory_unmap(self.address, self.size), "unmapping the arena")
            self.address = 0
