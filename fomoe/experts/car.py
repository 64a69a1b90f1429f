"""Who may stand in: cache-aware routing (CAR) replaces picks whose reads would stall.

Owns: the rules, their options and bounds, and the meter of what they change. Does not know: slots,
reads, time; the caller says which experts will be there in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, inf, isfinite, log
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fomoe.errors import RequestError
from fomoe.kernels.device import StandInRule

F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

Rule = Literal["off", "budget", "light", "ratio", "prior", "max-rank"]
Weights = Literal["dampen", "renorm"]

# What a rule's name alone stands for, and "on" for the rule to be had without naming one: at every
# number of slots it lost least for the reads that it saved (tools/studies/fidelity.md).
_USUAL = {
    "on": "budget:0.28",
    "budget": "budget:0.28",
    "light": "light:1",
    "ratio": "ratio:0.35",
    "prior": "prior:0.25",
    "max-rank": "max-rank:1,32",
}
_RANGE_DECAY = 0.95  # of the running logit range, per token (Skliar et al., 2412.00099)
# The budget's limit on a pick's weight, in mean weights, follows what was moved in 16 tokens or so.
# A pick of twice the mean always stays, whatever is left of the budget.
_BUDGET_GAIN = 1 / 16
_LIMITS = (0.25, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CarOptions:
    """Which stand-ins are allowed.

    light     for picks of at most `value` times the mean weight of a layer's picks; the best that
              is there, whatever its distance
    budget    as light, with a multiple that follows, so that over some tens of tokens the displaced
              experts' share of the picks' weight is `value` at most
    ratio     C for E when p_C / p_E >= value (FOMOE's rule; best pairs first)
    prior     top-k of z + value * D for experts that are there, D the layer's running logit range
    max-rank  the best of the true top `max_rank` that are there, whatever their distance

    Under every rule the true top `top_j` stay, and the displaced experts' share of the picks'
    weight is at most `max_mass` per token and layer. Weights come from the router's own
    probabilities: "dampen" keeps their normaliser, so that what a stand-in lacks is dropped;
    "renorm" gives the selection the sum that the picks had.
    """

    rule: Rule = "off"
    value: float = 0.0
    max_rank: int = 0
    top_j: int = 1
    max_mass: float = 1.0
    weights: Weights = "dampen"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise RequestError(f"no CAR rule {self.rule!r}; there are {', '.join(get_args(Rule))}")
        if self.weights not in get_args(Weights):
            raise RequestError(f"CAR weights are dampen or renorm, not {self.weights!r}")
        if self.rule == "ratio" and not 0.0 < self.value <= 1.0:
            raise RequestError(f"CAR ratio: 0 < tau <= 1, not {self.value:g}")
        if self.rule == "budget" and not 0.0 < self.value < 1.0:
            raise RequestError(f"CAR budget: 0 < share of the weight < 1, not {self.value:g}")
        if self.rule in ("light", "prior") and not (self.value > 0.0 and isfinite(self.value)):
            raise RequestError(f"CAR {self.rule}: a positive number, not {self.value:g}")
        if self.rule == "max-rank" and self.max_rank <= self.top_j:
            raise RequestError(
                f"CAR max-rank: M must exceed J, but J is {self.top_j} and M {self.max_rank}"
            )
        if self.top_j < 0:
            raise RequestError(f"CAR top-j is a number of experts, not {self.top_j}")
        if not 0.0 < self.max_mass <= 1.0:
            raise RequestError(f"CAR max-mass: 0 < mass <= 1, not {self.max_mass:g}")

    @property
    def device_rule(self) -> StandInRule:
        """The same for a router on a device."""
        limits = {"ratio": -log(self.value or 1.0), "prior": self.value}
        return StandInRule(
            rule=self.rule,
            limit=limits.get(self.rule, inf),
            top_j=self.top_j,
            max_rank=self.max_rank,
            max_mass=self.max_mass,
            renorm=self.weights == "renorm",
            range_gain=1.0 - _RANGE_DECAY,
        )

    @staticmethod
    def parse(
        rule: str,
        *,
        top_j: int | None = None,
        max_mass: float | None = None,
        weights: str | None = None,
    ) -> CarOptions:
        """Options from text such as "off", "on", "budget:0.28", "light:1", "ratio:0.35",
        "prior:0.12" or "max-rank:2,12" (J and M), or from a rule's name alone. Raises
        RequestError."""
        if rule == "max-rank" and top_j is not None:
            rule = f"max-rank:{top_j},32"
        name, _, text = _USUAL.get(rule, rule).partition(":")
        try:
            numbers = [float(part) for part in text.split(",")] if text else []
        except ValueError:
            numbers = []
        expected = {"off": 0, "budget": 1, "light": 1, "ratio": 1, "prior": 1, "max-rank": 2}.get(
            name
        )
        whole = name != "max-rank" or all(number.is_integer() for number in numbers)
        if expected is None or len(numbers) != expected or (text and not numbers) or not whole:
            raise RequestError(
                f"CAR rule {rule!r} is not one of off, on, budget:SHARE, light:TIMES, ratio:TAU,"
                " prior:LAMBDA, max-rank:J,M"
            )
        if name == "max-rank":
            if top_j not in (None, int(numbers[0])):
                raise RequestError(f"CAR rule {rule!r} names its own top-j; drop the other one")
            top_j = int(numbers[0])
        default = CarOptions()
        return CarOptions(
            rule=name,  # type: ignore[arg-type]  # __post_init__ checks it
            value=numbers[0] if expected == 1 else 0.0,
            max_rank=int(numbers[1]) if expected == 2 else 0,
            top_j=default.top_j if top_j is None else top_j,
            max_mass=default.max_mass if max_mass is None else max_mass,
            weights=default.weights if weights is None else weights,  # type: ignore[arg-type]
        )


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
        # Of the mean weight: what a pick may weigh to be replaced, under light and budget.
        self.limit = options.value if options.rule == "light" else 1.0

    def select(
        self, layer: int, logits: F32Array, ids: I32Array, weights: F32Array, available: BoolArray
    ) -> Selection:
        """Replace picks that would stall, as far as the options allow.

        logits [T, experts], ids and weights [T, k] as the router gave them; available [experts]:
        resident, or in flight and landing before the resident experts of this layer have been
        computed. A read that one token of the step needs anyway is no cost to the others.
        """
        stats = self.stats
        stats.picks += ids.size
        stats.token_layers += len(ids)
        if self.options.rule == "prior":
            self._follow_range(layer, logits)
        chosen = self.preview(layer, logits, ids, weights, available)
        if chosen.displaced:
            stats.substitutions += len(chosen.displaced)
            stats.moved_mass += chosen.moved_mass
            displaced = {expert for expert, _ in chosen.displaced}
            stats.reads_avoided += len(displaced.difference(chosen.ids.ravel().tolist()))
        if self.options.rule == "budget":
            self._follow_budget(chosen.moved_mass / len(ids))
        return chosen

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
            self._ranges[layer] = old + (1.0 - _RANGE_DECAY) * (spread - old) if old else spread

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
            yield from sorted(
                (p for p in pairs if p[2] <= -log(options.value)), key=lambda pair: pair[2]
            )
            return
        limit, floor = np.inf, -np.inf
        if options.rule == "prior":
            limit = options.value * self._ranges[layer]
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
