"""The store's ledger: what happens to experts, counted and told to the tracer.

Owns: the counters, and the clock that counts tokens. Does not know: slots, who stays.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fomoe.io.reader import ReadRequest
from fomoe.trace import Tracer
from fomoe.trace_format import Kind, Reason, Source


@dataclass(slots=True)
class StoreStats:
    """Counters since the store was made. A pick is one expert of one token at one layer; a use is
    one expert that a step needed at one layer, by however many tokens."""

    picks: int = 0
    pick_hits: int = 0  # picks of experts that were ready when the router named them
    uses: int = 0
    hits: int = 0
    late: int = 0  # uses whose read was under way already (prefetch, read-ahead)
    expert_reads: int = 0
    expert_bytes: int = 0  # payload of those reads
    stall_ns: int = 0  # the forward waited for a read and had nothing to compute
    handover_ns: deque[int] = field(default_factory=lambda: deque(maxlen=4096))  # landed -> compute


class Ledger:
    """Counts, and notes in a recording where there is one."""

    __slots__ = ("clock", "stats", "tracer")

    def __init__(self, tracer: Tracer | None) -> None:
        self.stats = StoreStats()
        self.tracer = tracer
        self.clock = 0  # tokens seen; the time by which uses age

    def note_picks(
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        missing: Collection[int],
        late: Collection[int],
    ) -> None:
        """A step needs `experts`, counts[i] tokens picking experts[i]; some of them are absent, or
        being read."""
        tracer = self.tracer
        if tracer is None:
            return
        now = time.perf_counter_ns()
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

    def note_read(
        self, layer: int, expert: int, request: ReadRequest, nbytes: int, *, wanted: bool
    ) -> None:
        """An expert of `nbytes` has landed, `wanted` by a step or read ahead."""
        self.stats.expert_reads += 1
        self.stats.expert_bytes += nbytes
        if self.tracer:
            self.tracer.event(
                Kind.READ if wanted else Kind.PREFETCH,
                request.queued_ns,
                request.landed_ns,
                layer,
                expert,
                self.clock,
                a=nbytes,
                b=request.submitted_ns - request.queued_ns,
            )

    def note_eviction(self, layer: int, expert: int) -> None:
        if self.tracer:
            now = time.perf_counter_ns()
            self.tracer.event(Kind.EVICT, now, now, layer, expert, self.clock)

    def note_stall(
        self, layer: int, begin_ns: int, end_ns: int, expert: int | None, *, late: bool
    ) -> None:
        """A step waited from begin_ns until `expert` landed, or until a read failed. `late`: its
        read was under way when it was asked for."""
        self.stats.stall_ns += end_ns - begin_ns
        if self.tracer and expert is not None:
            reason = Reason.LATE if late else Reason.UNKNOWN
            self.tracer.event(Kind.STALL, begin_ns, end_ns, layer, expert, self.clock, a=reason)

    def note_handover(self, *waited_ns: int) -> None:
        """Experts are handed to compute, so long after they landed."""
        self.stats.handover_ns.extend(waited_ns)
