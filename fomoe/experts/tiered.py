"""The expert store where devices hold experts too: no slot of the host is spent on those.

Owns: joining the tiers of the devices with the host's. Does not know: copies, what is computed.

Both tiers of a layer share one policy: the host's gives away first what the device has, so an
expert that moved up leaves room for the next best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.experts.device_tier import DeviceTier
from fomoe.experts.layer import Resident
from fomoe.experts.store import ExpertStore


class TieredStore(ExpertStore):
    """`tiers`: of every layer, the device's that computes it."""

    def __init__(self, tiers: Mapping[int, DeviceTier], **store: Any) -> None:
        super().__init__(**store)
        self._tiers = tiers

    def note_uses(
        self,
        layer: int,
        ids: npt.NDArray[np.int32],
        *,
        prompt: bool,
        amounts: npt.NDArray[np.float32] | None = None,
    ) -> None:
        super().note_uses(layer, ids, prompt=prompt, amounts=amounts)
        self._tiers[layer].tick(layer, self.clock)

    def available(self, layer: int, *, in_flight: bool = True) -> npt.NDArray[np.bool_]:
        above = self._tiers[layer].resident(layer)
        return super().available(layer, in_flight=in_flight) | above

    def is_ready(self, layer: int, expert: int) -> bool:
        return self._tiers[layer].holds(layer, expert) or super().is_ready(layer, expert)

    def is_known(self, layer: int, expert: int) -> bool:
        return self._tiers[layer].holds(layer, expert) or super().is_known(layer, expert)

    def prefetch(
        self, layer: int, experts: Sequence[int], *, certain: bool = False, guess: bool = False
    ) -> int:
        tier = self._tiers[layer]
        absent = [e for e in experts if not tier.holds(layer, e)]
        taken = super().prefetch(layer, absent, certain=certain, guess=guess)
        if taken == len(absent):
            return len(experts)
        return experts.index(absent[taken])

    def note_above(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """A step uses experts that the layer's device has, counts[i] tokens picking experts[i]."""
        stats, picks = self.stats, sum(counts)
        stats.uses += len(experts)
        stats.hits += len(experts)
        stats.picks += picks
        stats.pick_hits += picks
        self._ledger.note_picks(layer, experts, counts, (), {})

    def hold(self, layer: int, experts: Sequence[int], most: int) -> list[Resident]:
        """Up to `most` of `experts`, in order, that are ready in slots of the layer: those stay
        until released."""
        state = self._layers[layer]
        found = [state.ready[e] for e in experts if e in state.ready and e not in state.transit][
            :most
        ]
        state.held.update(e[0] for e in found)
        return found

    def release(self, layer: int, experts: Sequence[Resident]) -> None:
        """What hold() gave may leave."""
        self._layers[layer].held.difference_update(e[0] for e in experts)
