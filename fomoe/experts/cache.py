"""Who stays: which experts of a layer hold a slot, and which one leaves when room is needed.

Owns: slot numbers by expert, and the policies that score experts by their use. Does not know:
bytes, files, reads, time; its clock counts tokens, so a recorded routing replays exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.errors import RequestError

BoolArray = npt.NDArray[np.bool_]
F64Array = npt.NDArray[np.float64]
Ids = Sequence[int] | npt.NDArray[np.integer]
Amounts = float | npt.NDArray[np.floating]

# What a pick by a token of a prompt counts beside one of its answer. A prompt tells what its answer
# will use, but less surely: at 1 the first 32 tokens of three recordings had 1 to 6 points fewer
# hits than at 1/16, which was within 0.2 points of the best (tools/studies/residency.md).
PROMPT_AMOUNT = 1 / 16
_RESCALE = 512.0  # half-lives after which growing scores are scaled back; float64 holds 1,023


class Policy(Protocol):
    """Scores `size` things by how much they deserve a slot.

    Scores of experts that hold no slot are kept as well (their past counts when they come back).
    The things are usually the experts of one layer; the simulator scores all layers in one go, with
    thing = layer * num_experts + expert.
    """

    name: str

    def touch(self, things: Ids, clock: int, amount: Amounts = 1.0) -> None:
        """The distinct things that one event used; `amount` weighs each (how many tokens of a batch
        picked it, say). `clock` counts tokens and never goes back."""

    def scores(self, clock: int) -> F64Array:
        """[size], the lowest leaves first. May be the policy's own array: not to be written to."""


class Lru:
    """The least recently used one leaves."""

    name = "lru"

    def __init__(self, size: int) -> None:
        self._last = np.full(size, -1.0)

    def touch(self, things: Ids, clock: int, amount: Amounts = 1.0) -> None:
        self._last[things] = clock

    def scores(self, clock: int) -> F64Array:
        return self._last


class Lfru:
    """The largest age ** (1/4) / (1 + uses) leaves, uses halving every `half_life` tokens.

    2608.07911 has age itself and uses that never age; on recorded decode of four models that was
    0.5 to 1.7 points of hit rate worse (tools/studies/residency.md).
    """

    name = "lfru"

    def __init__(self, size: int, half_life: float = 48.0) -> None:
        self._uses = _Decayed(size, half_life)
        self._last = np.full(size, -1.0)

    def touch(self, things: Ids, clock: int, amount: Amounts = 1.0) -> None:
        self._uses.add(things, clock, amount)
        self._last[things] = clock

    def scores(self, clock: int) -> F64Array:
        damped_age = np.sqrt(np.sqrt((clock + 1.0) - self._last))
        return -damped_age / (1.0 + self._uses.values(clock))


class Lfu:
    """The smallest count of uses leaves, counts halving every `half_life` tokens.

    The decay is smooth (LRFU, Lee et al. 2001) rather than stepped: equal counts are then told
    apart by recency, with one float per expert and no work for those that were not used.
    """

    name = "lfu"

    def __init__(self, size: int, half_life: float = 32.0) -> None:
        self._uses = _Decayed(size, half_life)

    def touch(self, things: Ids, clock: int, amount: Amounts = 1.0) -> None:
        self._uses.add(things, clock, amount)

    def scores(self, clock: int) -> F64Array:
        return self._uses.scaled


class _Decayed:
    """Sums that halve every `half_life` tokens. Instead of shrinking all sums, the unit grows."""

    def __init__(self, size: int, half_life: float) -> None:
        self.scaled: F64Array = np.zeros(size)  # values times 2 ** ((clock - base) / half_life)
        self._half_life = half_life
        self._base = 0.0

    def _unit(self, clock: int) -> float:
        exponent = (clock - self._base) / self._half_life
        if exponent > _RESCALE:
            self.scaled *= 2.0**-exponent
            self._base = float(clock)
            exponent = 0.0
        return float(2.0**exponent)

    def add(self, things: Ids, clock: int, amount: Amounts) -> None:
        unit = self._unit(clock)  # first: it may rescale what is added to
        self.scaled[things] += amount * unit

    def values(self, clock: int) -> F64Array:
        return self.scaled / self._unit(clock)


class Below:
    """Another policy's scores for the tier below: what the tier above holds leaves first."""

    def __init__(self, policy: Policy, above: BoolArray) -> None:
        self.name = policy.name
        self._policy = policy
        self._above = above

    def touch(self, things: Ids, clock: int, amount: Amounts = 1.0) -> None:
        self._policy.touch(things, clock, amount)

    def scores(self, clock: int) -> F64Array:
        return np.where(self._above, -np.inf, self._policy.scores(clock))


_POLICIES = {p.name: p for p in (Lru, Lfru, Lfu)}
_WITH_HALF_LIFE = (Lfru, Lfu)


def make_policy(spec: str, size: int) -> Policy:
    """A policy by name: lru, lfu or lfru; the last two take a half-life in tokens, as in "lfu:64".
    Raises RequestError."""
    name, _, argument = spec.partition(":")
    kind = _POLICIES.get(name)
    if kind is None:
        raise RequestError(f"no cache policy {name!r}; there are {', '.join(sorted(_POLICIES))}")
    if not argument:
        return kind(size)
    if kind not in _WITH_HALF_LIFE:
        raise RequestError(f"cache policy {name!r} takes no argument, but {argument!r} was given")
    try:
        half_life = float(argument)
    except ValueError:
        half_life = -1.0
    if not 0.0 < half_life < 1e9:
        raise RequestError(f"cache policy {spec!r}: the half-life is a positive number of tokens")
    return kind(size, half_life)


class ExpertCache:
    """The slots of one layer.

    The picks of one token at one layer (or of a batch of tokens) are one event: touch() them first,
    then make room with them protected, so that no pick of an event ever evicts another.
    An expert enters when its read is submitted (its slot is taken from then on); the store protects
    those whose reads have not landed.
    """

    def __init__(self, num_experts: int, capacity: int, policy: Policy) -> None:
        self.num_experts = num_experts
        self.capacity = capacity  # may be changed at any time; see `excess`
        self.policy = policy
        self.resident: BoolArray = np.zeros(num_experts, np.bool_)  # read-only to others
        self._slot_of = [-1] * num_experts
        self._count = 0
        self._clock = 0

    def __len__(self) -> int:
        return self._count

    @property
    def excess(self) -> int:
        """How many residents must leave before one more may enter; <= 0 where there is room."""
        return self._count + 1 - self.capacity

    def lookup(self, expert: int) -> int:
        """The expert's slot, or -1."""
        return self._slot_of[expert]

    def touch(self, experts: Ids, clock: int, amount: Amounts = 1.0) -> None:
        """One event: the distinct experts that it uses, resident or not. `clock` counts tokens."""
        self._clock = clock
        self.policy.touch(experts, clock, amount)

    def tick(self, clock: int) -> None:
        """Time goes on; its policy was told of the uses by another cache that shares it."""
        self._clock = clock

    def admit(self, expert: int, slot: int) -> None:
        """The expert's bytes are in `slot`, or being read into it."""
        assert self._slot_of[expert] < 0 <= slot, "an expert is admitted once, into a real slot"
        self._slot_of[expert] = slot
        self.resident[expert] = True
        self._count += 1

    def evict(self, expert: int) -> int:
        """Take the expert's slot away and return it."""
        slot = self._slot_of[expert]
        assert slot >= 0, "only a resident can be evicted"
        self._slot_of[expert] = -1
        self.resident[expert] = False
        self._count -= 1
        return slot

    def victim(self, protected: Ids = (), newcomer: int | None = None) -> int | None:
        """The resident that deserves its slot least, none of `protected`; None where all are, or
        where `newcomer` deserves a slot no more than it. Ties: the lowest expert number."""
        candidates = self.resident.copy()
        if len(protected):
            candidates[protected] = False
        scores = self.policy.scores(self._clock)
        least = int(np.where(candidates, scores, np.inf).argmin())
        if not candidates[least]:
            return None
        if newcomer is not None and scores[newcomer] <= scores[least]:
            return None
        return least

    def victims(self, count: int, protected: Ids = ()) -> list[int]:
        """Up to `count` residents in the order in which victim() would name them."""
        candidates = self.resident.copy()
        if len(protected):
            candidates[protected] = False
        experts = np.flatnonzero(candidates)
        order = np.argsort(self.policy.scores(self._clock)[experts], kind="stable")
        victims: list[int] = experts[order[:count]].tolist()
        return victims
