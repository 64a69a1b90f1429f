"""Who may stand in: cache-aware routing (CAR) replaces picks whose reads would stall.

Owns: the rules, and the meter of what they change. Does not know: slots, reads, time; the caller
says which experts will be there in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log

import numpy as np
import numpy.typing as npt

from fomoe.errors import RequestError
from fomoe.experts.car_options import CarOptions

F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

# What a token's range of logits counts in the running one (Skliar et al., 2412.00099).
RANGE_GAIN = 0.05
# The budget's limit on a pick's weight, in mean weights, follows what was moved in 16 tokens or so.
# A pick of twice the mean always stays, whatever is left of the budget.
_BUDGET_GAIN = 1 / 16
_LIMITS = (0.25, 2.0)


@dataclass(frozen=True, slots=True)
class Selection:
    """What runs instead of the picks. Shapes and types as the router's; where nothing was displaced
    ids and weights are the very arrays that came in."""

    ids: I32Array  # [T, k], a stand-in at its displaced expert's rank
    weights: F32Array  # [T, k]
    displaced: list[tuple[int, float]]  # expert and share of weight, to be backfilled
    moved_mass: float  # sum of those shares


@dataclass(slots=True)
class CarStats:
    """The meter of what CAR changes, over all tokens that it saw."""

    picks: int = 0
    substitutions: int = 0
    moved_mass: float = 0.0  # sum over tokens and layers of the displaced experts' shares of weight
    token_layers: int = 0
    reads_avoided: int = 0
    audits: int = 0
    audit_kl: float = 0.0  # sum over audits of KL(exact || used), nats
    audit_kl_max: float = 0.0
    audit_agreements: int = 0  # audits where both distributions put the same token first

    def note_audit(self, exact_logits: F32Array, used_logits: F32Array) -> None:
        """One token's next-token logits [vocabulary], recomputed exactly and as they were used."""
        exact = exact_logits.astype(np.float64) - float(exact_logits.max())
        used = used_logits.astype(np.float64) - float(used_logits.max())
        exact -= log(np.exp(exact).sum())
        used -= log(np.exp(used).sum())
        kl = max(0.0, float((np.exp(exact) * (exact - used)).sum()))
        self.audits += 1
        self.audit_kl += kl
        self.audit_kl_max = max(self.audit_kl_max, kl)
        self.audit_agreements += int(exact_logits.argmax() == used_logits.argmax())


def use_amounts(weights: F32Array) -> F32Array:
    """What the picks [T, k] of these weights count in the cache where stand-ins are allowed: on
    average one, but in proportion to the weight.

    Picks of little weight can be stood in for, those of much weight stall or cost quality when they
    are absent: so the cache keeps the latter. At equal slots this took 12 to 17 % off the reads on
    demand and left less divergence, for 0.4 points more misses when routing is exact
    (tools/studies/residency.md).
    """
    k = weights.shape[1]
    amounts: F32Array = weights * (k / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30))
    return amounts


class CacheAwareRouter:
    """Applies the options' rule at decode; one instance serves one engine (prefill is exact and
    does not come here). `stats` may be read at any time."""

    def __init__(self, options: CarOptions, num_layers: int, top_k: int) -> None:
        if options.rule != "off" and options.top_j >= top_k:
            raise RequestError(
                f"CAR top-j {options.top_j} leaves nothing to displace: the model picks {top_k}"
            )
        if options.rule == "max-rank" and options.max_rank <= top_k:
            raise RequestError(
                f"CAR max-rank M {options.max_rank} has no stand-ins: the model picks {top_k}"
            )
        self.options = options
        self.stats = CarStats()
        self._ranges = [0.0] * num_layers
        # Under light and budget, what a pick may weigh to be replaced, in mean weights; ratio's and
        # prior's do not change.
        self.limit = options.limit

    def select(
        self, layer: int, logits: F32Array, ids: I32Array, weights: F32Array, available: BoolArray
    ) -> Selection:
        """Replace picks that would stall, as far as the options allow.

        logits [T, experts], ids and weights [T, k] as the router gave them; available [experts]:
        resident, or in flight and landing before the resident experts of this layer have been
        computed. A read that one token of the step needs anyway is no cost to the others.
        """
        if self.options.rule == "prior":
            self._follow_range(layer, logits)
        chosen = self.preview(layer, logits, ids, weights, available)
        self._note(chosen)
        return chosen

    def adopt(
        self,
        layer: int,
        logits: F32Array,
        ids: I32Array,
        weights: F32Array,
        used_ids: I32Array,
        used_weights: F32Array,
    ) -> Selection:
        """As select, where a device has chosen by the same rule: used_ids and used_weights [T, k]
        for the router's ids and weights."""
        if self.options.rule == "prior":
            self._follow_range(layer, logits)
        displaced = []
        for token, rank in zip(*np.nonzero(ids != used_ids), strict=True):
            share = float(weights[token, rank]) / float(weights[token].sum())
            displaced.append((int(ids[token, rank]), share))
        moved = sum(share for _, share in displaced)
        chosen = Selection(used_ids, used_weights, displaced, moved)
        self._note(chosen)
        return chosen

    def _note(self, chosen: Selection) -> None:
        stats = self.stats
        stats.picks += chosen.ids.size
        stats.token_layers += len(chosen.ids)
        stats.substitutions += len(chosen.displaced)
        stats.moved_mass += chosen.moved_mass
        if chosen.displaced:
            displaced = {expert for expert, _ in chosen.displaced}
            stats.reads_avoided += len(displaced.difference(chosen.ids.ravel().tolist()))
        if self.options.rule == "budget":
            self._follow_budget(chosen.moved_mass / len(chosen.ids))

    def preview(
        self, layer: int, logits: F32Array, ids: I32Array, weights: F32Array, available: BoolArray
    ) -> Selection:
        """What select() would say, without its being noted: for picks that are only predicted."""
        here = available[ids]
        if self.options.rule == "off" or here.all():
            return Selection(ids, weights, [], 0.0)
        if len(ids) > 1:
            # Sacred picks are read in any case: the other tokens may use them.
            available = available.copy()
            available[ids[:, : self.options.top_j]] = True
        new_ids, new_weights = ids.copy(), weights.copy()
        displaced: list[tuple[int, float]] = []
        for token in range(len(ids)):
            if not here[token].all():
                displaced += self._displace(
                    layer, logits[token], new_ids[token], new_weights[token], available
                )
            if len(ids) > 1:
                available[new_ids[token]] = True
        if not displaced:
            return Selection(ids, weights, [], 0.0)
        return Selection(new_ids, new_weights, displaced, sum(share for _, share in displaced))

    def _follow_budget(self, moved: float) -> None:
        """`moved` is a layer's mean over its tokens. The limit falls while more than the budget is
        moved, as at a cold start, and rises while there is room: it is the mean that is held."""
        step = _BUDGET_GAIN / len(self._ranges) * (1.0 - moved / self.options.value)
        low, high = _LIMITS
        self.limit = min(max(self.limit * exp(step), low), high)

    def _follow_range(self, layer: int, logits: F32Array) -> None:
        for spread in (logits.max(axis=1) - logits.min(axis=1)).tolist():
            old = self._ranges[layer]
            self._ranges[layer] = old + RANGE_GAIN * (spread - old) if old else spread

    def _displace(
        self, layer: int, z: F32Array, ids: I32Array, weights: F32Array, available: BoolArray
    ) -> list[tuple[int, float]]:
        """Edit one token's ids and weights [k] in place; the displaced experts and their shares."""
        options = self.options
        picks: list[int] = ids.tolist()
        absent = [r for r in range(options.top_j, len(picks)) if not available[picks[r]]]
        total = float(weights.sum())
        if options.rule in ("light", "budget"):
            heaviest = self.limit * total / len(picks)
            absent = [r for r in absent if weights[r] <= heaviest]
        if not absent:
            return []
        room = options.max_mass * total * (1.0 + 1e-6)
        displaced = []
        for rank, stand_in, gap in self._pairs(layer, z, picks, absent, available):
            weight = float(weights[rank])
            if weight > room:
                continue
            room -= weight
            displaced.append((picks[rank], weight / total))
            ids[rank] = stand_in
            weights[rank] = weight * exp(-gap)  # p_C at the picks' own normaliser
        if displaced and options.weights == "renorm":
            weights *= total / float(weights.sum())
        return displaced

    def _pairs(
        self, layer: int, z: F32Array, picks: list[int], absent: list[int], available: BoolArray
    ) -> Iterator[tuple[int, int, float]]:
        """(rank, stand-in, logit gap) that the rule allows, the ones to take first first.

        All but ratio give the best stand-in to the least pick: that is the selection which the
        top-k of boosted logits makes, and it moves the least mass first. ratio pairs in rank order
        as FOMOE does, which accepts more, and takes the best ratios first.
        """
        options = self.options
        worth = np.where(available, z, -np.inf)
        worth[picks] = -np.inf
        if options.rule == "ratio":
            pairs = [
                (rank, c, float(z[picks[rank]]) - value)
                for rank, (c, value) in zip(absent, _descending(worth), strict=False)
            ]
            yield from sorted((p for p in pairs if p[2] <= self.limit), key=lambda pair: pair[2])
            return
        limit, floor = np.inf, -np.inf
        if options.rule == "prior":
            limit = self.limit * self._ranges[layer]
        elif options.rule == "max-rank":
            last = max(len(z) - options.max_rank, 0)
            floor = float(np.partition(z, last)[last])
        for rank, (c, value) in zip(reversed(absent), _descending(worth), strict=False):
            gap = float(z[picks[rank]]) - value
            if gap >= limit or value < floor:
                return
            yield rank, c, gap


def _descending(worth: npt.NDArray[np.floating]) -> Iterator[tuple[int, float]]:
    """Indices and finite values of an array (which it uses up), the largest first. For the few
    stand-ins that a token takes this is cheaper than sorting hundreds of experts."""
    while True:
        best = int(worth.argmax())
        value = float(worth[best])
        if value == -np.inf:
            return
        worth[best] = -np.inf
        yield best, value
