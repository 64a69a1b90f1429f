"""Residency: what happens between the router's word and the reads.

Owns: joining the policies (who stands in, who comes next, what is remembered) with the expert
store. Does not know: how policies decide, how bytes move, what is computed.

The cache follows the router and not the stand-ins: uses are noted as the router named them, and
every expert that a stand-in displaced is read in the background while the drive has nothing better
to do.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.experts.car import CacheAwareRouter, Selection
from fomoe.experts.routes import DECODE, PROMPT, RouteWriter
from fomoe.experts.store import ExpertStore
from fomoe.kernels.ops import Routing
from fomoe.scheduler import Chunk
from fomoe.trace import Kind, Tracer

# Displaced experts on their way at a time: enough to keep a drive busy (an expert is several
# pieces).
_BACKFILL_FLIGHT = 4
# Displaced experts that are remembered; older and less wanted ones are forgotten.
_BACKFILL_QUEUE = 512


@dataclass(slots=True)
class BackfillStats:
    queued: int = 0
    read: int = 0
    forgotten: int = 0


class Residency:
    """Sees every routing of a step before its experts are asked for."""

    def __init__(
        self,
        store: ExpertStore,
        car: CacheAwareRouter,
        *,
        backfill: bool,
        deterministic: bool,
        recorder: RouteWriter | None,
        uses: npt.NDArray[np.float32] | None,
        tracer: Tracer | None = None,
    ) -> None:
        self._store = store
        self._tracer = tracer
        self._car = car
        self._substituting = car.options.rule != "off"
        self._backfill = backfill and self._substituting
        self._deterministic = deterministic
        self._recorder = recorder
        self._uses = uses
        self._queue: list[tuple[float, int, int]] = []
        self._queued: set[tuple[int, int]] = set()
        self._decode = False
        self.backfill_stats = BackfillStats()

    @property
    def car(self) -> CacheAwareRouter:
        return self._car

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        """A step of these chunks starts. Stand-ins are allowed only where nothing but generated
        tokens is computed: an error in a prompt would stay in the state of all that follows.
        """
        self._decode = all(c.decodes for c in chunks)
        if self._recorder:
            sequences = [c.sequence.number for c in chunks for _ in range(c.length)]
            positions = [c.start + i for c in chunks for i in range(c.length)]
            self._recorder.begin(sequences, positions, DECODE if self._decode else PROMPT)

    def routed(self, layer: int, routing: Routing) -> None:
        """Note what the router said at a layer, and let stand-ins take the place of picks whose
        reads would stall: routing.ids and routing.weights are what has to be computed.
        """
        if self._recorder:
            self._recorder.layer(layer, routing.ids, routing.weights, routing.logits)
        if self._uses is not None:
            np.add.at(self._uses[layer], routing.ids.ravel(), 1.0)
        self._store.note_uses(layer, routing.ids, routing.logits)
        if not (self._decode and self._substituting):
            return
        available = self._store.available(layer, in_flight=not self._deterministic)
        chosen = self._car.select(layer, routing.logits, routing.ids, routing.weights, available)
        if self._tracer and chosen.displaced:
            self._note_substitutions(self._tracer, layer, routing.ids, chosen)
        routing.ids, routing.weights = chosen.ids, chosen.weights
        if self._backfill:
            for expert, share in chosen.displaced:
                self._remember(layer, expert, share)
            if not self._deterministic:
                self._pump()

    def _note_substitutions(
        self, tracer: Tracer, layer: int, picks: npt.NDArray[np.int32], chosen: Selection
    ) -> None:
        now, clock, shares = time.perf_counter_ns(), self._store.clock, dict(chosen.displaced)
        changed = picks != chosen.ids
        for pick, other in zip(picks[changed].tolist(), chosen.ids[changed].tolist(), strict=True):
            moved = int(shares.get(pick, 0.0) * 1e6)
            tracer.event(Kind.SUBSTITUTE, now, now, layer, pick, clock, a=other, b=moved)

    async def end_step(self) -> None:
        """A step is over. In deterministic mode this is when displaced experts are read, as many at
        every token, so that what is resident depends on the input alone."""
        if self._recorder:
            self._recorder.end()
        if self._uses is not None and self._store.clock % 4096 == 0:
            self._uses *= 0.5
        if self._backfill and self._deterministic:
            reads: list[tuple[int, int]] = []
            while self._queue and len(reads) < _BACKFILL_FLIGHT:
                layer, expert = self._next()
                if self._store.prefetch(layer, [expert]):
                    reads.append((layer, expert))
            self.backfill_stats.read += len(reads)
            await self._store.settle()

    def _remember(self, layer: int, expert: int, share: float) -> None:
        if (layer, expert) in self._queued:
            return
        self.backfill_stats.queued += 1
        self._queued.add((layer, expert))
        heapq.heappush(self._queue, (-share, layer, expert))
        if len(self._queue) > _BACKFILL_QUEUE:
            # The least wanted is among the leaves; a heap of this size is sorted in microseconds.
            self._queue.sort()
            _, *lost = self._queue.pop()
            self._queued.discard((lost[0], lost[1]))
            self.backfill_stats.forgotten += 1

    def _next(self) -> tuple[int, int]:
        _, layer, expert = heapq.heappop(self._queue)
        self._queued.discard((layer, expert))
        return layer, expert

    def _pump(self) -> None:
        """Keep the background of the drive busy; demand reads go first in any case."""
        room = _BACKFILL_FLIGHT - self._store.num_ahead
        while room > 0 and self._queue:
            layer, expert = self._next()
            before = self._store.num_ahead
            self._store.prefetch(layer, [expert])
            started = self._store.num_ahead - before
            self.backfill_stats.read += started
            room -= started
