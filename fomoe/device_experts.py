"""The experts that a layer picks and its device has not: brought there, or left to the processor.

Owns: what is done with each of them as it becomes available. Does not know: how it is decided where
they are computed (experts/placement.py), slots, other layers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from fomoe.chunks import distinct
from fomoe.experts.layer import Resident
from fomoe.experts.placement import LayerPlacement
from fomoe.experts.tiered import TieredStore
from fomoe.kernels.ops import Routing
from fomoe.lookahead import Lookahead
from fomoe.models import Layer
from fomoe.signals import drain
from fomoe.trace_format import Part
from fomoe.turn import Turn


class DeviceExperts:
    """`compute` as Forward._compute."""

    def __init__(
        self, store: TieredStore, lookahead: Lookahead, compute: Callable[..., Awaitable[object]]
    ) -> None:
        self._store, self._lookahead, self._compute = store, lookahead, compute

    async def bring(self, turn: Turn, layer: Layer, routing: Routing, *, passing: bool) -> bool:
        """Everything that the layer's picks need is computed, or queued; whether the layer's sum
        is, too, as it must be where the processor has a share in it. Raises ReadError."""
        index, place = turn.index, turn.place
        tier = place.tier
        picks, numbers = distinct(routing)
        counts = dict(zip(picks, numbers, strict=True))
        missing = tier.missing(index, counts)
        ahead = tier.take_ahead(index, missing)
        here = {e[0] for e in ahead}
        missing = [e for e in missing if e not in here]
        if not passing:
            held = [e for e in picks if e not in missing]
            self._store.note_above(index, held, [counts[e] for e in held])
        step = self._store.begin(index, missing, [counts[e] for e in missing], passing=passing)
        turn.open(step)
        if ahead:
            turn.queue(turn.do_run, ahead)
            tier.computed(index, ahead, picks, keep=not passing)
        placement = place.placement(index, turn.tokens)
        helper = place.helper
        if helper and missing:
            helper.begin(layer.parameters.moe, routing)
        ready = step.take()
        while True:
            if ready:
                await self._place(turn, ready, placement, counts)
            if place.fixed:
                await drain([place.device])
                turn.settle()
            self._lookahead.fetch_on(step)
            ready = await step.landed()
            if not ready:
                break
        helped = bool(helper and missing)
        if helper and missing:
            helper.finish()
            turn.queue(turn.do_finish, True)
        tier.end(index)
        turn.end()
        return helped

    async def _place(
        self,
        turn: Turn,
        experts: Sequence[Resident],
        placement: LayerPlacement,
        counts: dict[int, int],
    ) -> None:
        """Compute experts that are in host memory where they are done first."""
        device, host = placement.split([e[0] for e in experts], counts.__getitem__)
        by_number = {e[0]: e for e in experts}
        self._copy(turn, [by_number[e] for e in device], list(counts))
        if host:
            await self._compute_here(turn, [by_number[e] for e in host], list(counts))

    def _copy(self, turn: Turn, experts: Sequence[Resident], picks: Sequence[int]) -> None:
        """Queue copies to the device in batches, and behind each the kernels that read it, which
        run while the next batch is copied."""
        tier = turn.place.tier
        while experts:
            batch = experts[: tier.batch(turn.index)]
            experts = experts[len(batch) :]
            turn.read(batch)
            here = tier.copy(turn.index, batch, turn.was_read)
            turn.queue(turn.do_run, here)
            tier.computed(turn.index, here, picks, keep=not turn.passing)

    async def _compute_here(
        self, turn: Turn, experts: Sequence[Resident], picks: Sequence[int]
    ) -> None:
        """The processor computes experts where they lie; those that deserve to stay on the device
        are copied there meanwhile."""
        place = turn.place
        place.tier.stats.host_uses += len(experts)
        turn.read(experts)
        if not turn.passing and not place.pins(turn.index):
            turn.read(place.tier.promote(turn.index, experts, picks, turn.was_read))
        if place.helper:
            await self._compute(
                Part.RESIDENT, turn.index, place.helper.run, experts, experts=len(experts)
            )
            turn.was_read(experts)
        else:
            turn.queue(turn.do_run, experts)
            place.device.when(place.device.compute.record(), partial(turn.was_read, experts))
