"""The expert store: moves experts from the drive into slots, and hands them to compute as they
land.

Owns: which reads are made, and when. Does not know: how it is decided who stays (cache.py), which
slots may be reused (layer.py), how bytes are read (fomoe.io), what is computed. All methods run on
the event loop's thread.

An expert is absent, loading or ready. A ready expert is *held* while a step still has to compute
it. Only ready experts that nobody holds are evicted. An expert that finds no slot of its layer
travels in a transit slot, and when all of those are taken it waits until a computed expert makes
room.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Sequence, Set
from functools import partial

import numpy as np
import numpy.typing as npt

from fomoe.errors import ReadError
from fomoe.experts.cache import PROMPT_AMOUNT, ExpertCache
from fomoe.experts.layer import LayerExperts
from fomoe.experts.layout import ExpertLayout
from fomoe.experts.ledger import Ledger, StoreStats
from fomoe.experts.slots import SlotPool
from fomoe.experts.step import ExpertStep
from fomoe.io.reader import Priority, Reader, ReadRequest
from fomoe.trace import Tracer

# Experts on their way at a time while the cache is being seeded.
SEEDS_AHEAD = 4


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
        self._ledger = Ledger(tracer)
        self._layers = [
            LayerExperts(i, layout, pool, cache, top_k, self._ledger)
            for i, (layout, pool, cache) in enumerate(zip(layouts, pools, caches, strict=True))
        ]
        self._steps: list[ExpertStep | None] = [None] * len(self._layers)
        self.stats: StoreStats = self._ledger.stats
        # Of each layer, where the experts are that a step may use without asking: LayerExperts.
        self.tables = [state.table for state in self._layers]
        self.num_ahead = 0  # experts being read that no step waits for
        self._read_ns = 0.0  # a running mean of a read's time in flight
        self._early: tuple[int, list[int]] = (0, [])  # layer, and who is held for its next step
        self._landing = asyncio.Event()
        self._poll: select.poll | None = None

    @property
    def clock(self) -> int:
        """Tokens seen; the time by which uses age."""
        return self._ledger.clock

    def advance(self, num_tokens: int) -> None:
        """A step of so many tokens has been computed."""
        self._ledger.clock += num_tokens

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

    def available(
        self, layer: int, *, in_flight: bool = True, begins_ns: float = 0.0
    ) -> npt.NDArray[np.bool_]:
        """Experts whose use would not stall, bool [experts]: ready, or (`in_flight`) being read and
        expected before the ready ones of a step have been computed that begins in `begins_ns`. A
        copy."""
        state = self._layers[layer]
        result = state.cache.resident.copy()
        result[list(state.transit)] = True
        now = time.perf_counter_ns()
        for expert, request in state.loading.items():
            if expert in state.abandoned:
                result[expert] = False
                continue
            begun = request.submitted_ns
            lands = begun + self._read_ns if begun else now + 2 * self._read_ns
            result[expert] = in_flight and lands <= now + begins_ns + state.window_ns
        return result

    async def settle(self) -> None:
        """Wait until nothing is being read."""
        while any(state.loading for state in self._layers):
            await self._next_landing()

    def _block(self, milliseconds: int) -> None:
        """Let reads land, waiting for one at most so long, without the event loop."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._reader.fileno(), select.POLLIN)
        if self._poll.poll(milliseconds):
            self._reader.land()

    async def _next_landing(self) -> None:
        self._landing.clear()
        await self._landing.wait()

    def capacities(self) -> list[int]:
        """Of each layer, experts that seed() finds slots for."""
        return [state.cache.capacity for state in self._layers]

    async def seed(self, order: Sequence[tuple[int, int]]) -> None:
        """Read experts (layer, expert) in the background, in this order, into free slots."""
        for layer, expert in order:
            while self.num_ahead >= SEEDS_AHEAD:
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

    @property
    def num_layers(self) -> int:
        return len(self._layers)

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

    def hold(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """Who of these is ready is being computed: it stays until the step is over that begins
        next, or until let_go()."""
        state = self._layers[layer]
        ready = [e for e in ids.ravel().tolist() if e in state.ready]
        state.held.update(ready)
        self._early = layer, ready

    def let_go(self) -> None:
        """The step that hold() was about will not begin, and nothing is computed any more."""
        layer, ready = self._early
        self._layers[layer].held.difference_update(ready)

    def begin(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], *, passing: bool = False
    ) -> ExpertStep:
        """A step needs `experts` (distinct) of a layer, `counts[i]` tokens picking experts[i].

        Reads of what is missing are on their way when this returns. The step must be closed. One
        that is only `passing` leaves no trace in the cache: what it misses goes through transit.
        """
        state = self._layers[layer]
        assert self._steps[layer] is None, "one step at a time per layer"
        passing = passing and state.pool.transit > 0
        ready, picks = state.ready, sum(counts)
        resident = [e for e in experts if e in ready]
        step = self._steps[layer] = ExpertStep(
            state,
            experts,
            resident,
            passing=passing,
            ordered=self._ordered,
            ledger=self._ledger,
            block=self._block,
            on_computed=self._computed,
            on_closed=self._closed,
        )
        state.held.update(experts)
        self._early = layer, []
        # A passing step is not part of what is counted.
        stats = StoreStats() if passing else self.stats
        stats.uses += len(experts)
        stats.hits += len(resident)
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
        if not passing:
            self._ledger.note_picks(layer, experts, counts, step.pending, state.loading)
        if state.transit:
            state.drop_transit(step.wanted)
        if step.pending:
            self._read_pending(step)
        if state.transit:
            self._abandon_unwanted(state, step.wanted)
        return step

    def passed(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """A step has computed `experts` of a layer by its table, without asking: what begin notes
        of a step that misses nothing."""
        state, stats, picks = self._layers[layer], self.stats, sum(counts)
        stats.uses += len(experts)
        stats.hits += len(experts)
        stats.picks += picks
        stats.pick_hits += picks
        self._ledger.note_picks(layer, experts, counts, (), {})
        if state.transit:
            wanted = frozenset(experts)
            state.drop_transit(wanted)
            self._abandon_unwanted(state, wanted)

    def _abandon_unwanted(self, state: LayerExperts, wanted: Set[int]) -> None:
        """Guesses that were wrong: what of them has not been sent to the drive is not read."""
        wrong = {e for e in state.transit if e in state.loading and e not in wanted}
        for expert in wrong - state.abandoned:
            state.abandoned.add(expert)
            self._reader.abandon(state.loading[expert])

    def _promote(self, state: LayerExperts, expert: int) -> None:
        if expert in state.ahead:
            state.ahead.remove(expert)
            self.num_ahead -= 1
            self._reader.promote(state.loading[expert])

    def prefetch(
        self, layer: int, experts: Sequence[int], *, certain: bool = False, guess: bool = False
    ) -> int:
        """Start reads of experts that will probably be needed, in order, as far as there are slots
        for them. Returns how many of `experts` are dealt with: read, or there already.

        They are background reads, unless they are `certain` enough to be no guess: those keep as
        much in flight as demand does, where background reads would leave a drive half idle. A
        mere `guess` evicts nobody until it is used.
        """
        state = self._layers[layer]
        requests = []
        done = 0
        for expert in experts:
            if not state.address[expert]:
                evicts = not guess or len(state.cache) < state.cache.capacity
                slot = state.take_slot(expert, newcomer=True) if evicts else None
                if slot is None:
                    slot = state.take_transit(expert, state.reserve)
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

    def _read_pending(self, step: ExpertStep) -> None:
        """Give slots to experts that a step still needs, as far as there are any, and read them."""
        state, requests = step.layer, []
        while step.pending:
            expert, slot = step.pending[0], None
            if not step.passing:
                slot = state.take_slot(expert, newcomer=step.sweeping)
            if slot is None:
                slot = state.take_transit(expert)
            if slot is None:
                break
            step.pending.popleft()
            step.waiting.add(expert)
            requests.append(self._request(state, expert, slot))
        if requests:
            self._reader.submit(requests, Priority.DEMAND)

    def _request(self, state: LayerExperts, expert: int, slot: int) -> ReadRequest:
        request = ReadRequest(
            extents=state.layout.extents(expert, slot),
            done=partial(self._done, state, expert),
            what=f"layer {state.index} expert {expert}",
        )
        state.load(expert, slot, request)
        return request

    def _done(self, state: LayerExperts, expert: int, request: ReadRequest) -> None:
        """The kernel is done with an expert's slot."""
        del state.loading[expert]
        was_abandoned = expert in state.abandoned
        state.abandoned.discard(expert)
        self._note_landing(state, expert, request)
        step = self._steps[state.index]
        if request.error or request.cancelled:
            state.forget(expert)
            if not step or expert not in step.waiting:
                return
            if request.cancelled and was_abandoned:  # a guess, called wrong before it was right
                step.read_again(expert)
                self._read_pending(step)
            else:
                step.fail(expert, _read_error(request))
            return
        state.land(expert)
        wanted = step is not None and expert in step.wanted
        nbytes = state.layout.expert_bytes
        self._ledger.note_read(state.index, expert, request, nbytes, wanted=wanted)
        if step and expert in step.waiting:
            step.arrived(expert, request.landed_ns)
        elif step and expert in state.transit and not wanted:
            state.forget(expert)

    def _note_landing(self, state: LayerExperts, expert: int, request: ReadRequest) -> None:
        if expert in state.ahead:
            state.ahead.remove(expert)
            self.num_ahead -= 1
        if request.error is None and not request.cancelled:
            flight = request.landed_ns - request.submitted_ns
            self._read_ns += (flight - self._read_ns) / 16 if self._read_ns else flight
        self._landing.set()

    def _computed(self, step: ExpertStep, experts: Sequence[int]) -> None:
        """Compute is done with these experts: their slots may be reused."""
        step.layer.release(experts, keep=not step.passing, newcomers=step.sweeping)
        # In order, what is asked for next must not depend on who has landed by now.
        if step.pending and not (self._ordered and step.has_more):
            self._read_pending(step)

    def _closed(self, step: ExpertStep) -> None:
        """A step is over, complete or not: nothing is held, transit slots are given back."""
        state = step.layer
        self._steps[state.index] = None
        state.held.difference_update(step.wanted)
        state.drop_transit()


def _read_error(request: ReadRequest) -> ReadError:
    if request.error is None:
        return ReadError(f"{request.what}: the read was cancelled")
    return ReadError(
        f"{request.what}: {request.error}. Check the drive (dmesg, smartctl) and the file"
    )
