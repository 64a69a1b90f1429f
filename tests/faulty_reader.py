"""A reader for tests that lands requests late, out of order, and sometimes not at all."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from fomoe.io.reader import Priority, Reader, ReaderStats, ReadRequest


class FaultyReader:
    """Passes requests to `reader`, and their landings back after a random delay of at most
    `max_delay_s`; those that `fails` are reported as EIO although their bytes came."""

    def __init__(
        self,
        reader: Reader,
        seed: int,
        max_delay_s: float = 0.002,
        fails: Callable[[ReadRequest], bool] = lambda request: False,
    ) -> None:
        self.name = reader.name
        self.direct = reader.direct
        self.alignment = reader.alignment
        self._reader = reader
        self._rng = random.Random(seed)
        self._max_delay_s = max_delay_s
        self._fails = fails
        self._inner: dict[ReadRequest, ReadRequest] = {}
        self._empty: asyncio.Event | None = None

    @property
    def stats(self) -> ReaderStats:
        return self._reader.stats

    def describe(self) -> str:
        return f"faulty {self._reader.describe()}"

    def register_memory(self, address: int, length: int) -> bool:
        return self._reader.register_memory(address, length)

    def submit(self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND) -> None:
        inner = []
        for request in requests:
            self._inner[request] = replace(request, done=partial(self._late, request))
            inner.append(self._inner[request])
        self._reader.submit(inner, priority)
        for request in requests:
            if request in self._inner:
                request.queued_ns = self._inner[request].queued_ns

    def _late(self, request: ReadRequest, landed: ReadRequest) -> None:
        if landed.cancelled:
            self._done(request, landed)
            return
        delay = self._rng.random() * self._max_delay_s
        asyncio.get_running_loop().call_later(delay, self._done, request, landed)

    def _done(self, request: ReadRequest, landed: ReadRequest) -> None:
        del self._inner[request]
        request.error = landed.error
        if self._fails(request):
            request.error = OSError(errno.EIO, f"injected for {request.what}")
        request.cancelled = landed.cancelled
        request.submitted_ns = landed.submitted_ns
        request.landed_ns = landed.landed_ns
        request.done(request)
        if self._empty is not None and not self._inner:
            self._empty.set()

    def cancel(self, request: ReadRequest) -> bool:
        inner = self._inner.get(request)
        return inner is not None and self._reader.cancel(inner)

    def abandon(self, request: ReadRequest) -> None:
        inner = self._inner.get(request)
        if inner is not None:
            self._reader.abandon(inner)

    def promote(self, request: ReadRequest) -> None:
        inner = self._inner.get(request)
        if inner is not None:
            self._reader.promote(inner)

    def fileno(self) -> int:
        return self._reader.fileno()

    def land(self) -> None:
        self._reader.land()

    def idle(self) -> bool:
        return not self._inner and self._reader.idle()

    async def close(self) -> None:
        await self._reader.close()
        if self._inner:
            self._empty = asyncio.Event()
            await self._empty.wait()
