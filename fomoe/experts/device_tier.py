"""The experts in one device's memory, and those on their way there.

Owns: the slots of a device, the table by which its kernels find experts, and the promise that a
slot is never written to while a kernel or a copy may read it. Does not know: how it is decided who
stays (cache.py) or what is worth a copy (placement.py), what is computed. All methods run on the
event loop's thread, and none waits for the device.

An expert that comes to stay keeps the staging slot (device_slots.py) that it was copied into, and
the slot of the one that leaves for it becomes a staging slot: nothing is copied twice. The one that
leaves goes to the host's memory (`below`) where it is worth more there than who would make room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.experts.cache import Below, BoolArray, ExpertCache, Policy
from fomoe.experts.device_copies import DeviceCopies, Sources, TierStats
from fomoe.experts.device_layout import DeviceLayout
from fomoe.experts.device_slots import DeviceSlots
from fomoe.experts.device_table import DeviceTable
from fomoe.experts.layer import Resident
from fomoe.kernels.device import Device, Event
from fomoe.kernels.ops import A
from fomoe.trace import Tracer

I32Array = npt.NDArray[np.int32]


class TierBelow(Protocol):
    """The host's memory, as the device's tier sees it."""

    def take_down(self, layer: int, expert: int) -> Resident | None:
        """Room for an expert that leaves the device, or None where it deserves none. It stays taken
        until lowered() is called."""

    def lowered(self, layer: int, expert: int) -> None:
        """The expert's bytes are in that room."""


@dataclass(slots=True, eq=False)
class _Layer:
    index: int
    layout: DeviceLayout
    cache: ExpertCache
    slots: DeviceSlots
    table: DeviceTable  # int64 [experts, 3]: what the kernels will find
    arriving: dict[int, tuple[int, Event]] = field(default_factory=dict)  # to stay: slot, copied
    ahead: dict[int, tuple[int, Event]] = field(default_factory=dict)  # for the next step only
    seeds: dict[int, tuple[int, Event]] = field(default_factory=dict)  # enter at the next begin
    is_open: bool = False  # its turn has begun and not ended


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
        self.stats = TierStats()
        self._copies = DeviceCopies(device, self.stats, number, tracer)
        self.below: TierBelow | None = None
        self._layers = {
            i: _Layer(
                i,
                layouts[i],
                cache,
                slots[i],
                DeviceTable(device, (cache.num_experts, 3), np.int64),
            )
            for i, cache in caches.items()
        }

    def policy_below(self, layer: int) -> Policy:
        """The policy by which the host's tier of a layer decides: what is here leaves there."""
        cache = self._layers[layer].cache
        return Below(cache.policy, cache.resident)

    def table(self, layer: int) -> A | None:
        """The layer's table of addresses, or None where it has no slots."""
        state = self._layers[layer]
        return state.table.array if state.cache.capacity else None

    def resident(self, layer: int) -> BoolArray:
        """Experts that the device holds or will hold when the layer's turn comes, bool [experts].
        Not to be written to."""
        return self._layers[layer].cache.resident

    def holds(self, layer: int, expert: int) -> bool:
        """The layer's next step need not bring the expert."""
        state = self._layers[layer]
        here = state.cache.resident[expert] or expert in state.ahead or expert in state.seeds
        return bool(here)

    def holds_all(self, layer: int) -> bool:
        """No step of the layer need bring any expert."""
        cache = self._layers[layer].cache
        return len(cache) == cache.num_experts

    def has(self, layer: int, experts: I32Array) -> bool:
        """The layer's table has all of these, if its turn has begun and nothing came or left."""
        return bool(self._layers[layer].cache.resident[experts].all())

    def tick(self, layer: int, clock: int) -> None:
        """The policy, which the host's tier shares, was told of uses at this time."""
        self._layers[layer].cache.tick(clock)

    def begin(self, layer: int) -> None:
        """A layer's turn has come: what was copied since its last one becomes part of its table."""
        state = self._layers[layer]
        state.is_open = True
        for expert, (slot, copied) in state.seeds.items():
            if state.cache.resident[expert]:  # it came by itself meanwhile
                state.slots.free.append(slot)
            else:
                state.cache.admit(expert, slot)
                state.arriving[expert] = slot, copied
        state.seeds.clear()
        for expert, (slot, copied) in state.arriving.items():
            self.device.compute.wait(copied)
            self._enter(state, expert, slot)
        state.arriving.clear()
        state.table.publish()

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
                state.slots.give(slot, copied)
        state.ahead.clear()
        self.stats.staged_hits += len(found)
        return found

    def end_all(self) -> None:
        """No step goes on: none will ask for what was copied ahead."""
        for layer, state in self._layers.items():
            state.is_open = False
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
                state.slots.give(slot, event)

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

    def is_open(self, layer: int) -> bool:
        """The layer's turn has begun and not ended."""
        return self._layers[layer].is_open

    def room(self, layer: int) -> int:
        """Experts that the layer may still seed."""
        state = self._layers[layer]
        return state.cache.capacity - len(state.cache) - len(state.seeds)

    def seed(self, layer: int, expert: Resident, copied: Sources) -> None:
        """Queue the copy of an expert into one of the slots that the layer has not filled, where
        there is `room`: it is there at the layer's next step. `copied` as in copy()."""
        state = self._layers[layer]
        slot = state.slots.free.pop()
        copy = self._copies.up(layer, state.layout, [(expert, slot)], copied)
        state.seeds[expert[0]] = slot, copy

    def end(self, layer: int) -> None:
        """A layer's step is over, and all of its kernels have been queued."""
        state = self._layers[layer]
        state.table.publish()
        state.is_open = False

    def _upload(
        self, layer: int, experts: Sequence[Resident], copied: Sources, *, ahead: bool = False
    ) -> tuple[list[int], Event]:
        state = self._layers[layer]
        slots = [state.slots.next(self.device.uploads) for _ in experts]
        pairs = list(zip(experts, slots, strict=True))
        return slots, self._copies.up(layer, state.layout, pairs, copied, ahead=ahead)

    def _make_room(self, state: _Layer, expert: int, picked: Sequence[int], event: Event) -> bool:
        """Whether the layer has a slot for the expert; the slot that it gives up for it goes to
        staging, to be written to after `event`."""
        cache = state.cache
        if self.room(state.index):
            state.slots.give(state.slots.free.pop(), None)
            return True
        victim = cache.victim([*picked, *state.arriving], newcomer=expert)
        if victim is None:
            return False
        slot = cache.evict(victim)
        state.table[victim] = 0
        state.slots.give(slot, self._lower(state, victim, slot, event))
        return True

    def _lower(self, state: _Layer, expert: int, slot: int, event: Event) -> Event:
        """Copy an expert whose slot nobody uses after `event` to the host's memory, if it is worth
        room there; the event after which the slot may be written to."""
        below = self.below
        if below is None:
            return event
        room = below.take_down(state.index, expert)
        if room is None:
            return event
        lowered = partial(below.lowered, state.index, expert)
        return self._copies.down(state.layout, slot, room, event, lowered)

    def _enter(self, state: _Layer, expert: int, slot: int) -> None:
        state.table[expert] = state.layout.resident(expert, slot)[1:]
