"""Copies of experts between the host's memory and a device's slots.

Owns: how they are queued, counted and recorded. Does not know: who is copied, and why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fomoe.experts.device_layout import DeviceLayout
from fomoe.experts.layer import Resident
from fomoe.kernels.device import Device, Event
from fomoe.trace import Tracer
from fomoe.trace_format import Kind

Sources = Callable[[Sequence[Resident]], None]


@dataclass(slots=True)
class TierStats:
    """Counters since the tier was made; picks and uses as in ExpertStore's."""

    picks: int = 0
    pick_hits: int = 0
    uses: int = 0
    hits: int = 0
    staged_hits: int = 0  # uses of experts that were being copied ahead
    copied: int = 0  # experts copied to the device
    copied_ahead: int = 0
    copied_bytes: int = 0
    lowered: int = 0  # experts copied back to the host's memory
    host_uses: int = 0  # uses that the processor computed


class DeviceCopies:
    """`number`: the device's, for recordings."""

    def __init__(
        self, device: Device, stats: TierStats, number: int = 0, tracer: Tracer | None = None
    ) -> None:
        self._device, self._stats = device, stats
        self._number, self._tracer = number, tracer

    def up(
        self,
        layer: int,
        layout: DeviceLayout,
        pairs: Sequence[tuple[Resident, int]],
        copied: Sources,
        *,
        ahead: bool = False,
    ) -> Event:
        """Queue copies of experts in host memory into slots; returns the event after them.
        `copied` is called once their host memory may be reused."""
        uploads, experts = self._device.uploads, [expert for expert, _ in pairs]
        begin = time.perf_counter_ns()
        for expert, slot in pairs:
            for target, source, nbytes in layout.copies(expert, slot):
                uploads.copy(target, source, nbytes)
        event = uploads.record()
        self._stats.copied += len(experts)
        self._stats.copied_bytes += len(experts) * layout.expert_bytes

        def done() -> None:
            self._note(layer, layout.expert_bytes, experts, begin, ahead)
            copied(experts)

        self._device.when(event, done)
        return event

    def down(
        self,
        layout: DeviceLayout,
        slot: int,
        room: Resident,
        after: Event,
        copied: Callable[[], None],
    ) -> Event:
        """Queue the copy of a slot's expert to `room` in host memory, after an event before which
        it may not have arrived; returns the event after which the slot may be written to. `copied`
        is called once the bytes are there."""
        downloads = self._device.downloads
        downloads.wait(after)
        for source, target, nbytes in layout.copies(room, slot):
            downloads.copy(target, source, nbytes)
        event = downloads.record()
        self._device.when(event, copied)
        self._stats.lowered += 1
        return event

    def _note(
        self, layer: int, nbytes: int, experts: Sequence[Resident], begin: int, ahead: bool
    ) -> None:
        if self._tracer is None:
            return
        end = time.perf_counter_ns()
        for expert in experts:
            self._tracer.event(
                Kind.COPY, begin, end, layer, expert[0], a=nbytes, b=2 * self._number + ahead
            )
