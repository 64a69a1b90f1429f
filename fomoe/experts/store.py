"""The expert store: moves experts from the drive into slots, and hands them to compute as they
land.

Owns: slots, reads in flight, and the promise that a slot is never reused while the kernel may write
to it or compute may read it. Does not know: how it is decided who stays (cache.py), how bytes are
read (fomoe.io), what is computed. All methods run on the event loop's thread.

An expert is absent, loading or ready. A ready expert is *held* while a step still has to compute
it. Only ready experts that nobody holds are evicted. An expert that finds no slot of its layer
travels in a transit slot, and when all of those are taken it waits until a computed expert makes
room.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from fomoe.errors import ReadError
from fomoe.experts.cache import PROMPT_AMOUNT, ExpertCache
from fomoe.experts.layout import ExpertLayout
from fomoe.experts.slots import SlotPool
from fomoe.io.reader import Priority, Reader, ReadRequest
from fomoe.trace import Kind, Reason, Source, Tracer

# An expert as compute takes it: its number, and the addresses of gate, up and down.
Resident = tuple[int, int, int, int]


# Experts on their way at a time while the cache is being seeded.
_SEEDS_AHEAD = 4


@dataclass(slots=True)
class StoreStats:
    """Counters since the store was made. A pick is one expert of one token at one layer; a use is
    one
    expert that a step needed at one layer, by however many tokens."""

    picks: int = 0
    pick_hits: int = 0  # picks of experts that were ready when the router named them
    uses: int = 0
    hits: int = 0
    late: int = 0  # uses whose read was under way already (prefetch, read-ahead)
    expert_reads: int = 0
    expert_bytes: int = 0  # payload of those reads
    stall_ns: int = 0  # the forward waited for a read and had nothing to compute
    handover_ns: list[int] = field(default_factory=list)  # landed -> compute, latest 4096


@dataclass(slots=True)
class _Layer:
    """One layer's experts. `address` holds the slot of every loading or ready expert, else 0;
    `ready` those whose bytes are there, as compute takes them."""

    index: int
    layout: ExpertLayout
    pool: SlotPool
    cache: ExpertCache
    address: list[int]
    reserve: int  # transit slots that reads ahead leave to the step that is being computed
    window_ns: float = 0.0  # a running mean of how long a step computes before it has to wait
    ready: dict[int, Resident] = field(default_factory=dict)
    loading: dict[int, ReadRequest] = field(default_factory=dict)
    transit: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    ahead: set[int] = field(default_factory=set)
    predicted: list[int] = field(default_factory=list)
    step: ExpertStep | None = None

    def busy(self) -> list[int]:
        """Experts whose slots the kernel may write to or compute may read."""
        return [*self.held, *self.loading]


class ExpertStore:
    """The experts of all layers. `layouts`, `pools` and `caches` have one entry per layer; a
    cache's capacity is the number of the pool's slots that are its layer's. `ordered`: who stays
    does not depend on which read lands first (ExpertStep.arrived).
    """

    def __init__(
        self,
        *,
        layouts: Sequence[ExpertLayout],
        pools: Sequence[SlotPool],
        caches: Sequence[ExpertCache],
        reader: Reader,
        top_k: int,
        ordered: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        self._reader = reader
        self._ordered = ordered
        self._tracer = tracer
        self._layers = [
            _Layer(i, layout, pool, cache, [0] * layout.num_experts, top_k)
            for i, (layout, pool, cache) in enumerate(zip(layouts, pools, caches, strict=True))
        ]
        self.stats = StoreStats()
        self.num_ahead = 0  # experts being read that no step waits for
        self._read_ns = 0.0  # a running mean of a read's time in flight
        self._landing = asyncio.Event()
        self.clock = 0  # tokens seen; the time by which uses age

    def note_uses(
        self,
        layer: int,
        ids: npt.NDArray[np.int32],
        *,
        prompt: bool,
        amounts: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """The router of a layer picked ids [T, k] for tokens of prompts, or generated ones: one
        event. `amounts` [T, k] weighs the picks, which otherwise count one each."""
        cache = self._layers[layer].cache
        if len(ids) == 1 and not prompt:
            # As numpy indexes: with other integers each of its uses costs microseconds more.
            experts = ids[0].astype(np.intp)
            cache.touch(experts, self.clock, 1.0 if amounts is None else amounts[0])
            return
        flat = None if amounts is None else amounts.ravel()
        sums = np.bincount(ids.ravel(), flat, minlength=cache.num_experts)
        experts = np.flatnonzero(sums)
        cache.touch(experts, self.clock, sums[experts] * (PROMPT_AMOUNT if prompt else 1.0))

    def available(self, layer: int, *, in_flight: bool = True) -> npt.NDArray[np.bool_]:
        """Experts whose use would not stall, bool [experts]: ready, or (`in_flight`) being read and
        expected before the ready ones of a step have been computed. A copy."""
        state = self._layers[layer]
        result = state.cache.resident.copy()
        result[list(state.transit)] = True
        now = time.perf_counter_ns()
        for expert, request in state.loading.items():
            begun = request.submitted_ns
            lands = begun + self._read_ns if begun else now + 2 * self._read_ns
            result[expert] = in_flight and lands <= now + state.window_ns
        return result

    async def settle(self) -> None:
        """Wait until nothing is being read."""
        while any(state.loading for state in self._layers):
            await self._next_landing()

    async def _next_landing(self) -> None:
        self._landing.clear()
        await self._landing.wait()

    async def seed(self, order: Sequence[tuple[int, int]]) -> None:
        """Read experts (layer, expert) in the background, in this order, into free slots."""
        for layer, expert in order:
            while self.num_ahead >= _SEEDS_AHEAD:
                await self._next_landing()
            cache = self._layers[layer].cache
            if len(cache) < cache.capacity:
                self.prefetch(layer, [expert])

    def is_ready(self, layer: int, expert: int) -> bool:
        """The expert's bytes are in memory."""
        return expert in self._layers[layer].ready

    def is_known(self, layer: int, expert: int) -> bool:
        """The expert is in memory, or being read."""
        return self._layers[layer].address[expert] != 0

    def expert_bytes(self, layer: int) -> int:
        return self._layers[layer].layout.expert_bytes

    def window_seconds(self, layer: int) -> float:
        """How long a step of this layer computes before it has to wait, of late."""
        return self._layers[layer].window_ns / 1e9

    @property
    def read_seconds(self) -> float:
        """How long an expert's read takes, of late."""
        return self._read_ns / 1e9

    @property
    def drive_idle(self) -> bool:
        return self._reader.idle()

    def protect(self, layer: int, experts: Sequence[int]) -> None:
        """Experts that a layer will probably need next: reads ahead do not evict them."""
        self._layers[layer].predicted = list(experts)

    def begin(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], *, passing: bool = False
    ) -> ExpertStep:
        """A step needs `experts` (distinct) of a layer, `counts[i]` tokens picking experts[i].

        Reads of what is missing are on their way when this returns. The step must be closed. One
        that is only `passing` leaves no trace in the cache: what it misses goes through transit.
        """
        state = self._layers[layer]
        assert state.step is None, "one step at a time per layer"
        passing = passing and state.pool.transit > 0
        step = ExpertStep(self, state, experts, passing)
        state.step = step
        state.held.update(experts)
        # A passing step is not part of what is counted.
        stats = StoreStats() if passing else self.stats
        ready, picks = state.ready, sum(counts)
        step.landed_experts = [e for e in experts if e in ready]
        stats.uses += len(experts)
        stats.hits += len(step.landed_experts)
        stats.picks += picks
        stats.pick_hits += picks
        for expert, count in zip(experts, counts, strict=True):
            if expert in ready:
                continue
            stats.pick_hits -= count
            if expert in state.loading:
                stats.late += 1
                step.expect_late(expert)
                self._promote(state, expert)
            else:
                step.pending.append(expert)
        if self._tracer and not passing:
            self._note_picks(self._tracer, state, experts, counts, step.pending)
        if state.transit:
            self._drop_unwanted_transit(state)
        if step.pending:
            self._read_pending(state, step)
        return step

    def _note_picks(
        self,
        tracer: Tracer,
        state: _Layer,
        experts: Sequence[int],
        counts: Sequence[int],
        missing: Sequence[int],
    ) -> None:
        now, layer, late = time.perf_counter_ns(), state.index, state.loading.keys()
        codes = [e * 4 for e in experts]
        if missing or late:
            absent = frozenset(missing)
            codes = [
                e * 4 + (Source.MISSING if e in absent else Source.IN_FLIGHT if e in late else 0)
                for e in experts
            ]
        if sum(counts) == len(counts):
            tracer.picks(now, layer, self.clock, codes)
            return
        for code, count in zip(codes, counts, strict=True):
            tracer.event(Kind.USE, now, now, layer, code >> 2, self.clock, count, code & 3)

    def _promote(self, state: _Layer, expert: int) -> None:
        if expert in state.ahead:
            state.ahead.remove(expert)
            self.num_ahead -= 1
            self._reader.promote(state.loading[expert])

    def prefetch(self, layer: int, experts: Sequence[int], *, certain: bool = False) -> int:
        """Start reads of experts that will probably be needed, in order, as far as there are slots
        for them. Returns how many of `experts` are dealt with: read, or there already.

        They are background reads, unless they are `certain` enough to be no guess: those keep as
        much in flight as demand does, where background reads would leave a drive half idle.
        """
        state = self._layers[layer]
        requests = []
        done = 0
        for expert in experts:
            if not state.address[expert]:
                slot = self._take_slot(state, expert, newcomer=True, reserve=state.reserve)
                if slot is None:
                    break
                requests.append(self._request(state, expert, slot))
                if not certain:
                    state.ahead.add(expert)
                    self.num_ahead += 1
            done += 1
        if requests:
            self._reader.submit(requests, Priority.DEMAND if certain else Priority.BACKGROUND)
        return done

    def _read_pending(self, state: _Layer, step: ExpertStep) -> None:
        """Give slots to experts that a step still needs, as far as there are any, and read them."""
        requests = []
        while step.pending:
            slot = (
                self._take_transit(state, step.pending[0])
                if step.passing
                else self._take_slot(state, step.pending[0], newcomer=step.sweeping)
            )
            if slot is None:
                break
            expert = step.pending.popleft()
            step.waiting.add(expert)
            requests.append(self._request(state, expert, slot))
        if requests:
            self._reader.submit(requests, Priority.DEMAND)

    def _request(self, state: _Layer, expert: int, slot: int) -> ReadRequest:
        request = ReadRequest(
            extents=state.layout.extents(expert, slot),
            done=partial(self._done, state, expert),
            what=f"layer {state.index} expert {expert}",
        )
        state.address[expert] = slot
        state.loading[expert] = request
        return request

    def _take_slot(
        self, state: _Layer, expert: int, *, newcomer: bool, reserve: int = 0
    ) -> int | None:
        """A slot to read an expert into: one that the layer may still fill, that of an expert
        evicted
        for it, or one in transit while more than `reserve` of those are free. With `newcomer` an
        expert is evicted only for one that the policy values more."""
        cache = state.cache
        if len(cache) < cache.capacity:
            slot = state.pool.take()
            cache.admit(expert, slot)
            return slot
        protected = state.busy()
        if newcomer:
            protected += state.predicted
        victim = cache.victim(protected, newcomer=expert if newcomer else None)
        if victim is not None:
            slot = self._evict(state, victim)
            cache.admit(expert, slot)
            return slot
        return self._take_transit(state, expert, reserve)

    def _take_transit(self, state: _Layer, expert: int, reserve: int = 0) -> int | None:
        slot = state.pool.take_transit(reserve)
        if slot is not None:
            state.transit.add(expert)
        return slot

    def _evict(self, state: _Layer, victim: int) -> int:
        slot = state.address[victim]
        assert slot
        assert victim not in state.held
        del state.ready[victim]
        state.address[victim] = 0
        state.cache.evict(victim)
        self._note_eviction(state, victim)
        return slot

    def _note_eviction(self, state: _Layer, expert: int) -> None:
        if self._tracer:
            now = time.perf_counter_ns()
            self._tracer.event(Kind.EVICT, now, now, state.index, expert, self.clock)

    def _done(self, state: _Layer, expert: int, request: ReadRequest) -> None:
        """The kernel is done with an expert's slot."""
        del state.loading[expert]
        self._account(state, expert, request)
        if request.error or request.cancelled:
            self._forget(state, expert)
            if state.step and expert in state.step.waiting:
                state.step.fail(expert, _read_error(request))
            return
        address = state.address[expert]
        state.ready[expert] = (expert, *state.layout.addresses(expert, address))
        self.stats.expert_reads += 1
        self.stats.expert_bytes += state.layout.expert_bytes
        step = state.step
        if self._tracer:
            wanted = step is not None and expert in step.wanted
            self._tracer.event(
                Kind.READ if wanted else Kind.PREFETCH,
                request.queued_ns,
                request.landed_ns,
                state.index,
                expert,
                self.clock,
                a=state.layout.expert_bytes,
                b=request.submitted_ns - request.queued_ns,
            )
        if step and expert in step.waiting:
            step.landed_ns[expert] = request.landed_ns
            step.arrived(expert, ordered=self._ordered)
        elif expert in state.transit and step and expert not in step.wanted:
            self._forget(state, expert)

    def _account(self, state: _Layer, expert: int, request: ReadRequest) -> None:
        if expert in state.ahead:
            state.ahead.remove(expert)
            self.num_ahead -= 1
        if request.error is None and not request.cancelled:
            flight = request.landed_ns - request.submitted_ns
            self._read_ns += (flight - self._read_ns) / 16 if self._read_ns else flight
        self._landing.set()

    def _forget(self, state: _Layer, expert: int) -> None:
        """A slot goes back to its pool without its expert being kept."""
        slot = state.address[expert]
        state.address[expert] = 0
        state.ready.pop(expert, None)
        self._note_eviction(state, expert)
        if expert in state.transit:
            state.transit.remove(expert)
            state.pool.give_transit(slot)
        else:
            state.cache.evict(expert)
            state.pool.give(slot)

    def _drop_unwanted_transit(self, state: _Layer) -> None:
        """Experts that were read ahead for this step, and that it does not need."""
        assert state.step is not None
        wanted = state.step.wanted
        for expert in [e for e in state.transit if e not in wanted and e not in state.loading]:
            self._forget(state, expert)

    def _computed(self, state: _Layer, experts: Sequence[int], step: ExpertStep) -> None:
        """Compute is done with these experts: their slots may be reused."""
        state.held.difference_update(experts)
        for expert in [e for e in experts if e in state.transit] if state.transit else ():
            victim = None
            if not step.passing:
                victim = state.cache.victim(state.busy(), newcomer=expert)
            if victim is None:
                self._forget(state, expert)
            else:
                state.pool.give_transit(self._evict(state, victim))
                state.transit.remove(expert)
                state.cache.admit(expert, state.address[expert])
        if step.pending:
            self._read_pending(state, step)

    def _end(self, state: _Layer, step: ExpertStep) -> None:
        """A step is over, complete or not: nothing is held, transit slots are given back."""
        state.step = None
        state.held.difference_update(step.wanted)
        for expert in [e for e in state.transit if e not in state.loading]:
            self._forget(state, expert)


class ExpertStep:
    """The experts that one step needs of one layer. Use: while `experts := await step.landed()`,
    compute them and call computed(experts); close() in any case."""

    def __init__(
        self, store: ExpertStore, state: _Layer, experts: Sequence[int], passing: bool
    ) -> None:
        self._store = store
        self._state = state
        self.passing = passing
        self.wanted = frozenset(experts)
        # More experts than the layer has slots: newcomers must be worth more than who they
        # displace.
        self.sweeping = len(experts) > state.cache.capacity
        self.landed_experts: list[int] = []
        self.landed_ns: dict[int, int] = {}
        self.waiting: set[int] = set()
        self._arrived: list[int] = []
        self._late: set[int] = set()
        self.pending: deque[int] = deque()
        self._begin_ns = time.perf_counter_ns()
        self._waker: asyncio.Future[None] | None = None
        self._error: ReadError | None = None
        self.lost = -1  # the expert that could not be read

    def expect_late(self, expert: int) -> None:
        """A read that was started ahead has not landed yet."""
        self.waiting.add(expert)
        self._late.add(expert)

    def arrived(self, expert: int, *, ordered: bool) -> None:
        """A read has landed. With `ordered`, experts that were asked for together are handed out
        together, so that who stays does not depend on which of them the drive brings first."""
        self.waiting.remove(expert)
        self._arrived.append(expert)
        if ordered and self.waiting:
            return
        self.landed_experts += sorted(self._arrived) if ordered else self._arrived
        self._arrived.clear()
        self.wake()

    def take(self) -> list[Resident]:
        """The experts that can be computed now, without waiting."""
        experts, self.landed_experts = self.landed_experts, []
        if self.landed_ns:
            now = time.perf_counter_ns()
            handover = self._store.stats.handover_ns
            for expert in experts:
                if expert in self.landed_ns:
                    handover.append(now - self.landed_ns.pop(expert))
            del handover[:-4096]
        ready = self._state.ready
        return [ready[e] for e in experts]

    @property
    def complete(self) -> bool:
        """Every expert has been handed out."""
        return not (self.landed_experts or self.waiting or self.pending)

    async def landed(self) -> list[Resident]:
        """The experts that landed since the last call, waiting for one if none has; [] at the end.

        Raises ReadError when a read failed for good.
        """
        if not self.landed_experts and (self.waiting or self.pending):
            begin = time.perf_counter_ns()
            if self._begin_ns:
                window = begin - self._begin_ns
                self._state.window_ns += (window - self._state.window_ns) / 16
                self._begin_ns = 0
            while not self.landed_experts and self._error is None:
                self._waker = asyncio.get_running_loop().create_future()
                await self._waker
            self._waker = None
            self._stalled(begin)
        if self._error is not None:
            raise self._error
        return self.take()

    def computed(self, experts: Sequence[Resident]) -> None:
        """Compute is done with experts that take() or landed() gave."""
        self._store._computed(self._state, [e[0] for e in experts], self)

    def close(self) -> None:
        """The step is over; what is still being read lands in the cache."""
        self._store._end(self._state, self)

    def wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def fail(self, expert: int, error: ReadError) -> None:
        self.lost = expert
        self._error = error
        self.wake()

    def _stalled(self, begin: int) -> None:
        end = time.perf_counter_ns()
        store = self._store
        store.stats.stall_ns += end - begin
        if store._tracer and self.landed_experts:
            expert = self.landed_experts[0]
            reason = Reason.LATE if expert in self._late else Reason.UNKNOWN
            store._tracer.event(
                Kind.STALL, begin, end, self._state.index, expert, store.clock, a=reason
            )


def _read_error(request: ReadRequest) -> ReadError:
    if request.error is None:
        return ReadError(f"{request.what}: the read was cancelled")
    return ReadError(
        f"{request.what}: {request.error}. Check the drive (dmesg, smartctl) and the file"
    )
