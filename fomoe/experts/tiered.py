"""The expert store where devices hold experts too: no slot of the host is spent on those.

Owns: joining the tiers of the devices with the host's. Does not know: copies, what is computed.

Both tiers of a layer share one policy: the host's gives away first what the device has, so an
expert that moved up leaves room for the next best, and one that a better one drives out of the
device takes that room, if nobody in it is worth more. So what the tiers hold adds up: on recorded
routings that took 3 % (10 and 7 % of the experts) to 21 % (20 and 20 %) off the drive's reads
(tools/tiers).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.experts.device_tier import DeviceTier
from fomoe.experts.layer import Resident
from fomoe.experts.store import SEEDS_AHEAD, ExpertStore
from fomoe.io.reader import ReadRequest

# Seeds are looked after so often: nobody waits for them.
_SOON_S = 1e-3


class TieredStore(ExpertStore):
    """`tiers`: of every layer, the device's that computes it."""

    def __init__(self, tiers: Mapping[int, DeviceTier], **store: Any) -> None:
        super().__init__(**store)
        self._tiers = tiers
        for tier in dict.fromkeys(tiers.values()):
            tier.below = self
        self.num_borrowed = 0  # experts that copies read
        self._until_heard_ns = [0.0] * self.num_layers
        # Seeds (layer, expert) that are for the device, and whether they are being copied.
        self._rising: dict[tuple[int, int], bool] = {}

    def note_uses(
        self,
        layer: int,
        ids: npt.NDArray[np.int32],
        *,
        prompt: bool,
        amounts: npt.NDArray[np.float32] | None = None,
    ) -> None:
        super().note_uses(layer, ids, prompt=prompt, amounts=amounts)
        self._tiers[layer].tick(layer, self.clock)

    def available(
        self, layer: int, *, in_flight: bool = True, begins_ns: float = 0.0
    ) -> npt.NDArray[np.bool_]:
        """As in ExpertStore. A device is told before the layer's turn, not after its router."""
        begins_ns += self._until_heard_ns[layer]
        here = super().available(layer, in_flight=in_flight, begins_ns=begins_ns)
        return here | self._tiers[layer].resident(layer)

    def note_heard(self, layer: int, elapsed_ns: int) -> None:
        """The layer's picks are known so long after its turn was queued."""
        mean = self._until_heard_ns[layer]
        self._until_heard_ns[layer] += (elapsed_ns - mean) / 16 if mean else elapsed_ns

    def is_ready(self, layer: int, expert: int) -> bool:
        return self._tiers[layer].holds(layer, expert) or super().is_ready(layer, expert)

    def is_known(self, layer: int, expert: int) -> bool:
        return self._tiers[layer].holds(layer, expert) or super().is_known(layer, expert)

    def prefetch(
        self, layer: int, experts: Sequence[int], *, certain: bool = False, guess: bool = False
    ) -> int:
        tier = self._tiers[layer]
        absent = [e for e in experts if not tier.holds(layer, e)]
        taken = super().prefetch(layer, absent, certain=certain, guess=guess)
        if taken == len(absent):
            return len(experts)
        return experts.index(absent[taken])

    def note_above(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """A step uses experts that the layer's device has, counts[i] tokens picking experts[i]."""
        stats, picks = self.stats, sum(counts)
        stats.uses += len(experts)
        stats.hits += len(experts)
        stats.picks += picks
        stats.pick_hits += picks
        self._ledger.note_picks(layer, experts, counts, (), {})

    def borrow(self, layer: int, experts: Sequence[int], most: int) -> list[Resident]:
        """Up to `most` of `experts`, in order, that are ready in slots of the layer: those stay
        until given back."""
        state = self._layers[layer]
        found = [state.ready[e] for e in experts if e in state.ready and e not in state.transit][
            :most
        ]
        state.held.update(e[0] for e in found)
        self.num_borrowed += len(found)
        return found

    def give_back(self, layer: int, experts: Sequence[Resident]) -> None:
        """What borrow() gave may leave."""
        self.num_borrowed -= len(experts)
        self._layers[layer].held.difference_update(e[0] for e in experts)

    # ---- experts that leave the device ----

    def take_down(self, layer: int, expert: int) -> Resident | None:
        """As TierBelow: a slot, that of an expert which is worth less if need be, but none that a
        step waits for."""
        state, step = self._layers[layer], self._steps[layer]
        if state.address[expert] or (step and step.pending):
            return None
        slot = state.take_slot(expert, newcomer=True)
        if slot is None:
            return None
        # Until it has arrived the slot is that of an expert which is being read.
        now = time.perf_counter_ns()
        request = ReadRequest(extents=(), done=_never, submitted_ns=now)
        state.load(expert, slot, request)
        return expert, *state.layout.addresses(expert, slot)

    def lowered(self, layer: int, expert: int) -> None:
        state, step = self._layers[layer], self._steps[layer]
        del state.loading[expert]
        state.land(expert)
        if step and expert in step.waiting:
            step.arrived(expert, time.perf_counter_ns())
        self._landing.set()

    # ---- seeds ----

    def capacities(self) -> list[int]:
        own = super().capacities()
        return [n + self._tiers[layer].room(layer) for layer, n in enumerate(own)]

    async def seed(self, order: Sequence[tuple[int, int]]) -> None:
        """As in ExpertStore; the first ones of each layer go on to its device."""
        try:
            for layer, expert in order:
                while self.num_ahead + len(self._rising) >= SEEDS_AHEAD:
                    await self._let_rise()
                await self._seed(layer, expert)
            while self._rising:
                await self._let_rise()
        finally:
            # Copies that are under way read the host's memory.
            while any(self._rising.values()):
                await self._next_landing()

    async def _seed(self, layer: int, expert: int) -> None:
        cache = self._layers[layer].cache
        promised = sum(own == layer for own, _ in self._rising)
        rises = self._tiers[layer].room(layer) > promised
        while rises and len(cache) >= cache.capacity and self._rising:
            await self._let_rise()
        if len(cache) < cache.capacity and not self.is_known(layer, expert):
            self.prefetch(layer, [expert])
            if rises:
                self._rising[layer, expert] = False

    async def _let_rise(self) -> None:
        """Copy seeds that have landed to their devices, and wait a little for others."""
        for (layer, expert), copied in list(self._rising.items()):
            state, tier = self._layers[layer], self._tiers[layer]
            # What a layer finds on its device must not change while its turn lasts.
            if copied or expert in state.loading or tier.is_open(layer) or self._steps[layer]:
                continue
            held = self.borrow(layer, [expert], min(tier.room(layer), 1))
            if held:
                tier.seed(layer, held[0], partial(self._risen, layer))
                self._rising[layer, expert] = True
            else:
                del self._rising[layer, expert]
        await asyncio.sleep(_SOON_S)

    def _risen(self, layer: int, experts: Sequence[Resident]) -> None:
        """A seed is on its device: its slot here is for another."""
        self.give_back(layer, experts)
        for expert, *_ in experts:
            self._layers[layer].forget(expert)
            del self._rising[layer, expert]
        self._landing.set()


def _never(request: ReadRequest) -> None:
    raise AssertionError("no reader has this request")
