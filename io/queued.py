"""What the ring and the read threads have in common: requests in, landings out, on the event loop.

Owns: the requests that are not done, their callbacks, the eventfd. Does not know: pieces
(native/reader.c cuts, orders, continues and retries them), or how they reach the drive.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fomoe.errors import ClosedError
from fomoe.io.files import Files
from fomoe.io.reader import Priority, ReaderStats, ReadRequest
from fomoe.native import check, ffi, lib

_EXTENT = struct.Struct("=5q")  # fomoe_extent
_LANDING = struct.Struct("=6q")  # fomoe_landing
_LANDINGS_A_CALL = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How requests are cut and how much is in flight. Bytes are multiples of the alignment.

    Defaults: 8 to 16 MB in flight reach full rate on every drive measured, more only delays; what
    is in flight of background work is all that can delay a demand read, hence 4 MiB of it where
    the drive's rate is not known.
    """

    read_bytes: int = 1 << 20
    depth: int = 16
    background_read_bytes: int = 1 << 20
    background_depth: int = 4
    tries: int = 4  # of a piece that fails with EIO, ETIMEDOUT or EAGAIN


class QueuedReader:
    """A Reader over native/reader.c's queue of pieces, made and used on the event loop's thread."""

    name: str

    def __init__(
        self,
        files: Files,
        open_native: Callable[..., int],
        options: ReadOptions,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Takes over `files`. OSError when the system refuses this way of reading."""
        self.files = files
        self.direct = files.direct
        self.alignment = files.alignment
        self.options = options
        self._stats = ReaderStats()
        self.registered_bytes = 0
        self._why_unregistered = ""
        self._loop = loop
        self._requests: dict[int, ReadRequest] = {}  # by the id that C gave
        self._ids: dict[ReadRequest, int] = {}
        self._idle: asyncio.Future[None] | None = None  # close() waits for it
        self._closing = False
        self._landings = ffi.new("fomoe_landing[]", _LANDINGS_A_CALL)
        self._landings_buffer = ffi.buffer(self._landings)
        self._counts = ffi.new("fomoe_read_counts *")
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._reader = self._open(open_native)
        except OSError:
            os.close(self._event_fd)
            raise
        loop.add_reader(self._event_fd, self.land)

    def _open(self, open_native: Callable[..., int]) -> Any:
        limit = 1 << 30
        for size in (self.options.read_bytes, self.options.background_read_bytes):
            assert 0 < size < limit
            assert size % self.alignment == 0
        assert self.options.depth > 0
        assert self.options.background_depth > 0
        native_options = {
            "alignment": self.alignment,
            "read_bytes": [self.options.read_bytes, self.options.background_read_bytes],
            "depth": [self.options.depth, self.options.background_depth],
            "tries": self.options.tries,
        }
        reader = ffi.new("fomoe_reader **")
        check(
            open_native(
                list(self.files.descriptors),
                len(self.files.descriptors),
                self._event_fd,
                ffi.new("fomoe_read_options *", native_options),
                reader,
            ),
            self.name,
        )
        return reader[0]

    @property
    def stats(self) -> ReaderStats:
        """As Reader.stats."""
        stats, counts = self._stats, self._counts
        if self._reader is not None:
            lib.fomoe_reader_counts(self._reader, counts)
        stats.bytes = counts.bytes
        stats.retries = counts.retries
        stats.short_reads = counts.short_reads
        stats.in_flight_bytes = counts.in_flight_bytes
        return stats

    def describe(self) -> str:
        """One line for people: what was chosen, and why not better."""
        return f"{self.name}, {self.files.describe()}"

    def register_memory(self, address: int, length: int) -> bool:
        assert not self._closing
        result: int = lib.fomoe_reader_register(self._reader, address, length)
        if result == 0:
            self.registered_bytes += length
            return True
        self._why_unregistered = (
            "RLIMIT_MEMLOCK" if result == -errno.ENOMEM else os.strerror(-result)
        )
        return False

    def submit(self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND) -> None:
        if self._closing:
            raise ClosedError("the reader is closed")
        if not requests:
            return
        counts = [len(request.extents) for request in requests]
        extents = bytearray(sum(counts) * _EXTENT.size)
        at = 0
        for request in requests:
            for extent in request.extents:
                _EXTENT.pack_into(extents, at, *extent)
                at += _EXTENT.size
        ids = ffi.new("int64_t[]", len(requests))
        now = time.perf_counter_ns()
        result: int = lib.fomoe_reader_submit(
            self._reader,
            priority,
            ffi.cast("fomoe_extent *", ffi.from_buffer(extents)),
            counts,
            len(requests),
            ids,
        )
        assert result != -errno.EINVAL, (
            "an extent breaks the alignment or needs more than its length"
        )
        for request, ident in zip(requests, ffi.unpack(ids, len(requests)), strict=True):
            request.queued_ns = now
            self._requests[ident] = request
            self._ids[request] = ident
        check(result, f"{self.name}: submitting reads")

    def cancel(self, request: ReadRequest) -> bool:
        """As Reader.cancel; `done` is called before this returns True."""
        ident = self._ids.get(request)
        if ident is None:
            return False
        if check(lib.fomoe_reader_cancel(self._reader, ident), f"{self.name}: cancelling") == 0:
            return False
        self._forget(ident)
        request.cancelled = True
        self._call_done(request)
        return True

    def abandon(self, request: ReadRequest) -> None:
        ident = self._ids.get(request)
        if ident is None or self.cancel(request):
            return
        if lib.fomoe_reader_abandon(self._reader, ident):
            self._loop.call_soon(self.land)

    def promote(self, request: ReadRequest) -> None:
        ident = self._ids.get(request)
        if ident is not None:
            check(lib.fomoe_reader_promote(self._reader, ident), f"{self.name}: promoting")

    def idle(self) -> bool:
        return not self._requests

    async def close(self) -> None:
        if self._reader is None:
            return
        self._closing = True
        lib.fomoe_reader_stop(self._reader)
        self.land()
        try:
            if self._requests:
                self._idle = self._idle or self._loop.create_future()
                await asyncio.shield(self._idle)
        finally:
            self.close_now()

    def close_now(self) -> None:
        """As `close`, without the loop's help: blocks until what is in flight has landed."""
        if self._reader is None:
            return
        self._closing = True
        lib.fomoe_reader_stop(self._reader)
        check(lib.fomoe_reader_drain(self._reader), f"{self.name}: waiting for reads to land")
        self.land()
        self._loop.remove_reader(self._event_fd)
        lib.fomoe_reader_counts(self._reader, self._counts)
        lib.fomoe_reader_close(self._reader)
        self._reader = None
        os.close(self._event_fd)
        self.files.close()

    def fileno(self) -> int:
        return self._event_fd

    def land(self) -> None:
        """Reap until nothing has landed that was not handed out, then send what fits: who has
        waited comes first."""
        while self._reader is not None:
            count = check(
                lib.fomoe_reader_reap(self._reader, self._landings, _LANDINGS_A_CALL),
                f"{self.name}: reaping reads",
            )
            # All out before the first callback: one that submits may get an id that is free now.
            landings = _LANDING.iter_unpack(self._landings_buffer[: count * _LANDING.size])
            for request in [self._land(*landing) for landing in landings]:
                self._call_done(request)
            if count < _LANDINGS_A_CALL:
                break
        if self._reader is not None:
            check(lib.fomoe_reader_issue(self._reader), f"{self.name}: sending reads")
        if self._idle is not None and not self._requests and not self._idle.done():
            self._idle.set_result(None)

    def _land(
        self, ident: int, error: int, file: int, offset: int, submitted_ns: int, landed_ns: int
    ) -> ReadRequest:
        request = self._forget(ident)
        request.submitted_ns = submitted_ns
        request.landed_ns = landed_ns
        if error == errno.ECANCELED:
            request.cancelled = True
        elif error:
            self._stats.errors += 1
            request.error = self._explain(request, error, file, offset)
        else:
            self._stats.reads += 1
        return request

    def _forget(self, ident: int) -> ReadRequest:
        request = self._requests.pop(ident)
        del self._ids[request]
        return request

    def _explain(self, request: ReadRequest, error: int, file: int, offset: int) -> OSError:
        path = self.files.paths[file]
        what = f" for {request.what}" if request.what else ""
        if error == errno.ENODATA:
            size = os.fstat(self.files.descriptors[file]).st_size
            cause = f"the file ends before the data does ({size} bytes)"
        else:
            cause = os.strerror(error)
        return OSError(error, f"reading at offset {offset}{what}: {cause}", path)

    def _call_done(self, request: ReadRequest) -> None:
        try:
            request.done(request)
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": f"the callback of a read failed: {request.what}", "exception": error}
            )
