"""Cache-aware routing as a device's router applies it.

Owns: telling a device the rule. Does not know: kernels, what is available.
"""

from __future__ import annotations

from fomoe.experts.car import RANGE_GAIN, BoolArray, CacheAwareRouter, F32Array, I32Array
from fomoe.experts.car_options import CarOptions
from fomoe.kernels.device import Choose, StandInRule


def device_rule(options: CarOptions, top_k: int) -> StandInRule:
    """The rule for layers of so many picks. A budget is followed by who asks, which sets the limit:
    to the device its rule is light."""

    def policy() -> Choose:
        layer = CacheAwareRouter(options, 1, top_k)

        def choose(
            logits: F32Array, ids: I32Array, weights: F32Array, available: BoolArray, limit: float
        ) -> tuple[I32Array, F32Array]:
            layer.limit = limit
            chosen = layer.select(0, logits, ids, weights, available)
            return chosen.ids, chosen.weights

        return choose

    return StandInRule(
        policy=policy,
        rule="light" if options.rule == "budget" else options.rule,
        top_j=options.top_j,
        max_rank=options.max_rank,
        max_mass=options.max_mass,
        renorm=options.weights == "renorm",
        range_gain=RANGE_GAIN,
    )
