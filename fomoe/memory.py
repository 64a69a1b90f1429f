"""Making memory ready for reads: touched and registered with the kernel, piece by piece.

Owns: the order and the pace. Does not know: what the memory is for.

The first touch of a page costs many times what a read into a ready one does (on a virtual machine
0.5 GB/s against 2.5), and registering gigabytes at once would delay the first token by seconds. So
a thread touches what will be used next while earlier pieces are being read into.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fomoe.io.arena import Arena
from fomoe.io.reader import Reader
from fomoe.kernels.device import Device, Event

R = TypeVar("R")

_log = logging.getLogger(__name__)

_PIECE = 64 << 20


async def in_thread(call: Callable[..., R], *args: Any) -> R:
    """Run a call in a thread. A cancelled caller waits for it all the same: the thread works on
    memory that the caller is about to give back.
    """
    return await finish(asyncio.get_running_loop().run_in_executor(None, call, *args))


async def finish(future: asyncio.Future[R]) -> R:
    """Wait for a future to its end, however often the waiter is cancelled; then be cancelled."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return future.result()


async def reached(device: Device, event: Event) -> None:
    """Wait until an event of a device has been reached, however often the waiter is cancelled.
    Raises what went wrong on the device."""
    future = asyncio.get_running_loop().create_future()
    device.when(event, lambda: future.set_result(None))
    await finish(future)
    failure = device.failure()
    if failure is not None:
        raise failure


async def prepare(
    arena: Arena,
    reader: Reader,
    address: int,
    nbytes: int,
    pin: Callable[[int, int], None] | None = None,
) -> None:
    """Touch and register memory of the arena, and `pin` it. Reads may land in it meanwhile."""
    for begin in range(address, address + nbytes, _PIECE):
        length = min(_PIECE, address + nbytes - begin)
        await in_thread(arena.populate, begin, length)
        reader.register_memory(begin, length)
        if pin:
            await in_thread(pin, begin, length)


class Background:
    """Awaitables that run beside everything else until closed."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except OSError as error:
                _log.warning("%s: given up; everything works without, but slower", error)

        self._tasks.append(asyncio.create_task(run()))

    async def close(self) -> None:
        """Cancel what has not ended, and wait for it. Raises what an error of our own ended."""
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
