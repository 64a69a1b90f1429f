"""Layers whose experts their devices had: the host has no part in those.

Owns: what has to be noted of them, later, in order, while devices compute what comes after. Does
not know: what is queued.
"""

from __future__ import annotations

import time
from collections import deque

from fomoe.chunks import distinct
from fomoe.experts.tiered import TieredStore
from fomoe.kernels.ops import Routing
from fomoe.residency import Residency
from fomoe.signals import soon
from fomoe.step_trace import StepTrace
from fomoe.trace_format import Part
from fomoe.turn import Turn


class Passed:
    """The layers of a step that have been left to their devices and are not noted yet."""

    def __init__(self, store: TieredStore, residency: Residency, trace: StepTrace) -> None:
        self._store, self._residency, self._trace = store, residency, trace
        # A turn, what its router said if that was heard, and whether it leaves no trace.
        self._turns: deque[tuple[Turn, Routing | None, bool]] = deque()

    def clear(self) -> None:
        """The step is given up."""
        self._turns.clear()

    def add(self, turn: Turn, routing: Routing | None, *, passing: bool) -> None:
        """A turn that is over. `routing`: None where the host has not heard of it. `passing`: the
        step leaves no trace."""
        self._turns.append((turn, routing, passing))

    async def note(self, *, heard: bool = False) -> None:
        """Note them in order, waiting for their devices; with `heard`, up to the first one that
        would have to be waited for."""
        while self._turns and not (heard and self._turns[0][1] is None):
            turn, routing, passing = self._turns.popleft()
            if routing is None:
                begin = time.perf_counter_ns()
                await soon(turn.place.device, turn.heard)
                routing = turn.take_routing()
                self._trace.computed(Part.ROUTE, turn.index, begin)
                self._trace.layer(turn.index, begin, time.perf_counter_ns())
            self._note(turn, routing, passing)

    def _note(self, turn: Turn, routing: Routing, passing: bool) -> None:
        index, tier = turn.index, turn.place.tier
        if not passing:
            self._residency.routed(index, routing)
        picks, numbers = distinct(routing)
        tier.missing(index, dict(zip(picks, numbers, strict=True)))
        tier.take_ahead(index, ())
        if not passing:
            self._store.note_above(index, picks, numbers)
            self._store.passed(index, (), ())
            self._residency.backfill()
