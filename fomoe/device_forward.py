"""A step where layers are computed on devices, which take turns.

Owns: what is queued on which stream, and when the host waits. Does not know: slots, the cost model,
which kind of device.

The host waits for a layer's routing (its mailbox), and never for a layer's end: what a device holds
is computed from its table while the mailbox is on its way, only what is missing is brought, and the
next layer is queued behind it. Where nothing was missing that is one piece of work (Turn.do_begin),
which a GPU plays back as one graph: a layer's sum is left to the next one's beginning, since only
the host knows that nothing is missing.

With several devices, layers take turns: while one device computes a layer, the next layer's router
is asked about the residual stream on the other one, and what it will probably pick is copied there
(lookahead.py). The same schedule runs on threads of the host, where tests run it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.chunks import distinct, lost_expert
from fomoe.errors import ReadError
from fomoe.experts.layer import Resident
from fomoe.experts.placement import LayerPlacement
from fomoe.experts.tiered import TieredStore
from fomoe.forward import Forward, Logits
from fomoe.kernels.ops import KvCache, Routing, Segment
from fomoe.lookahead import Lookahead
from fomoe.memory import finish
from fomoe.models import HEAD_ROWS, Layer
from fomoe.places import Place
from fomoe.scheduler import Chunk
from fomoe.signals import Signal, drain
from fomoe.trace_format import Part
from fomoe.turn import Turn


class DeviceForward(Forward):
    """`places`: of each layer, in the order of layers; the first one's has embedding and head."""

    def __init__(self, *args: Any, places: Sequence[Place], **options: Any) -> None:
        super().__init__(*args, **options)
        assert isinstance(self._store, TieredStore)
        self._tiered = self._store
        self._places = places
        self._devices = list(dict.fromkeys(place.device for place in places))
        hp = self._model.parameters
        device = places[0].device
        self._head_rows = device.host_array((HEAD_ROWS, hp.vocab_size), np.float32)
        self._at = places[0]  # where the residual stream is
        self._tokens = 0
        self._turns: list[Turn] = []  # that may still read host memory
        self._unfinished: Turn | None = None  # whose sum is left to what comes next
        # Recurrent states as they were before an audit: (place in the step, layer).
        self._spares: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._lookahead = Lookahead(places, self._tiered, self._residency)

    async def run(self, chunks: Sequence[Chunk]) -> list[Logits]:
        """As Forward.run. However it ends, no device reads experts in host memory then."""
        complete = False
        try:
            logits = await super().run(chunks)
            complete = True
            return logits
        finally:
            await finish(asyncio.ensure_future(self._end(complete)))

    async def _end(self, complete: bool) -> None:
        """Where no expert was missing there is nothing to wait for: the logits came last."""
        self._lookahead.clear()
        self._unfinished = None
        try:
            reads = self._tiered.num_borrowed or any(turn.step for turn in self._turns)
            if reads or not complete:
                await drain(self._devices)
        finally:
            for turn in self._turns:
                turn.close()
            self._turns.clear()
            for place in dict.fromkeys(self._places):
                place.tier.end_all()

    async def _audit(
        self, chunks: Sequence[Chunk], rows: npt.NDArray[np.uint8], segments: Sequence[Segment]
    ) -> list[Logits]:
        """As Forward._audit; states are kept in memory of their devices."""
        kept = []
        for number, segment in enumerate(segments):
            for index, (place, state) in enumerate(zip(self._places, segment.delta, strict=True)):
                if state is None:
                    continue
                device = place.device
                spare = self._spares.get((number, index))
                if spare is None:
                    arrays = (device.array(a.shape, np.float32) for a in (state.conv, state.s))
                    spare = self._spares[number, index] = tuple(arrays)
                for array, other in zip((state.conv, state.s), spare, strict=True):
                    kept.append((device, array, other))
                    device.compute.call(partial(device.assign, other, array))
        try:
            logits = await self._layers(chunks, rows, segments, audit=True)
            return [None if own is None else np.array(own) for own in logits]
        finally:
            for device, array, spare in kept:
                device.compute.call(partial(device.assign, array, spare))

    async def _layers(
        self,
        chunks: Sequence[Chunk],
        rows: npt.NDArray[np.uint8],
        segments: Sequence[Segment],
        *,
        audit: bool = False,
    ) -> list[Logits]:
        self._tokens = len(rows)
        self._at = self._places[0]
        x = self._at.x(self._tokens)
        self._at.device.compute.call(partial(self._model.embed_into, rows, x))
        for layer, cache in zip(self._model.layers, self._caches, strict=True):
            await self._yield(chunks)
            await self._layer(layer, cache, x, chunks, segments, audit)
        self._finish_before()
        self._move(self._places[0])
        return await self._head(chunks, segments, x)

    async def _logits(self, x: Any, rows: list[int]) -> npt.NDArray[np.float32]:
        device, host = self._at.device, self._head_rows[: len(rows)]

        def work() -> None:
            picked = x if len(rows) == len(x) else x[rows]
            device.move(host, self._model.head(picked))

        device.compute.call(work)
        begin = time.perf_counter_ns()
        await Signal(device, device.compute.record()).reached()
        self._trace.computed(Part.HEAD, -1, begin)
        return host

    def _finish_before(self) -> None:
        """The layer before cannot be left to the next one any more."""
        before, self._unfinished = self._unfinished, None
        if before:
            before.queue(before.do_finish, False)

    def _move(self, place: Place) -> None:
        """The residual stream hops to the device whose turn it is."""
        if place is not self._at:
            self._finish_before()
        place.bring(self._at, self._tokens)
        self._at = place

    async def _layer(
        self,
        layer: Layer,
        cache: KvCache | None,
        x: Any,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
        audit: bool,
    ) -> None:
        index = layer.parameters.index
        place = self._places[index]
        begin = time.perf_counter_ns()
        self._move(place)
        turn = Turn(place, layer, place.x(self._tokens), self._tokens)
        self._turns.append(turn)
        place.tier.begin(index)
        substitutes = self._residency.substitutes and not audit
        if substitutes:
            place.offers[index].offer(*self._residency.offer(index))
        before, self._unfinished = self._unfinished, None
        turn.queue(turn.do_begin, segments, cache, before, substitutes)
        heard = Signal(place.device, turn.heard)
        below = self._model.layers[index + 1] if index + 1 < len(self._model.layers) else None
        if below and self._read_ahead and not audit:
            self._lookahead.ask(below, place, self._tokens, segments)
        await heard.reached()
        self._tiered.note_heard(index, time.perf_counter_ns() - begin)
        self._lookahead.forget(index)
        self._trace.computed(Part.ROUTE, index, begin)
        routing = turn.take_routing()
        if not audit:
            self._residency.routed(index, routing)
        try:
            await self._experts(turn, layer, routing, passing=audit)
        except ReadError as error:
            assert turn.step is not None
            raise lost_expert(error, turn.step.lost, routing, chunks, segments) from error
        self._trace.layer(index, begin, time.perf_counter_ns())

    async def _experts(self, turn: Turn, layer: Layer, routing: Routing, passing: bool) -> None:
        """Everything that the layer's picks need is computed, or queued."""
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
            self._tiered.note_above(index, held, [counts[e] for e in held])
        step = self._store.begin(index, missing, [counts[e] for e in missing], passing=passing)
        turn.open(step)
        if ahead:
            turn.queue(turn.do_run, ahead)
            tier.computed(index, ahead, picks, keep=not passing)
        placement = place.placement(index, self._tokens)
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
        if helper and missing:
            helper.finish()
            turn.queue(turn.do_finish, True)
        else:
            self._unfinished = turn
        tier.end(index)
        turn.end()

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
