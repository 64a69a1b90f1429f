"""Slots of one size in a device's memory: those that layers take, and those that go round.

Owns: the memory, and when a slot may be written to. Does not know: experts, who stays.

A *staging* slot that has been free for longest is filled next, while others are being consumed.
Half of them are enough for the misses of one layer, so one half fills while the other is computed.
A slot that goes back carries the event after which it may be written to, and the stream that writes
waits for that event itself.
"""

from __future__ import annotations

from collections import deque

from fomoe.kernels.device import Device, Event, Stream


class DeviceSlots:
    """`capacity` slots for layers to take, `free` while none has, and `staging` that go round."""

    def __init__(self, device: Device, slot_bytes: int, capacity: int, staging: int) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = capacity + staging
        self.half = staging // 2
        base = device.allocate((capacity + staging) * slot_bytes)
        addresses = [base + i * slot_bytes for i in range(capacity + staging)]
        self.free = addresses[staging:]
        # Those free for longest first.
        self.ring: deque[tuple[int, Event | None]] = deque((a, None) for a in addresses[:staging])

    def give(self, slot: int, event: Event | None) -> None:
        """A slot joins those that go round; it may be written to after the event."""
        self.ring.append((slot, event))

    def next(self, stream: Stream) -> int:
        """A slot that the stream may write to from here on."""
        slot, event = self.ring.popleft()
        if event is not None and not event.done():
            stream.wait(event)
        return slot
