"""One step through the model: the place where routing, reads and compute meet.

Owns: the order of things inside a step. Does not know: requests, sampling, who stays in the cache.

Per layer: attention or delta-net; router; reads of missing experts are submitted; resident experts
and the shared one are computed meanwhile; then each missing one as it lands. While a prompt sweeps
through more experts than there are slots, the next layer's experts are read ahead as soon as this
layer has nothing left to read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fomoe.chunks import distinct, lost_expert, segments_of, wanted_rows
from fomoe.errors import ReadError
from fomoe.experts.step import ExpertStep
from fomoe.experts.store import ExpertStore
from fomoe.kernels.ops import SHORT_STEP, KvCache, MoeCall, Resident, Routing, Segment
from fomoe.memory import finish
from fomoe.models import HEAD_ROWS, Layer, Model
from fomoe.residency import Residency
from fomoe.scheduler import Chunk
from fomoe.step_trace import StepTrace
from fomoe.trace import Tracer
from fomoe.trace_format import Part
from fomoe.weights import EmbeddingRows

R = TypeVar("R")
Logits = npt.NDArray[np.float32] | None  # [n, vocab], or not wanted

# Steps of up to this many tokens compute on the event loop's thread: a layer takes a few
# milliseconds at most, less than two thread switches would add to every one of its calls.
INLINE_TOKENS = SHORT_STEP
# The loop runs at least this often between layers, so that requests are heard and can be cancelled.
_YIELD_NS = 20_000_000
# Where reads may land. A turn of the loop costs 60 us in the midst of a token.
_BUSY_YIELD_NS = 2_000_000


class StepCancelledError(Exception):
    """Nobody waits for the step any more; it was left between two layers."""


@dataclass(slots=True)
class _Open:
    """A layer whose experts have begun and not ended. The `last` ones are computed together with
    what comes after the layer: one call instead of three, and nothing in between that would run in
    cold caches."""

    index: int
    call: MoeCall
    begin_ns: int
    step: ExpertStep
    last: Sequence[Resident] = ()
    last_ns: int = 0  # when their computing began, if it has
    part: Part = Part.RESIDENT  # what computing them is


class Forward:
    """Runs steps, one at a time."""

    def __init__(
        self,
        model: Model,
        store: ExpertStore,
        residency: Residency,
        embedding: EmbeddingRows,
        caches: Sequence[KvCache | None],
        *,
        read_ahead: bool,
        tracer: Tracer | None = None,
    ) -> None:
        self._model = model
        self._store = store
        self._residency = residency
        self._embedding = embedding
        self._caches = caches
        self._read_ahead = read_ahead
        self._trace = StepTrace(tracer, lambda: store.clock)
        self._thread = ThreadPoolExecutor(1, "fomoe-compute")
        self._inline = True
        self._yielded_ns = 0
        self._open: _Open | None = None

    def close(self) -> None:
        self._thread.shutdown()

    async def run(self, chunks: Sequence[Chunk]) -> list[Logits]:
        """Compute a step; returns the logits [n, vocab] that each chunk's sequence wants, or None.
        Those of a sequence that samples are good until the next step.

        Raises ReadError, ExpertLostError, and StepCancelledError when every sequence was cancelled
        meanwhile. After any, the state of the chunks' sequences is undefined.
        """
        begin = time.perf_counter_ns()
        num_tokens = sum(c.length for c in chunks)
        self._inline = num_tokens <= INLINE_TOKENS
        ids = [t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.length]]
        self._trace.begin()
        reads_rows = self._embedding.must_read(ids)
        rows = await self._embedding.rows(ids)
        if reads_rows:
            landed = time.perf_counter_ns()
            self._store.stats.stall_ns += landed - begin
            self._trace.read(begin, landed)
        segments = segments_of(chunks)
        self._residency.begin_step(chunks)
        exact = None
        if self._residency.audit_due():
            exact = await self._audit(chunks, rows, segments)
        logits = await self._layers(chunks, rows, segments)
        self._store.advance(num_tokens)
        await self._residency.end_step()
        if exact is not None:
            self._residency.note_audit(exact[0], logits[0])
        self._trace.end(begin, num_tokens, is_prompt=not self._residency.decoding)
        return logits

    async def _layers(
        self,
        chunks: Sequence[Chunk],
        rows: npt.NDArray[np.uint8],
        segments: Sequence[Segment],
        *,
        audit: bool = False,
    ) -> list[Logits]:
        x = await self._compute(Part.EMBED, -1, self._model.embed, rows)
        layers, index = self._model.layers, 0
        guesses = self._read_ahead and self._residency.predicts()
        walks = self._inline and not (audit or guesses or self._residency.substitutes)
        try:
            while index < len(layers):
                await self._yield(chunks)
                begun = None
                if walks:
                    index, begun = self._walk(index, x, segments)
                if begun or not walks:
                    await self._layer_by_itself(index, x, chunks, segments, audit, begun)
                    index += 1
            await self._finish(x)
        except BaseException:  # the step is given up, but its experts are still being computed
            self._model.trunk.settle()
            self._store.let_go()
            if self._open is not None:
                self._open.step.close()
                self._open = None
            raise
        return await self._head(chunks, segments, x)

    def _walk(
        self, first: int, x: Any, segments: Sequence[Segment]
    ) -> tuple[int, tuple[Routing, MoeCall] | None]:
        """Compute layers from `first` on as long as their experts are there: what need not be known
        in between is noted afterwards, in one go. Also what a layer began with that lacks some."""
        trunk, caches, tables = self._model.trunk, self._caches, self._store.tables
        before = self._open
        last = None if before is None else (before.call, before.last)
        most_ns = _YIELD_NS if self._store.drive_idle else _BUSY_YIELD_NS
        end, begun = trunk.walk(x, segments, caches, tables, first, last, most_ns)
        layers, marks = self._model.layers, []
        if self._trace.on:
            marks = [layer.ops.marks for layer in layers[first : end + (begun is not None)]]
            marks.append(trunk.marks)
        self._ended(marks[0] if marks else ())
        for index in range(first, end):
            routing = layers[index].ops.routing
            self._residency.routed(index, routing)
            experts, counts = distinct(routing)
            self._store.passed(index, experts, counts)
            if marks:
                own, after = marks[index - first : index - first + 2]
                self._trace.layer_begun(index, own, after[0])
                self._trace.layer_ended(index, after, Part.RESIDENT, len(experts), own[2])
        return end, begun

    async def _audit(
        self, chunks: Sequence[Chunk], rows: npt.NDArray[np.uint8], segments: Sequence[Segment]
    ) -> list[Logits]:
        """The step's logits with the router's own picks, leaving no trace: recurrent states are put
        back, what is appended to the KV cache is overwritten by the step itself, and the experts
        that it misses only pass through."""
        states = [d for s in segments for d in s.delta if d is not None]
        kept = [(d.conv.copy(), d.s.copy()) for d in states]
        try:
            logits = await self._layers(chunks, rows, segments, audit=True)
            return [None if own is None else np.array(own) for own in logits]
        finally:
            for state, (conv, s) in zip(states, kept, strict=True):
                state.conv[...] = conv
                state.s[...] = s

    async def _layer_by_itself(
        self,
        index: int,
        x: Any,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
        audit: bool,
        begun: tuple[Routing, MoeCall] | None,
    ) -> None:
        """One layer whose experts may have to be read; `begun` is what it began with, if it has."""
        layer = self._model.layers[index]
        routing, call = begun or await self._begin(index, x, segments)
        # Other threads compute the shared expert from now on, and one token's that are in slots.
        if self._inline:
            self._store.hold(index, routing.ids)
        if self._trace.on:
            self._trace.layer_begun(index, layer.ops.marks, time.perf_counter_ns())
        if not audit:
            self._residency.routed(index, routing)
        experts, counts = distinct(routing)
        self._trace.picked(index, experts)
        step = self._store.begin(index, experts, counts, passing=audit)
        if not audit:
            self._residency.backfill()
        begin_ns = layer.ops.marks[2] if self._trace.on else 0
        own = self._open = _Open(index, call, begin_ns, step)
        guesses = self._read_ahead and index + 1 < len(self._model.layers)
        below = self._model.layers[index + 1] if guesses else None
        ahead = await self._predict(below, x) if below and not self._inline else []
        # From here on nothing is computed but what the step hands out: others may begin what lands
        # between. The pool of threads has one caller.
        step.start = call.start
        try:
            await self._compute_experts(own, ahead)
        except ReadError as error:
            raise lost_expert(error, step.lost, routing, chunks, segments) from error
        if not self._inline:
            await self._finish(x)
        elif below and not audit and self._residency.predicts():
            # Whatever the drive has time for, while the next layer's mixer is computed.
            await self._finish(x)
            guess = await self._compute(Part.ROUTE, index + 1, below.ops.guess, x)
            self._residency.predicted(index + 1, guess)

    async def _begin(
        self, index: int, x: Any, segments: Sequence[Segment]
    ) -> tuple[Routing, MoeCall]:
        """End the layer before; mix, route and begin the experts."""
        before, ops = self._open, self._model.layers[index].ops
        last = None if before is None else (before.call, before.last)
        cache, table = self._caches[index], self._store.tables[index]
        result = await self._run(ops.begin, x, segments, cache, last, table)
        self._ended(ops.marks if self._trace.on else ())
        return result

    async def _compute_experts(self, begun: _Open, ahead: list[int]) -> None:
        """The experts of a layer as they land; the last ones of a short step are left for its end.
        Raises ReadError."""
        index, call, step = begun.index, begun.call, begun.step
        self._fetch_ahead(step, index, ahead)
        while some := await step.landed(at_once=self._inline):
            part = Part.LANDED if step.fresh else Part.RESIDENT
            if self._inline and step.complete:
                begun.last, begun.last_ns, begun.part = some, step.begun_ns, part
                return
            count, since = len(some), step.begun_ns
            await self._compute(part, index, call.run, some, experts=count, begin=since)
            step.computed(some)
            self._fetch_ahead(step, index, ahead)

    async def _finish(self, x: Any) -> None:
        """End the layer that is open, if one is."""
        begun = self._open
        if begun is None:
            return
        call, last = begun.call, begun.last
        begin = time.perf_counter_ns()
        if last:
            await self._run(call.run, last)
        ran = time.perf_counter_ns()
        await self._run(call.finish, x)
        self._ended((begin, ran, time.perf_counter_ns()))

    def _ended(self, marks: Sequence[int]) -> None:
        """The layer that was open, if one was, has been computed: `marks` as of LayerOps."""
        begun = self._open
        if begun is None:
            return
        if begun.last:
            begun.step.computed(begun.last)
        begun.step.close()
        self._open = None
        if self._trace.on:
            experts, first = len(begun.last), begun.last_ns or marks[0]
            marks = (first, *marks[1:])
            self._trace.layer_ended(begun.index, marks, begun.part, experts, begun.begin_ns)

    async def _predict(self, layer: Layer, x: Any) -> list[int]:
        """Experts that a layer will probably need, the most wanted first: what its own router says
        of the residual stream as it is before the layer below has added its experts."""
        routing = await self._compute(Part.ROUTE, layer.parameters.index, layer.ops.guess, x)
        experts, counts = distinct(routing)
        order = np.argsort(-np.asarray(counts), kind="stable")
        self._trace.predicted(layer.parameters.index, experts)
        return [experts[i] for i in order]

    def _fetch_ahead(self, step: ExpertStep, index: int, ahead: list[int]) -> None:
        """When a layer has nothing left to submit, the next one's experts may come."""
        if ahead and not step.pending:
            # Nine in ten of what is predicted for a whole step's tokens is picked.
            del ahead[: self._store.prefetch(index + 1, ahead, certain=True)]

    async def _head(
        self, chunks: Sequence[Chunk], segments: Sequence[Segment], x: Any
    ) -> list[Logits]:
        """The head reads its weights once for the rows of all chunks together."""
        wanted = [wanted_rows(c, s.start) for c, s in zip(chunks, segments, strict=True)]
        rows = [i for some in wanted for i in some]
        if not rows:
            return [None] * len(chunks)
        if len(rows) <= HEAD_ROWS:
            logits = await self._logits(x, rows)
        else:
            logits = np.empty((len(rows), self._model.parameters.vocab_size), np.float32)
            for i in range(0, len(rows), HEAD_ROWS):
                logits[i : i + HEAD_ROWS] = await self._logits(x, rows[i : i + HEAD_ROWS])
        result: list[Logits] = []
        start = 0
        for chunk, some in zip(chunks, wanted, strict=True):
            own = logits[start : start + len(some)]
            start += len(some)
            # Fewer rows are the model's own buffer, and only a sampler is done with them here.
            stays = len(rows) > HEAD_ROWS or chunk.sequence.sampler is not None
            result.append(None if not some else own if stays else np.array(own))
        return result

    async def _logits(self, x: Any, rows: list[int]) -> npt.NDArray[np.float32]:
        """Logits [n, vocab] of at most HEAD_ROWS rows of x, good until the next call."""
        picked = x if len(rows) == len(x) else x[rows]
        logits: npt.NDArray[np.float32] = await self._compute(
            Part.HEAD, -1, self._model.head, picked
        )
        return logits

    async def _compute(
        self,
        part: Part,
        layer: int,
        call: Callable[..., R],
        *args: Any,
        experts: int = 0,
        begin: int = 0,
    ) -> R:
        """As _run, and recorded, as begun already if `begin` says when."""
        begin = begin or time.perf_counter_ns()
        result = await self._run(call, *args)
        self._trace.computed(part, layer, begin, experts)
        return result

    async def _run(self, call: Callable[..., R], *args: Any) -> R:
        """Run compute: short steps here, long ones in the compute thread while the loop serves
        reads. A cancelled caller waits for the thread: it works on memory that the caller gives
        back."""
        if self._inline:
            return call(*args)
        future = asyncio.get_running_loop().run_in_executor(self._thread, call, *args)
        return await finish(future)

    async def _yield(self, chunks: Sequence[Chunk]) -> None:
        now = time.perf_counter_ns()
        since = now - self._yielded_ns
        if since > _YIELD_NS or (since > _BUSY_YIELD_NS and not self._store.drive_idle):
            await asyncio.sleep(0)
            self._yielded_ns = now
        for chunk in chunks:
            if not chunk.sequence.cancelled:
                return
        raise StepCancelledError
