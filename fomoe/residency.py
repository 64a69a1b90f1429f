"""Residency: what happens between the router's word and the reads.

Owns: joining the policies (who stands in, who comes next, what is remembered) with the expert
store. Does not know: how policies decide, how bytes move, what is computed.

The cache follows the router and not the stand-ins: uses are noted as the router named them, and
every expert that a stand-in displaced is read in the background while the drive is idle.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.experts.backfill import BackfillQueue, BackfillStats
from fomoe.experts.car import CacheAwareRouter, CarStats, Selection, use_amounts
from fomoe.experts.predict import Prefetcher, PrefetchStats, RecallMeter
from fomoe.experts.routes import DECODE, PROMPT, RouteWriter
from fomoe.experts.store import ExpertStore
from fomoe.kernels.ops import Routing
from fomoe.scheduler import Chunk
from fomoe.trace import Tracer
from fomoe.trace_format import Kind

# Displaced experts on their way at a time: enough to keep a drive busy (one is several pieces).
_BACKFILL_FLIGHT = 2
# Tokens after which counts for a profile of use are halved.
_USES_HALVE = 4096


@dataclass(slots=True)
class _Prediction:
    """What was predicted for a layer, best first, and what was read because of it."""

    experts: list[int]
    absent: list[tuple[int, int]]  # place in `experts`, expert
    reads: list[int]
    made_ns: int


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """The meters of the policies. `car` is live also where no rule is on; then it stays empty."""

    car: CarStats
    backfill: BackfillStats
    prefetch: PrefetchStats
    recall: RecallMeter


class Residency:
    """Sees every routing of a step before its experts are asked for.

    `uses`: counts [layers, experts] to be kept for a profile, or None. `audit_share`: the share of
    generated tokens that are computed exactly as well, to measure what stand-ins cost.
    """

    def __init__(
        self,
        store: ExpertStore,
        car: CacheAwareRouter,
        prefetcher: Prefetcher,
        *,
        backfill: bool = True,
        deterministic: bool = False,
        audit_share: float = 0.0,
        recorder: RouteWriter | None = None,
        uses: npt.NDArray[np.float32] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._store = store
        self._tracer = tracer
        self._car = car
        self._substituting = car.options.rule != "off"
        self._backfill = BackfillQueue() if backfill and self._substituting else None
        self._prefetcher = prefetcher
        self._deterministic = deterministic
        self._audit_share = audit_share
        self._audit_debt = 0.0
        self._recorder = recorder
        self._recall = RecallMeter()
        self._predictions: dict[int, _Prediction] = {}
        self._decode = False
        self._begin_ns = 0
        self.uses = uses

    @property
    def stats(self) -> ResidencyStats:
        backfill = BackfillStats() if self._backfill is None else self._backfill.stats
        return ResidencyStats(self._car.stats, backfill, self._prefetcher.stats, self._recall)

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        """A step of these chunks starts. Stand-ins are allowed only where nothing but generated
        tokens is computed: an error in a prompt would stay in the state of all that follows.
        """
        self._begin_ns = time.perf_counter_ns()
        self._decode = all(c.decodes for c in chunks)
        self._predictions.clear()
        if self._recorder:
            sequences = [c.sequence.number for c in chunks for _ in range(c.length)]
            positions = [c.start + i for c in chunks for i in range(c.length)]
            self._recorder.begin(sequences, positions, DECODE if self._decode else PROMPT)

    @property
    def decoding(self) -> bool:
        """The step computes generated tokens only."""
        return self._decode

    @property
    def substitutes(self) -> bool:
        """Whether routed() may let stand-ins take the place of picks in this step."""
        return self._decode and self._substituting

    def audit_due(self) -> bool:
        """Whether this step is one of those to be computed exactly as well."""
        if not self.substitutes:
            return False
        self._audit_debt += self._audit_share
        if self._audit_debt < 1.0:
            return False
        self._audit_debt -= 1.0
        return True

    def note_audit(
        self, exact: npt.NDArray[np.float32] | None, used: npt.NDArray[np.float32] | None
    ) -> None:
        """Next-token logits [1, vocab] of one token, computed exactly and as they were used."""
        if exact is not None and used is not None:
            self._car.stats.note_audit(exact[-1], used[-1])

    def offer(self, layer: int) -> tuple[npt.NDArray[np.bool_], float]:
        """What stand-ins are chosen by: experts that a layer could use now without a stall, bool
        [experts], and the rule's limit."""
        available = self._store.available(layer, in_flight=not self._deterministic)
        return available, self._car.limit

    def routed(self, layer: int, routing: Routing) -> None:
        """Note what the router said at a layer, and let stand-ins take the place of picks whose
        reads would stall, unless its device has: routing.ids and routing.weights are what has to be
        computed.
        """
        ids, weights = routing.picked or (routing.ids, routing.weights)
        if self._recorder:
            self._recorder.layer(layer, ids, weights, routing.logits)
        if self.uses is not None:
            np.add.at(self.uses[layer], ids.ravel(), 1.0)
        self._store.note_uses(
            layer,
            ids,
            prompt=not self._decode,
            amounts=use_amounts(weights) if self._substituting else None,
        )
        prediction = self._predictions.pop(layer, None)
        if prediction:
            self._judge(layer, prediction, set(ids.ravel().tolist()))
        if not self.substitutes:
            return
        if routing.picked:
            used = routing.ids, routing.weights
            chosen = self._car.adopt(layer, routing.logits, ids, weights, *used)
        else:
            available, _ = self.offer(layer)
            chosen = self._car.select(layer, routing.logits, ids, weights, available)
        if self._tracer and chosen.displaced:
            self._note_substitutions(self._tracer, layer, ids, chosen)
        routing.ids, routing.weights = chosen.ids, chosen.weights
        if self._backfill is not None:
            for expert, share in chosen.displaced:
                self._backfill.add(layer, expert, share)

    def predicts(self) -> bool:
        """Whether it is worth asking the next layer's router ahead of time."""
        return self._decode and not self._deterministic and self._prefetcher.active

    def predicted(self, layer: int, routing: Routing) -> None:
        """What a layer will probably pick, said by its router before its own mixer has run."""
        experts = list(dict.fromkeys(routing.ids.T.ravel().tolist()))
        if self._recorder and len(routing.ids):
            self._recorder.prediction(layer, routing.ids)
        known = self._store.is_known
        absent = [(i, e) for i, e in enumerate(experts) if not known(layer, e)]
        self._store.protect(layer, experts)
        if absent and self.substitutes:
            # What would be stood in for is worth no read in a hurry.
            available = self._store.available(layer)
            chosen = self._car.preview(
                layer, routing.logits, routing.ids, routing.weights, available
            )
            needed = chosen.ids.ravel().tolist()
            absent = [(i, e) for i, e in absent if e in needed]
        reads = self._prefetcher.choose(layer, absent, self._store.expert_bytes(layer))
        if reads:
            del reads[self._store.prefetch(layer, reads, guess=True) :]
            self._prefetcher.note_issued(len(reads))
        self._predictions[layer] = _Prediction(experts, absent, reads, time.perf_counter_ns())

    def _judge(self, layer: int, prediction: _Prediction, picks: set[int]) -> None:
        """Compare a prediction with what was picked, and its reads with what they saved."""
        elapsed = (time.perf_counter_ns() - prediction.made_ns) / 1e9
        # What was absent when the prediction was made is absent still, or read because of it.
        misses = {e for e in picks if e in prediction.reads or not self._store.is_known(layer, e)}
        self._recall.note(prediction.experts, picks, misses)
        if self._tracer:
            self._tracer.event(
                Kind.PREDICT,
                prediction.made_ns,
                time.perf_counter_ns(),
                layer,
                token=self._store.clock,
                a=len(prediction.experts),
                b=len(picks.intersection(prediction.experts)),
            )
        prefetcher = self._prefetcher
        prefetcher.note_window(layer, elapsed)
        for place, expert in prediction.absent:
            prefetcher.note_place(place, picked=expert in picks)
        for expert in prediction.reads:
            prefetcher.note_outcome(used=expert in picks)

    def _note_substitutions(
        self, tracer: Tracer, layer: int, picks: npt.NDArray[np.int32], chosen: Selection
    ) -> None:
        now, clock, shares = time.perf_counter_ns(), self._store.clock, dict(chosen.displaced)
        changed = picks != chosen.ids
        for pick, other in zip(picks[changed].tolist(), chosen.ids[changed].tolist(), strict=True):
            moved = int(shares.get(pick, 0.0) * 1e6)
            tracer.event(Kind.SUBSTITUTE, now, now, layer, pick, clock, a=other, b=moved)

    async def end_step(self) -> None:
        """A step is over. In deterministic mode this is when displaced experts are read, one for
        every layer, so that what is resident depends on the input alone.
        """
        if self._recorder:
            self._recorder.end()
        if self._decode and not self._deterministic:
            self._prefetcher.note_token((time.perf_counter_ns() - self._begin_ns) / 1e9)
        if self.uses is not None and self._store.clock % _USES_HALVE == 0:
            self.uses *= 0.5
        if self._backfill is not None and self._deterministic:
            for _ in range(min(self._store.num_layers, len(self._backfill))):
                self._fill(self._backfill)
            await self._store.settle()

    def backfill(self) -> None:
        """Keep the background of the drive busy with displaced experts; demand reads go first in
        any case. To be called when a layer's step has begun, and holds who stands in: they would
        be the first to be evicted."""
        queue = self._backfill
        while queue and not self._deterministic and self._store.num_ahead < _BACKFILL_FLIGHT:
            self._fill(queue)

    def _fill(self, queue: BackfillQueue) -> None:
        """Read the most wanted expert, if it is worth more to its layer than who would leave."""
        layer, expert = queue.take()
        if not self._store.is_known(layer, expert):
            queue.stats.read += self._store.prefetch(layer, [expert])
