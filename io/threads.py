"""Reading by a pool of threads in pread, where io_uring is not to be had.

Owns: the choice of the threads. Does not know: pieces (native/reader.c), the threads themselves
(native/preads.c).
"""

from __future__ import annotations

import asyncio

from fomoe.io.files import Files
from fomoe.io.queued import QueuedReader, ReadOptions
from fomoe.native import lib


class ThreadReader(QueuedReader):
    """A Reader over as many threads as pieces may be in flight."""

    name = "threads"

    def __init__(
        self,
        files: Files,
        loop: asyncio.AbstractEventLoop,
        options: ReadOptions | None = None,
        why: str = "",
    ) -> None:
        """Takes over `files`, but when threads cannot be had (OSError). `why`: not io_uring."""
        self._why = why
        super().__init__(files, lib.fomoe_preads_open, options or ReadOptions(), loop)

    def describe(self) -> str:
        threads = self.options.depth + self.options.background_depth
        why = f" ({self._why})" if self._why else ""
        return f"{super().describe()}, {threads} threads{why}"
