"""The experts in one device's memory, and those on their way there.

Owns: the slots of a device, the table by which its kernels find experts, and the promise that a
slot is never written to while a kernel or a copy may read it. Does not know: how it is decided who
stays (cache.py) or what is worth a copy (placement.py), what is computed. All methods run on the
event loop's thread, and none waits for the device.

A slot holds a resident expert, or it is one of the *staging* slots, which go round: those that have
been free for longest are filled next, while the others are being consumed. Half of them are enough
for the misses of one layer, so one half fills while the other is computed. A slot that goes back
carries the event after which it may be written to, and the stream of copies waits for that event
itself. An expert that comes to stay keeps the slot it was copied into, and the slot of the one that
leaves for it becomes a staging slot: nothing is copied twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.experts.cache import Below, BoolArray, ExpertCache, Policy
from fomoe.experts.device_layout import DeviceLayout
from fomoe.experts.layer import Resident
from fomoe.kernels.device import Device, Event
from fomoe.kernels.ops import A
from fomoe.trace import Kind, Tracer

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
    host_uses: int = 0  # uses that the processor computed


class DeviceSlots:
    """Slots of one size: `capacity` for layers to take, and `staging` that go round."""

    def __init__(self, device: Device, slot_bytes: int, capacity: int, staging: int) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = capacity + staging
        self.half = staging // 2
        base = device.allocate((capacity + staging) * slot_bytes)
        addresses = [base + i * slot_bytes for i in range(capacity + staging)]
        self.free = addresses[staging:]
        # With the event after which each may be written to, those free for longest first.
        self.ring: deque[tuple[int, Event | None]] = deque((a, None) for a in addresses[:staging])


@dataclass(slots=True, eq=False)
class _Layer:
    layout: DeviceLayout
    cache: ExpertCache
    slots: DeviceSlots
    table: A  # int64 [experts, 3] in device memory
    mirror: npt.NDArray[Any]  # what the table will be once what is queued has been done
    arriving: dict[int, tuple[int, Event]] = field(default_factory=dict)  # to stay: slot, copied
    ahead: dict[int, tuple[int, Event]] = field(default_factory=dict)  # for the next step only
    changed: bool = False


class DeviceTier:
    """`layouts`, `caches` and `slots`: of the layers that the device computes, by layer. Layers
    whose experts have one size share slots; a cache's capacity is what a layer may take of them.
    `number`: the device's, for recordings."""

    def __init__(
        self,
        device: Device,
        layouts: Mapping[int, DeviceLayout],
        caches: Mapping[int, ExpertCache],
        slots: Mapping[int, DeviceSlots],
        *,
        number: int = 0,
        tracer: Tracer | None = None,
    ) -> None:
        self.device = device
        self._number, self._tracer = number, tracer
        self.stats = TierStats()
        self._layers = {
            i: _Layer(
                layouts[i],
                cache,
                slots[i],
                device.array((cache.num_experts, 3), np.int64),
                device.host_array((cache.num_experts, 3), np.int64),
            )
            for i, cache in caches.items()
        }

    def policy_below(self, layer: int) -> Policy:
        """The policy by which the host's tier of a layer decides: what is here leaves there."""
        cache = self._layers[layer].cache
        return Below(cache.policy, cache.resident)

    def table(self, layer: int) -> A | None:
        """The layer's table, or None while nothing is in it."""
        state = self._layers[layer]
        return state.table if len(state.cache) > len(state.arriving) else None

    def resident(self, layer: int) -> BoolArray:
        """Experts that the device holds or will hold when the layer's turn comes, bool [experts].
        Not to be written to."""
        return self._layers[layer].cache.resident

    def holds(self, layer: int, expert: int) -> bool:
        """The layer's next step need not bring the expert."""
        state = self._layers[layer]
        return bool(state.cache.resident[expert]) or expert in state.ahead

    def tick(self, layer: int, clock: int) -> None:
        """The policy, which the host's tier shares, was told of uses at this time."""
        self._layers[layer].cache.tick(clock)

    def begin(self, layer: int) -> None:
        """A layer's turn has come: what was copied since its last one becomes part of its table."""
        state = self._layers[layer]
        for expert, (slot, copied) in state.arriving.items():
            self.device.compute.wait(copied)
            self._enter(state, expert, slot)
        state.arriving.clear()
        self._publish(state)

    def missing(self, layer: int, counts: Mapping[int, int]) -> list[int]:
        """Of the experts that a step needs, by their tokens, those that are not in the table."""
        resident = self._layers[layer].cache.resident
        missing = [e for e in counts if not resident[e]]
        stats, picks = self.stats, sum(counts.values())
        stats.uses += len(counts)
        stats.hits += len(counts) - len(missing)
        stats.picks += picks
        stats.pick_hits += picks - sum(counts[e] for e in missing)
        return missing

    def take_ahead(self, layer: int, experts: Iterable[int]) -> list[Resident]:
        """Those of `experts` that were copied ahead for this step, as kernels take them; the layer
        has no others any more. Kernels that are queued from here on find their bytes."""
        state = self._layers[layer]
        wanted = set(experts)
        found = []
        for expert, (slot, copied) in state.ahead.items():
            if expert in wanted:
                self.device.compute.wait(copied)
                found.append(state.layout.resident(expert, slot))
            else:
                state.slots.ring.append((slot, copied))
        state.ahead.clear()
        self.stats.staged_hits += len(found)
        return found

    def drop_ahead(self) -> None:
        """No step will ask for what was copied ahead."""
        for layer, state in self._layers.items():
            if state.ahead:
                self.take_ahead(layer, ())

    def batch(self, layer: int) -> int:
        """Experts of the layer that are copied together: half of the staging slots, or fewer."""
        slots = self._layers[layer].slots
        return max(min(slots.half, len(slots.ring)), 1)

    def room_ahead(self, layer: int) -> int:
        """Experts that can be copied ahead, so that half of the staging slots stay for what is
        missed."""
        slots = self._layers[layer].slots
        return max(len(slots.ring) - slots.half, 0)

    def copy(self, layer: int, experts: Sequence[Resident], copied: Sources) -> list[Resident]:
        """Queue copies of experts that are in host memory, at most `batch`; returns them as kernels
        that are queued from here on take them. `copied` is called once their host memory may be
        reused. The caller has to queue those kernels and then call `computed`."""
        state = self._layers[layer]
        slots, event = self._upload(layer, experts, copied)
        self.device.compute.wait(event)
        return [state.layout.resident(e[0], s) for e, s in zip(experts, slots, strict=True)]

    def copy_ahead(self, layer: int, experts: Sequence[Resident], copied: Sources) -> None:
        """Queue copies for the layer's next step, at most `room_ahead`."""
        state = self._layers[layer]
        slots, event = self._upload(layer, experts, copied, ahead=True)
        self.stats.copied_ahead += len(experts)
        for expert, slot in zip(experts, slots, strict=True):
            state.ahead[expert[0]] = slot, event

    def computed(
        self, layer: int, experts: Sequence[Resident], picked: Sequence[int], *, keep: bool
    ) -> None:
        """The kernels that read these experts of copy() or take_ahead() have been queued. With
        `keep`, those that deserve it stay; none of `picked` leaves for them."""
        state = self._layers[layer]
        event = self.device.compute.record()
        for expert, slot, _, _ in experts:
            if keep and self._make_room(state, expert, picked, event):
                state.cache.admit(expert, slot)
                self._enter(state, expert, slot)
            else:
                state.slots.ring.append((slot, event))

    def promote(
        self, layer: int, experts: Sequence[Resident], picked: Sequence[int], copied: Sources
    ) -> list[Resident]:
        """Queue copies of experts that the processor computes in this step, where they deserve to
        stay: they are there at the layer's next step. Returns those; `copied` as in copy()."""
        state = self._layers[layer]
        event: Event | None = None
        chosen: list[Resident] = []
        for expert in experts:
            if len(chosen) >= len(state.slots.ring):
                break
            event = event or self.device.compute.record()
            if self._make_room(state, expert[0], picked, event):
                # Admitted at once, so that the next one does not get its slot.
                state.cache.admit(expert[0], 0)
                chosen.append(expert)
        if chosen:
            slots, done = self._upload(layer, chosen, copied)
            for expert, slot in zip(chosen, slots, strict=True):
                state.cache.evict(expert[0])
                state.cache.admit(expert[0], slot)
                state.arriving[expert[0]] = slot, done
        return chosen

    def end(self, layer: int) -> None:
        """A layer's step is over, and all of its kernels have been queued."""
        self._publish(self._layers[layer])

    def _upload(
        self, layer: int, experts: Sequence[Resident], copied: Sources, *, ahead: bool = False
    ) -> tuple[list[int], Event]:
        uploads, state = self.device.uploads, self._layers[layer]
        begin = time.perf_counter_ns()
        slots = []
        for expert in experts:
            slot, free = state.slots.ring.popleft()
            if free is not None and not free.done():
                uploads.wait(free)
            for target, source, nbytes in state.layout.copies(expert, slot):
                uploads.copy(target, source, nbytes)
            slots.append(slot)
        event = uploads.record()
        self.stats.copied += len(experts)
        self.stats.copied_bytes += len(experts) * state.layout.expert_bytes

        def done() -> None:
            self._note(layer, experts, begin, ahead)
            copied(experts)

        self.device.when(event, done)
        return slots, event

    def _note(self, layer: int, experts: Sequence[Resident], begin: int, ahead: bool) -> None:
        if self._tracer is None:
            return
        end, nbytes = time.perf_counter_ns(), self._layers[layer].layout.expert_bytes
        for expert in experts:
            self._tracer.event(
                Kind.COPY, begin, end, layer, expert[0], a=nbytes, b=2 * self._number + ahead
            )

    def _make_room(self, state: _Layer, expert: int, picked: Sequence[int], event: Event) -> bool:
        """Whether the layer has a slot for the expert; the slot that it gives up for it goes to
        staging, to be written to after `event`."""
        cache = state.cache
        if len(cache) < cache.capacity:
            state.slots.ring.append((state.slots.free.pop(), None))
            return True
        victim = cache.victim([*picked, *state.arriving], newcomer=expert)
        if victim is None:
            return False
        state.slots.ring.append((cache.evict(victim), event))
        state.mirror[victim] = 0
        state.changed = True
        return True

    def _enter(self, state: _Layer, expert: int, slot: int) -> None:
        state.mirror[expert] = state.layout.resident(expert, slot)[1:]
        state.changed = True

    def _publish(self, state: _Layer) -> None:
        if state.changed:
            device, mirror = self.device, state.mirror
            device.compute.copy(device.address(state.table), mirror.ctypes.data, mirror.nbytes)
            state.changed = False
