"""Replays cache-aware routing on a recording that holds the router's logits.

Owns: the event loop of cache, stand-ins and backfill, in the engine's order. Open loop: recorded
logits do not react to what was substituted, so this counts reads, not quality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from replay import Drive
from routings import Trace

from fomoe.experts.cache import ExpertCache, make_policy
from fomoe.experts.car import CacheAwareRouter, CarStats, use_amounts
from fomoe.experts.car_options import CarOptions


@dataclass(slots=True)
class CarOutcome:
    """Decode tokens under one rule at one capacity."""

    slots: int
    stats: CarStats
    tokens: int = 0
    demand_reads: int = 0
    backfill_reads: int = 0
    stall_s: float = 0.0

    @property
    def miss_rate(self) -> float:
        """Picks that were read on demand."""
        return self.demand_reads / self.stats.picks


def replay_car(
    trace: Trace, spec: str, slots: int, drive: Drive, options: CarOptions, idle_s: float
) -> CarOutcome:
    """Replay decode with a rule. `idle_s`: per layer, how long the drive idles while the layer
    computes; backfill of displaced experts fills it. 0: no backfill. Layers keep separate queues:
    what was displaced is read before the same layer's next token, the greatest weight first."""
    assert trace.logits is not None
    assert trace.weights is not None
    caches = [
        ExpertCache(trace.experts, slots, make_policy(spec, trace.experts))
        for _ in range(trace.layers)
    ]
    router = CacheAwareRouter(options, trace.layers, trace.top_k)
    outcome = CarOutcome(slots, router.stats)
    credit_s = 0.0
    expert_s = drive.expert_bytes / drive.bytes_per_s
    for clock, token in enumerate(np.flatnonzero(~trace.prompt)):
        reads = np.zeros(trace.layers, np.int64)
        logits = trace.logits[token].astype(np.float32)
        weights = trace.weights[token].astype(np.float32)
        amounts = use_amounts(weights)
        for layer, cache in enumerate(caches):
            ids = trace.ids[token, layer : layer + 1]
            used = router.select(
                layer,
                logits[layer : layer + 1],
                ids,
                weights[layer : layer + 1],
                cache.resident,
            )
            # The cache follows the router, not its stand-ins.
            cache.touch(ids[0], clock, 1.0 if options.rule == "off" else amounts[layer])
            demand = [e for e in used.ids[0].tolist() if not cache.resident[e]]
            busy = [*used.ids[0].tolist(), *ids[0].tolist()]
            reads[layer] = _read(cache, demand, busy)
            credit_s += idle_s
            wanted = [e for e, _ in sorted(used.displaced, key=lambda pair: -pair[1])]
            filled = wanted[: int(credit_s / expert_s)]
            outcome.backfill_reads += _read(cache, filled, busy)
            credit_s -= len(filled) * expert_s
            credit_s = min(credit_s, max(idle_s, expert_s))  # idle time does not keep
        outcome.tokens += 1
        outcome.demand_reads += int(reads.sum())
        outcome.stall_s += float(drive.stall_s(reads).sum())
    return outcome


def _read(cache: ExpertCache, experts: list[int], protected: list[int]) -> int:
    """Give each expert a slot, for which another leaves where the cache is full."""
    read = 0
    for expert in experts:
        if cache.excess > 0:
            victim = cache.victim(protected)
            if victim is None:
                return read
            cache.evict(victim)
        cache.admit(expert, 0)
        read += 1
    return read
