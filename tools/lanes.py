"""Many texts at once, each as if it had an engine of its own: lanes.

Owns: joining the policies with a logical drive for every lane, in the engine's deterministic order:
what a token reads on demand is there when it is computed, and between tokens one displaced expert
is read for each layer. Does not know: how texts are scored. Compute is the engine's, with all
experts in memory, so that a study of a small model takes minutes: a step of many lanes costs
little more than one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fomoe.config import EngineOptions
from fomoe.engine import Engine
from fomoe.experts.backfill import BackfillQueue
from fomoe.experts.cache import ExpertCache, make_policy
from fomoe.experts.car import CacheAwareRouter, use_amounts
from fomoe.experts.car_options import CarOptions
from fomoe.experts.predict import Prefetcher
from fomoe.kernels.ops import Routing
from fomoe.loading import Loaded, load
from fomoe.residency import Residency
from fomoe.scheduler import Chunk


@dataclass(slots=True)
class Traffic:
    """Sums over all lanes, tokens and layers."""

    picks: int = 0
    misses: int = 0  # read on demand
    backfilled: int = 0
    substitutions: int = 0
    moved_mass: float = 0.0
    token_layers: int = 0


class Lane:
    """The caches of one text, and who may stand in there."""

    def __init__(
        self, loaded: Loaded, slots: list[int], policy: str, car: CarOptions, backfill: bool
    ) -> None:
        layers = loaded.hp.layers
        self.caches = [
            ExpertCache(p.moe.num_experts, n, make_policy(policy, p.moe.num_experts))
            for p, n in zip(layers, slots, strict=True)
        ]
        self.router = CacheAwareRouter(car, len(layers), max(p.moe.top_k for p in layers))
        self.queue = BackfillQueue() if backfill and car.rule != "off" else None
        self.clock = 0

    def fill(self) -> int:
        """Between two tokens; the number of experts that were read."""
        self.clock += 1
        read = 0
        for _ in range(min(len(self.caches), len(self.queue or ()))):
            assert self.queue is not None
            layer, expert = self.queue.take()
            cache = self.caches[layer]
            if not cache.resident[expert]:
                read += admit(cache, expert, (), newcomer=True)
        return read


def admit(cache: ExpertCache, expert: int, busy: Sequence[int], *, newcomer: bool) -> bool:
    """Read an expert into a slot; False when it finds none and only passes through."""
    if cache.excess > 0:
        victim = cache.victim(busy, newcomer=expert if newcomer else None)
        if victim is None:
            return False
        cache.evict(victim)
    cache.admit(expert, 0)
    return True


class LaneResidency(Residency):
    """Gives every sequence of an engine a lane of its own. The real cache holds everything."""

    def __init__(self, loaded: Loaded) -> None:
        count, top_k = loaded.hp.num_layers, max(p.moe.top_k for p in loaded.hp.layers)
        super().__init__(
            loaded.store,
            CacheAwareRouter(CarOptions(), count, top_k),
            Prefetcher("off", count, bytes_per_s=1.0, latency_s=1.0, in_flight_bytes=1),
        )
        self.lanes: dict[int, Lane] = {}
        self.counts = Traffic()
        self._loaded = loaded
        self._rows: list[Lane] = []

    def start(self, *, share: float, policy: str, car: CarOptions, backfill: bool) -> None:
        """Sequences that begin from now on have slots for `share` of the experts."""
        self.lanes.clear()
        self.counts = Traffic()
        slots = [int(p.moe.num_experts * share) for p in self._loaded.hp.layers]
        self._make = partial(Lane, self._loaded, slots, policy, car, backfill)

    @property
    def substitutes(self) -> bool:
        return True  # also where nobody stands in: every routing has to come by

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        assert all(c.decodes for c in chunks), "lanes compute token by token"
        self._rows = []
        for chunk in chunks:
            number = chunk.sequence.number
            if number not in self.lanes:
                self.lanes[number] = self._make()
            self._rows.append(self.lanes[number])

    def routed(self, layer: int, routing: Routing) -> None:
        ids, weights, logits = routing.ids.copy(), routing.weights.copy(), routing.logits
        amounts = use_amounts(weights)
        for row, lane in enumerate(self._rows):
            cache, here = lane.caches[layer], slice(row, row + 1)
            picks = ids[row].tolist()
            by_weight = lane.router.options.rule != "off"
            cache.touch(picks, lane.clock, amounts[row] if by_weight else 1.0)
            chosen = lane.router.select(
                layer, logits[here], ids[here], weights[here], cache.resident
            )
            if lane.queue is not None:
                for expert, share in chosen.displaced:
                    lane.queue.add(layer, expert, share)
            if chosen.displaced:
                ids[row], weights[row] = chosen.ids[0], chosen.weights[0]
                picks = ids[row].tolist()
            self._read(cache, picks)
        routing.ids, routing.weights = ids, weights

    def _read(self, cache: ExpertCache, picks: list[int]) -> None:
        missing = [e for e in picks if cache.lookup(e) < 0]
        self.counts.picks += len(picks)
        self.counts.misses += len(missing)
        travelled = [e for e in missing if not admit(cache, e, picks, newcomer=False)]
        for expert in travelled:  # they found no slot: once computed, the better ones stay
            admit(cache, expert, (), newcomer=True)

    async def end_step(self) -> None:
        for lane in self._rows:
            self.counts.backfilled += lane.fill()

    def totals(self) -> Traffic:
        """The counts, with what the lanes' routers metered."""
        meters = [lane.router.stats for lane in self.lanes.values()]
        self.counts.substitutions = sum(m.substitutions for m in meters)
        self.counts.moved_mass = sum(m.moved_mass for m in meters)
        self.counts.token_layers = sum(m.token_layers for m in meters)
        return self.counts


async def open_lanes(
    model: Path, lanes: int, context: int, threads: int
) -> tuple[Engine, LaneResidency]:
    """An engine with all experts in memory, ready for so many texts of `context` tokens at once,
    and what decides about its routing."""
    options = EngineOptions(
        context=lanes * (-(-context // 64) * 64),
        parallel=lanes,
        ubatch=max(lanes, 16),
        threads=threads,
        direct="off",
    )
    loaded = await load(model, options, None, None)
    assert loaded.plan.all_resident, "lanes need all experts in memory"
    loaded.residency = residency = LaneResidency(loaded)
    return Engine(loaded, options, 0.0), residency
