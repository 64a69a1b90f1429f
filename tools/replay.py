"""Replays recorded routing against cache policies, all layers and several capacities at once.

Owns: the replay, Belady's optimum, the drive model. Does not know: file formats, how results are
shown. A policy scores by use alone, so one pass of it serves all capacities; who is resident at
each of them follows from the scores. tests/test_simulate.py compares it with ExpertCache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from routings import Trace

from fomoe.errors import RequestError
from fomoe.experts.cache import PROMPT_AMOUNT, Amounts, Ids, Policy, make_policy

F64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_CHUNK = 512  # prompt tokens that are computed together


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """What a miss costs: `latency_s` per layer that misses, then bytes at `bytes_per_s`, all of it
    stall but for `overlap_s` per layer (shared and resident experts computed meanwhile)."""

    bytes_per_s: float
    latency_s: float
    overlap_s: float
    expert_bytes: float

    def read_s(self, reads: npt.NDArray[np.integer]) -> F64Array:
        """Seconds until the last of `reads` (per layer) has landed."""
        seconds: F64Array = np.where(
            reads > 0, self.latency_s + reads * (self.expert_bytes / self.bytes_per_s), 0.0
        )
        return seconds

    def stall_s(self, reads: npt.NDArray[np.integer]) -> F64Array:
        """Seconds that the layer waits for them."""
        return np.maximum(0.0, self.read_s(reads) - self.overlap_s)

    def reads_within(self, window_s: float) -> int:
        """How many experts can land in so long a window (the deadline rule)."""
        rate = self.expert_bytes / self.bytes_per_s
        return int(max(0.0, window_s - self.latency_s) / rate)


@dataclass(slots=True)
class Outcome:
    """Decode tokens of one policy at one capacity (slots per layer)."""

    slots: int
    picks: int = 0
    hits: int = 0
    reads: int = 0  # on demand
    ahead_reads: int = 0
    ahead_used: int = 0
    tokens: int = 0
    stall_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.picks if self.picks else float("nan")


class Belady:
    """Keeps what is used again soonest: the bound for any policy, for it knows the trace."""

    name = "belady"

    def __init__(self, trace: Trace) -> None:
        upcoming = np.full(trace.layers * trace.experts, np.inf)
        events = list(_events(trace))
        self._next = []
        for number, event in reversed(list(enumerate(events))):
            self._next.append(upcoming[event.things])
            upcoming[event.things] = number
        self._scores = -upcoming

    def touch(self, things: Ids, clock: int, amount: Amounts = 1.0) -> None:
        self._scores[things] = -self._next.pop()

    def scores(self, clock: int) -> F64Array:
        return self._scores


class LeastStale:
    """First in, first out: what SpecMD's least-stale (2602.03921) is in a per-layer pool, which has
    its other half, that layers already passed leave first, built in."""

    name = "least-stale"

    def __init__(self, size: int) -> None:
        self._scores = np.zeros(size)

    def touch(self, things: Ids, clock: int, amount: Amounts = 1.0) -> None:
        pass

    def admitted(self, things: npt.NDArray[np.integer], clock: int) -> None:
        self._scores[things] = clock + 1

    def scores(self, clock: int) -> F64Array:
        return self._scores


class RouterMass:
    """The smallest decayed sum of router probability leaves: every expert's probability counts, not
    only the picked ones'."""

    name = "mass"

    def __init__(self, size: int, half_life: float) -> None:
        self._mass = np.zeros(size)
        self._half_life = half_life
        self._clock = 0

    def touch(self, things: Ids, clock: int, amount: Amounts = 1.0) -> None:
        pass

    def observe(self, probabilities: npt.NDArray[np.floating], clock: int) -> None:
        self._mass *= 0.5 ** ((clock - self._clock) / self._half_life)
        self._mass += probabilities
        self._clock = clock

    def scores(self, clock: int) -> F64Array:
        return self._mass


def make_any(spec: str, trace: Trace) -> Policy:
    """One of the engine's policies, or "mass", "least-stale" or "belady", which only the simulator
    has. Raises RequestError."""
    if spec == "belady":
        return Belady(trace)
    if spec == "least-stale":
        return LeastStale(trace.layers * trace.experts)
    if spec.partition(":")[0] == "mass":
        if trace.logits is None:
            raise RequestError(f"{trace.name} holds no router logits, which {spec!r} needs")
        return RouterMass(trace.layers * trace.experts, float(spec.partition(":")[2] or 32))
    return make_policy(spec, trace.layers * trace.experts)


def replay(
    trace: Trace,
    spec: str,
    slots: Sequence[int],
    drive: Drive,
    *,
    ahead: int = 0,
    protect: bool = True,
) -> list[Outcome]:
    """Replay a trace with a pool of so many slots per layer, for each number in `slots`.

    The prompt warms the cache; outcomes count decode. `ahead`: read that many predicted, absent
    experts before each layer's event, their victims not among the predicted when `protect`.
    """
    assert min(slots) >= trace.top_k, "a pool holds at least the picks of one event"
    outcomes = []
    # A policy whose scores depend on who is resident serves one capacity at a time.
    alone = spec == "least-stale"
    for group in [[number] for number in slots] if alone else [slots]:
        pools = _Pools(trace, make_any(spec, trace), group)
        for event in _events(trace):
            pools.step(event, drive, ahead, protect)
        outcomes += pools.outcomes
    return outcomes


@dataclass(frozen=True, slots=True)
class _Event:
    """A decode token, or a chunk of a prompt, at all layers."""

    tokens: slice
    things: npt.NDArray[np.integer]  # distinct layer * experts + expert
    amount: Amounts
    clock: int
    decode: bool


def _events(trace: Trace) -> Iterator[_Event]:
    base = (np.arange(trace.layers) * trace.experts)[:, None]
    clock = token = 0
    whole = trace.ids.reshape(len(trace.ids), -1).min(axis=1) >= 0
    while token < len(trace.ids):
        if not trace.prompt[token]:
            things = (base + trace.ids[token]).ravel()
            if not whole[token]:
                things = things[(trace.ids[token] >= 0).ravel()]
            yield _Event(slice(token, token + 1), things, 1.0, clock, True)
            clock += 1
            token += 1
            continue
        end = token + 1
        while end < min(len(trace.ids), token + _CHUNK) and trace.prompt[end]:
            end += 1
        picks = trace.ids[token:end]
        counts = np.bincount((base + picks)[picks >= 0], minlength=trace.layers * trace.experts)
        things = np.flatnonzero(counts)
        yield _Event(slice(token, end), things, counts[things] * PROMPT_AMOUNT, clock, False)
        clock += end - token
        token = end


class _Pools:
    """Who is resident: [capacities, layers, experts]."""

    def __init__(self, trace: Trace, policy: Policy, slots: Sequence[int]) -> None:
        self._trace = trace
        self._policy = policy
        self._slots = np.array(slots)[:, None]
        self._resident = np.zeros((len(slots), trace.layers, trace.experts), np.bool_)
        self._flat: BoolArray = self._resident.reshape(len(slots), -1)
        self.outcomes = [Outcome(slots=number) for number in slots]

    def step(self, event: _Event, drive: Drive, ahead: int, protect: bool) -> None:
        trace, policy = self._trace, self._policy
        read_ahead = None
        if ahead and event.decode:
            read_ahead = self._read_ahead(event, ahead, protect)
        if isinstance(policy, RouterMass):
            policy.observe(_probabilities(trace, event), event.clock)
        hit: BoolArray = self._flat[:, event.things]
        policy.touch(event.things, event.clock, event.amount)
        if isinstance(policy, LeastStale):
            policy.admitted(event.things[np.logical_not(hit[0])], event.clock)
        self._flat[:, event.things] = True
        self._shrink(event.clock, event.things if event.decode else None)
        if event.decode:
            self._count(event, hit, drive, read_ahead)

    def _count(
        self, event: _Event, hit: BoolArray, drive: Drive, read_ahead: BoolArray | None
    ) -> None:
        if hit.shape[1] == self._trace.layers * self._trace.top_k:
            reads = (~hit).reshape(len(hit), self._trace.layers, -1).sum(axis=2)
        else:
            layer = event.things // self._trace.experts
            reads = np.array([np.bincount(layer[~h], minlength=self._trace.layers) for h in hit])
        stalls = drive.stall_s(reads).sum(axis=1).tolist()
        hits = hit.sum(axis=1).tolist()
        for number, outcome in enumerate(self.outcomes):
            outcome.tokens += 1
            outcome.picks += hit.shape[1]
            outcome.hits += hits[number]
            outcome.reads += hit.shape[1] - hits[number]
            outcome.stall_s += stalls[number]
            if read_ahead is not None:
                flat = read_ahead[number].ravel()
                outcome.ahead_reads += int(flat.sum())
                outcome.ahead_used += int(flat[event.things].sum())

    def _read_ahead(self, event: _Event, ahead: int, protect: bool) -> BoolArray:
        """Admit the first `ahead` absent predictions of every layer; which ones, [n, layers, E]."""
        assert self._trace.predicted is not None
        predicted = self._trace.predicted[event.tokens.start]
        rows = np.arange(len(predicted))[:, None]
        absent = ~self._resident[:, rows, predicted] & (predicted >= 0)
        chosen = absent & (np.cumsum(absent, axis=2) <= ahead)
        admitted = np.zeros_like(self._resident)
        pool, layer, rank = np.nonzero(chosen)
        admitted[pool, layer, predicted[layer, rank]] = True
        self._resident |= admitted
        spared = admitted.copy()
        if protect:
            layer, rank = np.nonzero(predicted >= 0)
            spared[:, layer, predicted[layer, rank]] = True
        self._shrink(event.clock, spared)
        return admitted

    def _shrink(self, clock: int, spared: npt.NDArray[np.integer] | BoolArray | None) -> None:
        """Evict what exceeds the slots, the lowest scores first, ties by expert number."""
        excess = (self._resident.sum(axis=2) - self._slots).ravel()
        most = int(excess.max())
        if most <= 0:
            return
        scores = self._policy.scores(clock)
        worth = np.where(self._flat, scores, np.inf)
        if spared is not None and spared.dtype == np.bool_:
            worth[spared.reshape(worth.shape)] = np.inf
        elif spared is not None:
            worth[:, spared] = np.inf
        worth = worth.reshape(-1, self._trace.experts)
        resident = self._resident.reshape(worth.shape)
        if most > self._trace.top_k:
            order = np.argsort(worth, axis=1, kind="stable")[:, :most]
            row, rank = np.nonzero(np.arange(most) < excess[:, None])
            resident[row, order[row, rank]] = False
            return
        rows = np.flatnonzero(excess > 0)
        for left in range(1, most + 1):
            victims = worth[rows].argmin(axis=1)
            resident[rows, victims] = False
            worth[rows, victims] = np.inf
            rows = rows[excess[rows] > left]


def _probabilities(trace: Trace, event: _Event) -> F64Array:
    """The router's softmax of each layer, flat; of a prompt chunk the sum, as its picks count."""
    assert trace.logits is not None
    z = trace.logits[event.tokens].astype(np.float64)
    p = np.exp(z - z.max(axis=2, keepdims=True))
    flat: F64Array = (p / p.sum(axis=2, keepdims=True)).sum(axis=0).ravel()
    return flat if event.decode else flat * PROMPT_AMOUNT
