"""What the rest of fomoe knows of reading: extents in, bytes in memory, a callback out.

Owns: the interface that the io_uring ring and the thread pool both implement. Does not know:
tensors, experts, asyncio tasks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Extent(NamedTuple):
    """`length` bytes at `offset` of file number `file`, to be put at memory `address`.

    With direct I/O all three of offset, length and address are multiples of the reader's alignment;
    the end may lie past the end of the file, up to `needed` bytes from the start must exist.
    """

    file: int
    offset: int
    length: int
    address: int
    needed: int


class Priority(enum.IntEnum):
    DEMAND = 0  # compute waits for it
    BACKGROUND = 1  # read-ahead, prefetch, backfill: cut small, capped in flight, yields to demand


@dataclass(slots=True, eq=False)
class ReadRequest:
    """Extents that complete as one (the slices of an expert).

    `done(request)` is called on the event loop's thread exactly once, when the kernel will not
    write to the memory any more: all extents landed (`error` is None), or one failed for good after
    its retries, or the request was cancelled before it started (`cancelled`). The memory belongs to
    the reader from submit until then. Times are of time.perf_counter_ns.
    """

    extents: Sequence[Extent]
    done: Callable[[ReadRequest], None]
    what: str = ""  # for messages: "layer 3 expert 17"
    error: OSError | None = None
    cancelled: bool = False
    queued_ns: int = 0
    submitted_ns: int = 0
    landed_ns: int = 0


@dataclass(slots=True)
class ReaderStats:
    """Counters since the reader was opened."""

    reads: int = 0  # requests that landed
    bytes: int = 0  # that the drive gave, abandoned requests included
    retries: int = 0
    short_reads: int = 0
    errors: int = 0
    in_flight_bytes: int = 0


class Reader(Protocol):
    """Reads from a fixed set of files into caller-owned memory. Methods are called on the event
    loop's thread only, the constructor included."""

    name: str  # "io_uring" or "threads"
    direct: bool
    alignment: int  # of offset, length and address when direct; 1 otherwise

    @property
    def stats(self) -> ReaderStats:
        """Counters as of now."""

    def describe(self) -> str:
        """One line for people: the way of reading that was chosen, and why not a better one."""

    def register_memory(self, address: int, length: int) -> bool:
        """Tell the kernel of memory that reads will land in (page pinning leaves the read path).
        False when it cannot (RLIMIT_MEMLOCK): reads work all the same."""

    def submit(self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND) -> None:
        """Queue requests; what fits in flight reaches the kernel in one call here."""

    def cancel(self, request: ReadRequest) -> bool:
        """Take back a request that has not started: `done` is called with cancelled set. False when
        it is in flight already: it then runs to its end."""

    def abandon(self, request: ReadRequest) -> None:
        """Nobody wants the request any more: what of it has not been sent to the drive is not read.
        `done` is called all the same, now or later: with `cancelled` set, or, when the whole was in
        flight, as for any that lands."""

    def promote(self, request: ReadRequest) -> None:
        """A background request is now waited for: move what is left of it to the demand queue."""

    def fileno(self) -> int:
        """A descriptor that is readable when something may have landed, for who cannot wait for
        the event loop's turn (see land)."""

    def land(self) -> None:
        """Call `done` of what has landed by now."""

    def idle(self) -> bool:
        """True when nothing is queued or in flight."""

    async def close(self) -> None:
        """Cancel what has not started, wait for the rest to land, release kernel resources. When it
        returns, no memory handed to the reader will be written to."""
