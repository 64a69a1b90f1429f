"""Waiting for devices on the event loop.

Owns: being told of events. Does not know: what was queued.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from fomoe.kernels.device import Device, Event


class Signal:
    """Asked for before other work is queued, and before the event is waited for."""

    def __init__(self, device: Device, event: Event) -> None:
        self._device, self._event = device, event
        self._told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        device.when(event, self._tell)

    def _tell(self) -> None:
        if not self._told.done():
            self._told.set_result(None)

    async def told(self) -> None:
        """Wait until callbacks that were due before have been called, too."""
        await self._told

    async def reached(self) -> None:
        """Wait until the event has been reached; raises what went wrong on the device."""
        if not self._event.done():
            await self._told
        failure = self._device.failure()
        if failure is not None:
            raise failure


async def soon(device: Device, event: Event) -> None:
    """Wait for an event that is probably a fraction of a millisecond away: the loop asks every
    time that it comes round, for as long as the device says that this is quicker. As reached()
    otherwise."""
    end = time.perf_counter_ns() + device.poll_ns
    while not event.done():
        if time.perf_counter_ns() >= end:
            await Signal(device, event).reached()
            return
        await asyncio.sleep(0)
    failure = device.failure()
    if failure is not None:
        raise failure


async def drain(devices: Sequence[Device]) -> None:
    """All that these devices were given has been done, and who asked for it has been told. Raises
    what went wrong on one."""
    streams = [(d, s) for d in devices for s in (d.uploads, d.aside, d.compute, d.downloads)]
    signals = [Signal(device, stream.record()) for device, stream in streams]
    for signal in signals:
        await signal.told()
    for signal in signals:
        await signal.reached()
