"""One layer of one step on its device: what is queued, and what of the host's memory that still
needs.

Owns: the expert step of the layer for as long as copies or kernels may read its slots. Does not
know: which experts go where, other layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from fomoe.experts.layer import Resident
from fomoe.experts.step import ExpertStep
from fomoe.kernels.device import DeviceMoeCall
from fomoe.kernels.ops import KvCache, Routing, Segment
from fomoe.models import Layer
from fomoe.places import Place


class Turn:
    """Methods named `do_` are work for the device's stream; the others are the event loop's."""

    def __init__(
        self, place: Place, layer: Layer, x: Any, tokens: int, *, peeks: bool = False
    ) -> None:
        self.place = place
        self.index = layer.parameters.index
        self.step: ExpertStep | None = None
        self.routing: Routing | None = None
        self.heard = place.device.mark(self.index)  # the routing is on the host
        # Place.peek is the residual stream as it is before the experts.
        self.taken = place.device.mark((self.index, "taken")) if peeks else None
        self._layer = layer
        self._x = x
        self.tokens = tokens
        self._call: DeviceMoeCall | None = None
        self._reads: Counter[int] = Counter()  # by expert: copies and kernels that read its slot
        self._free: list[Resident] = []  # where that has been done, until settle()
        self._over = False
        self._launched = False

    # ---- work for the stream ----

    def launch(
        self,
        segments: Sequence[Segment],
        cache: KvCache | None,
        before: Turn | None,
        *,
        substitutes: bool,
        helped: bool,
    ) -> tuple[Routing, DeviceMoeCall]:
        """All that the host has no part in: the sum of the layer `before` if that was left to this
        one, the mixer, the router, stand-ins; then, once the host can hear of those and the next
        layer's router can be asked, the shared expert and the picks that the device holds.
        `helped`: the processor may be given some."""
        place = self.place
        stand_ins = place.offers[self.index].stand_ins if substitutes else None
        self._launched = True
        if before is not None:
            before.do_finish(False)
        self._layer.mix(self._x, segments, cache)
        self.routing = routing = self._layer.route(self._x, stand_ins)
        if place.helper and helped:
            place.device.move(place.helper.h[: self.tokens], routing.h)
        place.device.reach(self.heard)
        if self.taken is not None:
            place.device.assign(place.peek(self.tokens), self._x)
            place.device.reach(self.taken)
        self._call = call = cast(DeviceMoeCall, self._layer.experts(routing))
        table = place.tier.table(self.index)
        if table is not None:
            call.run_table(table)
        return routing, call

    def launched(self, routing: Routing, call: DeviceMoeCall) -> None:
        """What launch() made: now, or when it was recorded."""
        if not self._launched:  # else it is there, and may have been taken
            self.routing, self._call = routing, call

    def do_run(self, experts: Sequence[Resident]) -> None:
        assert self._call is not None
        self._call.run(experts)

    def do_finish(self, helped: bool) -> None:
        """x += what was computed, on the device and by the processor. What a layer of a prompt was
        computed in is for the next one: all of a step's would be gigabytes."""
        call, self._call = self._call, None
        assert call is not None
        if not helped:
            call.finish(self._x)
        else:
            assert self.place.helper is not None
            call.finish_some(self._x)
            part = self.place.partial[: self.tokens]
            self.place.device.move(part, self.place.helper.partial[: self.tokens])
            self._x += part

    # ---- the event loop's ----

    def queue(self, work: Callable[..., None], *args: Any) -> None:
        self.place.device.compute.call(partial(work, *args))

    def take_routing(self) -> Routing:
        """What the router said, once that is on the host. The turn keeps it no longer."""
        routing, self.routing = self.routing, None
        assert routing is not None
        assert routing.ids[0, 0] >= 0, "the device told of a routing before it sent it"
        return routing

    @property
    def passing(self) -> bool:
        """The step leaves no trace in any cache."""
        return self.step is not None and self.step.passing

    def open(self, step: ExpertStep) -> None:
        """The step hands out experts from now on; it is closed once the turn is over and nothing
        that was queued reads them."""
        self.step = step

    def read(self, experts: Sequence[Resident]) -> None:
        """Something is queued that reads these experts in host memory."""
        self._reads.update(e[0] for e in experts)

    def was_read(self, experts: Sequence[Resident]) -> None:
        """It has been done."""
        if self.step is None:
            return
        for expert in experts:
            self._reads[expert[0]] -= 1
            if not self._reads[expert[0]]:
                del self._reads[expert[0]]
                self._free.append(expert)
        if not self.place.fixed:
            self.settle()
        if self._over and not self._reads:
            self.close()

    def settle(self) -> None:
        """What nothing reads any more may leave: at once, or, where what happens first must not
        decide who does, when everything that was queued has been done."""
        if self.step is not None and self._free:
            self.step.computed(sorted(self._free))
            self._free.clear()

    def end(self) -> None:
        """Nothing more will be queued."""
        self._over = True
        if not self._reads:
            self.close()

    def close(self) -> None:
        """The device has done all that was queued."""
        if self.step is not None:
            self.step.close()
            self.step = None


def do_begin(
    turns: Sequence[Turn],
    segments: Sequence[Segment],
    caches: Sequence[KvCache | None],
    before: Turn | None,
    *,
    substitutes: bool,
    helped: bool,
) -> None:
    """Work for the stream: begin the turns of layers that follow one another on a device, each
    being finished by the next. The last one is not."""

    def launch() -> list[tuple[Routing, DeviceMoeCall]]:
        made, last = [], before
        for turn, cache in zip(turns, caches, strict=True):
            made.append(turn.launch(segments, cache, last, substitutes=substitutes, helped=helped))
            last = turn
        return made

    peeks = turns[-1].taken is not None
    key = turns[0].index, len(turns), before is not None, substitutes, helped, peeks
    found = turns[0].place.ops.fixed_part(key, segments, launch)
    for turn, one in zip(turns, found, strict=True):
        turn.launched(*one)
