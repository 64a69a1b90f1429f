"""A step where layers are computed on devices, which take turns.

Owns: what is queued on which stream, and when the host waits. Does not know: slots, the cost model,
which kind of device.

The host never waits for a layer's end, and for a layer's routing (its mailbox) only where experts
may be missing: what a device holds is computed from its table while the mailbox is on its way, only
what is missing is brought, and the next layer is queued behind it. Where nothing was missing the
next layer is queued first, and noted is what was picked while that is computed (passed.py). Layers
whose devices hold every expert are queued one after the other, and all of a short step as one piece
where one device has all of them. A piece (turn.do_begin) is what a GPU plays back as one graph: a
layer's sum is left to the next one's beginning, since it may be the host that knows that nothing
is missing.

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

from fomoe.chunks import lost_expert
from fomoe.device_experts import DeviceExperts
from fomoe.errors import ReadError
from fomoe.experts.tiered import TieredStore
from fomoe.forward import Forward, Logits
from fomoe.kernels.ops import KvCache, Routing, Segment
from fomoe.lookahead import Lookahead
from fomoe.memory import finish
from fomoe.models import HEAD_ROWS, Layer
from fomoe.passed import Passed
from fomoe.places import Place
from fomoe.scheduler import Chunk
from fomoe.signals import Signal, drain, soon
from fomoe.trace_format import Part
from fomoe.turn import Turn, do_begin


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
        self._passed = Passed(self._tiered, self._residency, self._trace)
        self._lookahead = Lookahead(places, self._tiered, self._residency)
        self._experts = DeviceExperts(self._tiered, self._lookahead, self._compute)

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
        self._passed.clear()
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
        if self._inline and self._holds_all():
            await self._yield(chunks)
            self._begin_turns(self._model.layers, self._caches, segments, audit)
        else:
            for layer, cache in zip(self._model.layers, self._caches, strict=True):
                await self._yield(chunks)
                await self._layer(layer, cache, chunks, segments, audit)
        self._finish_before()
        self._move(self._places[0])
        logits = await self._head(chunks, segments, x)
        await self._passed.note()
        return logits

    def _holds_all(self) -> bool:
        """One device computes all layers, and has every expert."""
        if len(self._devices) > 1 or self._places.count(self._places[0]) < len(self._places):
            return False
        tier = self._places[0].tier
        return all(tier.holds_all(i) for i in range(len(self._places)))

    async def _logits(self, x: Any, rows: list[int]) -> npt.NDArray[np.float32]:
        place, host = self._at, self._head_rows[: len(rows)]
        device, peek = place.device, place.peek(len(x))
        place.await_peek()

        def work() -> None:
            first, count = rows[0], len(rows)
            picked = x[first : first + count]
            if rows[-1] - first >= count:
                # One by one: an index would come from the host, and a GPU's stream wait for it.
                picked = peek[:count]
                for i, row in enumerate(rows):
                    device.assign(picked[i : i + 1], x[row : row + 1])
            device.move(host, self._model.head(picked))

        device.compute.call(work)
        await self._passed.note()
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

    def _begin_turns(
        self,
        layers: Sequence[Layer],
        caches: Sequence[KvCache | None],
        segments: Sequence[Segment],
        audit: bool,
    ) -> Turn:
        """Queue layers that follow one another on a device, whose last sum is left to what comes
        next. Several are such whose experts are all there. The turn of the last."""
        indices = [layer.parameters.index for layer in layers]
        place, x = self._places[indices[0]], self._places[indices[0]].x(self._tokens)
        self._move(place)
        peeks = len(layers) == 1 and self._asks(indices[0], audit)
        turns = [Turn(place, layer, x, self._tokens, peeks=peeks) for layer in layers]
        self._turns += turns
        if peeks:
            place.await_peek()
        for index in indices:
            place.tier.begin(index)
        passes = self._inline and place.tier.holds_all(indices[0])
        substitutes = self._residency.substitutes and not (audit or passes)
        if substitutes:
            place.offers[indices[0]].offer(*self._residency.offer(indices[0]))
        before, self._unfinished = self._unfinished, None
        options = {"substitutes": substitutes, "helped": not passes}
        place.device.compute.call(partial(do_begin, turns, segments, caches, before, **options))
        if passes:
            for turn in turns:
                self._pass(turn, None, audit)
        return turns[-1]

    def _asks(self, index: int, audit: bool) -> bool:
        """Whether the router of the layer after this one is asked ahead of its turn."""
        layers = self._model.layers
        if audit or not self._read_ahead or index + 1 == len(layers):
            return False
        return self._lookahead.asks(layers[index + 1])

    def _pass(self, turn: Turn, routing: Routing | None, audit: bool) -> None:
        """A layer's turn is over, and nothing was missing."""
        self._passed.add(turn, routing, passing=audit)
        self._unfinished = turn
        turn.place.tier.end(turn.index)
        turn.end()

    async def _layer(
        self,
        layer: Layer,
        cache: KvCache | None,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
        audit: bool,
    ) -> None:
        index = layer.parameters.index
        place = self._places[index]
        begin = time.perf_counter_ns()
        turn = self._begin_turns([layer], [cache], segments, audit)
        passed = turn is self._unfinished
        # Whose events come first must be asked for first.
        signal = None if passed or self._inline else Signal(place.device, turn.heard)
        if turn.taken is not None:
            self._lookahead.ask(self._model.layers[index + 1], turn, segments)
        await self._passed.note(heard=True)
        if passed:
            return
        await (signal.reached() if signal else soon(place.device, turn.heard))
        self._tiered.note_heard(index, time.perf_counter_ns() - begin)
        self._lookahead.forget(index)
        self._trace.computed(Part.ROUTE, index, begin)
        routing = turn.take_routing()
        if self._inline and not place.fixed and place.tier.has(index, routing.ids):
            self._trace.layer(index, begin, time.perf_counter_ns())
            self._pass(turn, routing, audit)
            return
        await self._passed.note()
        if not audit:
            self._residency.routed(index, routing)
        try:
            finished = await self._experts.bring(turn, layer, routing, passing=audit)
        except ReadError as error:
            assert turn.step is not None
            raise lost_expert(error, turn.step.lost, routing, chunks, segments) from error
        if not audit:
            self._residency.backfill()
        if not finished:
            self._unfinished = turn
        self._trace.layer(index, begin, time.perf_counter_ns())
