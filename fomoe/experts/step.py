"""The experts that one step needs of one layer: handed to compute as they land.

Owns: what is still to be read, waited for and handed out. Does not know: slots, how reads are
made; its store does that.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from fomoe.errors import ReadError
from fomoe.experts.layer import LayerExperts, Resident
from fomoe.experts.ledger import Ledger

# Steps that need so many experts hand them out by batches of so many.
_MANY = 32
_BATCH = 8
# The event loop's turn comes at least so often while a step waits for reads.
_BLOCK_MS = 2


class ExpertStep:
    """Use: while `experts := await step.landed()`, compute them and call computed(experts); close()
    in any case. Made by ExpertStore.begin."""

    __slots__ = (
        "_arrived", "_begin_ns", "_block", "_computing", "_error", "_landed_ns", "_late",
        "_ledger", "_on_closed", "_on_computed", "_ordered", "_resident", "_started_ns",
        "_urgent", "_waker",
        "begun_ns", "fresh", "layer", "lost", "passing", "pending", "start", "sweeping",
        "waiting", "wanted",
    )  # fmt: skip

    def __init__(
        self,
        layer: LayerExperts,
        experts: Sequence[int],
        resident: Sequence[int],
        *,
        passing: bool,
        ordered: bool,
        ledger: Ledger,
        block: Callable[[int], None],
        on_computed: Callable[[ExpertStep, Sequence[int]], None],
        on_closed: Callable[[ExpertStep], None],
    ) -> None:
        self.layer = layer
        self.passing = passing
        self.wanted = frozenset(experts)
        # More experts than the layer has slots: newcomers must be worth more than who they
        # displace.
        self.sweeping = len(experts) > layer.cache.capacity
        self.begun_ns = 0  # when the first of what was handed out last began, if it did by `start`
        self.fresh = False  # among what was handed out last some have landed since the step began
        self.waiting: set[int] = set()
        self.pending: deque[int] = deque()  # no slot yet
        self.lost = -1  # the expert that could not be read
        # Told of the first expert that lands while nothing is being computed or left to be, before
        # any more is done about reads; True if that has begun it. It is handed out next.
        self.start: Callable[[Resident], bool] | None = None
        # Handed out first: those whose slots may be waited for, read ahead or landed since.
        transit = layer.transit
        self._urgent = [e for e in resident if e in transit] if transit else []
        self._resident = [e for e in resident if e not in transit] if self._urgent else [*resident]
        self._ordered = ordered
        self._ledger = ledger
        self._block = block
        self._on_computed = on_computed
        self._on_closed = on_closed
        self._landed_ns: dict[int, int] = {}
        self._arrived: list[int] = []
        self._late: set[int] = set()
        self._computing = False  # what was handed out last
        self._started_ns = 0  # the same of what is handed out next
        self._begin_ns = time.perf_counter_ns()
        self._waker: asyncio.Future[None] | None = None
        self._error: ReadError | None = None

    def expect_late(self, expert: int) -> None:
        """A read that was started ahead has not landed yet."""
        self.waiting.add(expert)
        self._late.add(expert)

    def arrived(self, expert: int, landed_ns: int) -> None:
        """A read has landed. With `ordered`, experts that were asked for together are handed out
        together, so that who stays does not depend on which of them the drive brings first."""
        self._landed_ns[expert] = landed_ns
        self.waiting.remove(expert)
        self._arrived.append(expert)
        if self._ordered and self.waiting:
            return
        idle = not (self._computing or self._urgent or self._resident)
        self._urgent += sorted(self._arrived) if self._ordered else self._arrived
        self._arrived.clear()
        if self.start is not None and idle:
            first = self._urgent[0]
            if self.start(self.layer.ready[first]):
                self._started_ns = time.perf_counter_ns()
                self._ledger.note_handover(self._started_ns - self._landed_ns.pop(first))
        self._wake()

    def read_again(self, expert: int) -> None:
        """The read that was waited for had been given up before: it is to be made anew."""
        self.waiting.remove(expert)
        self.pending.append(expert)

    def fail(self, expert: int, error: ReadError) -> None:
        """A read failed for good: landed() raises."""
        self.lost = expert
        self._error = error
        self._wake()

    def take(self) -> list[Resident]:
        """Experts that can be computed now, without waiting. Of a prompt's many they come in small
        batches as long as others have to be read: what is computed gives its slots to reads, and
        the drive must not run dry meanwhile."""
        experts = self._next()
        now, landed = time.perf_counter_ns(), self._landed_ns
        waited = [now - landed.pop(e) for e in experts if e in landed]
        self.begun_ns, self._started_ns = self._started_ns, 0
        self.fresh = bool(self.begun_ns or waited)
        self._computing = bool(experts)
        self._ledger.note_handover(*waited)
        ready = self.layer.ready
        return [ready[e] for e in experts]

    def _next(self) -> list[int]:
        urgent, resident = self._urgent, self._resident
        if self._ordered and resident:
            self._resident = []
            return resident
        if len(self.wanted) < _MANY or self._ordered or not (self.pending or self.waiting):
            self._urgent, self._resident = [], []
            return urgent + resident
        experts = urgent[:_BATCH] or resident[:_BATCH]
        del (urgent or resident)[:_BATCH]
        return experts

    @property
    def complete(self) -> bool:
        """Every expert has been handed out."""
        return not (self.has_more or self.pending)

    @property
    def has_more(self) -> bool:
        """Experts that were asked for have not been handed out yet."""
        return bool(self._urgent or self._resident or self.waiting)

    async def landed(self, *, at_once: bool = False) -> list[Resident]:
        """Experts to be computed, as of take(), waiting for one to land if there is none; [] at the
        end. `at_once`: the event loop stands still meanwhile but for a turn every other
        millisecond. It takes 40 us to notice a landing and to come back here, in which short
        computing would have begun.

        Raises ReadError when a read failed for good.
        """
        if not (self._urgent or self._resident) and (self.waiting or self.pending):
            begin = time.perf_counter_ns()
            if self._begin_ns:
                window = begin - self._begin_ns
                self.layer.window_ns += (window - self.layer.window_ns) / 16
                self._begin_ns = 0
            while not self._urgent and self._error is None:
                if at_once:
                    self._block(_BLOCK_MS)
                    if not self._urgent:
                        await asyncio.sleep(0)
                    continue
                self._waker = asyncio.get_running_loop().create_future()
                await self._waker
            self._waker = None
            expert = self._urgent[0] if self._urgent else None
            end, late = max(self._wait_end(), begin), expert in self._late
            self._ledger.note_stall(self.layer.index, begin, end, expert, late=late)
        if self._error is not None:
            raise self._error
        return self.take()

    def _wait_end(self) -> int:
        """When the drive was waited for no more: the event loop may have come back later."""
        if self._started_ns:
            return self._started_ns
        landed = [self._landed_ns[e] for e in self._urgent]
        if not landed:  # a read has failed
            return time.perf_counter_ns()
        return max(landed) if self._ordered else min(landed)

    def computed(self, experts: Sequence[Resident]) -> None:
        """Compute is done with the experts that take() or landed() gave last."""
        self._computing = False
        self._on_computed(self, [e[0] for e in experts])

    def close(self) -> None:
        """The step is over; what is still being read lands in the cache."""
        self._on_closed(self)

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)
