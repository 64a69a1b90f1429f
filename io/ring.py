"""Reading by io_uring.

Owns: the choice of the ring. Does not know: pieces (native/reader.c), system calls (native/ring.c).
"""

from __future__ import annotations

import asyncio

from fomoe.io.files import Files
from fomoe.io.queued import QueuedReader, ReadOptions
from fomoe.native import lib


class UringReader(QueuedReader):
    """A Reader over io_uring: no thread, no copy, one system call for a batch of reads."""

    name = "io_uring"

    def __init__(
        self, files: Files, loop: asyncio.AbstractEventLoop, options: ReadOptions | None = None
    ) -> None:
        """Takes over `files`, but when the system refuses a ring (OSError)."""
        super().__init__(files, lib.fomoe_ring_open, options or ReadOptions(), loop)
        self.files_registered = bool(lib.fomoe_ring_files_registered(self._reader))

    def describe(self) -> str:
        files = "yes" if self.files_registered else "no"
        memory = f"{self.registered_bytes >> 20} MiB so far" if self.registered_bytes else "no"
        if self._why_unregistered:
            memory += f" ({self._why_unregistered})"
        return f"{super().describe()}, files registered: {files}, memory registered: {memory}"
