"""The loop that runs steps, one after the other, for as long as an engine is open.

Owns: which sequences run, what the outcome of a step means to each, and what a step adds to the
figures. Does not know: text, who asks, how a step is computed (forward.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as AnySequence

from fomoe.chunks import ExpertLostError
from fomoe.config import EngineOptions
from fomoe.device_forward import DeviceForward
from fomoe.errors import ClosedError, FomoeError
from fomoe.forward import Forward, StepCancelledError
from fomoe.loading import Loaded
from fomoe.scheduler import Chunk, Scheduler
from fomoe.sequence import Output, Sequence
from fomoe.stats import PhaseStats, Stats
from fomoe.trace_format import Kind, Part


class Runner:
    """Begins to run when it is made, in the event loop that is running. `stats` is kept up."""

    def __init__(self, loaded: Loaded, options: EngineOptions, stats: Stats) -> None:
        self.forward = _forward(loaded, options)
        self.scheduler = Scheduler(options.ubatch)
        self._loaded = loaded
        self._stats = stats
        self._work = asyncio.Event()
        self._num_sequences = 0
        self._ended = ""  # why nothing is computed any more
        self._task = asyncio.create_task(self._run(), name="fomoe-engine")

    def submit(self, sequence: Sequence) -> None:
        """Let a sequence take part in the steps to come. Raises ClosedError."""
        if self._ended:
            raise ClosedError(self._ended)
        self._num_sequences += 1
        sequence.number = self._num_sequences
        self.scheduler.waiting.append(sequence)
        self._work.set()

    def extend(self, sequence: Sequence, tokens: AnySequence[int]) -> None:
        """More tokens for a sequence that is fed."""
        sequence.extend(tokens)
        self._work.set()

    async def next_output(self, sequence: Sequence) -> Output:
        """What a step gave the sequence; raises what it failed with."""
        output = await sequence.next_output()
        self._work.set()  # the sequence may have been held up
        return output

    def cancel(self, sequence: Sequence) -> None:
        """The consumer left: the sequence is dropped between two layers or before its next step."""
        sequence.cancelled = True
        self._work.set()

    def stop(self, reason: str) -> None:
        """Take no more sequences; those that are there fail with that reason."""
        self._ended = self._ended or reason

    async def close(self) -> None:
        """End all sequences, and the loop once the step under way is left between two layers."""
        for sequence in self.scheduler.running:
            sequence.cancelled = True
        self._work.set()
        try:
            await self._task
        finally:
            self.forward.close()

    def _admit(self, sequence: Sequence) -> bool:
        if sequence.cancelled:
            return True
        sequence.state = self._loaded.states.take(sequence.max_total)
        return sequence.state is not None

    def _drop_ended(self) -> None:
        running = self.scheduler.running
        for sequence in [s for s in running if s.cancelled or s.finished]:
            running.remove(sequence)
            if sequence.state is not None:
                self._loaded.states.give(sequence.state)
                sequence.state = None
            if not sequence.finished:
                sequence.fail(ClosedError("the generation was cancelled"))

    async def _run(self) -> None:
        """Steps, one after the other, for as long as the engine is open. However it ends, nobody is
        left waiting.
        """
        try:
            while not self._ended:
                self._drop_ended()
                self.scheduler.admit(self._admit)
                self._drop_ended()
                chunks = self.scheduler.next_step()
                if chunks:
                    await self._step(chunks)
                    # Who waits for the step's tokens takes them before the next one begins.
                    await asyncio.sleep(0)
                else:
                    self._work.clear()
                    await self._work.wait()
        except BaseException as error:
            self._ended = self._ended or f"the engine stopped: {error!r}"
            raise
        finally:
            for sequence in (*self.scheduler.running, *self.scheduler.waiting):
                if not sequence.finished:
                    sequence.fail(ClosedError(self._ended))

    async def _step(self, chunks: list[Chunk]) -> None:
        decodes = all(c.decodes for c in chunks)
        phase = self._stats.generation if decodes else self._stats.prompt
        before = _Mark(self._loaded)
        num_tokens = 0
        try:
            logits = await self.forward.run(chunks)
            num_tokens = sum(c.length for c in chunks)
        except StepCancelledError:
            return
        except ExpertLostError as lost:
            for chunk in chunks:
                if chunk in lost.chunks:
                    chunk.sequence.fail(lost.error)
                else:
                    self._rewind(chunk.sequence)
            return
        except FomoeError as error:
            for chunk in chunks:
                chunk.sequence.fail(error)
            return
        finally:
            before.add_to(phase, num_tokens)
        begin = time.perf_counter_ns()
        for chunk, rows in zip(chunks, logits, strict=True):
            if not chunk.sequence.cancelled:
                chunk.sequence.advance(chunk.length, rows)
        if self._loaded.tracer:
            end = time.perf_counter_ns()
            self._loaded.tracer.event(Kind.COMPUTE, begin, end, a=Part.SAMPLE)

    def _rewind(self, sequence: Sequence) -> None:
        """A step that failed for another sequence's sake has left this one's state undefined."""
        assert sequence.state is not None
        sequence.state.clear()
        sequence.rewind()


def _forward(loaded: Loaded, options: EngineOptions) -> Forward:
    parts = (
        loaded.model,
        loaded.store,
        loaded.residency,
        loaded.embedding,
        loaded.states.caches,
    )
    if loaded.places:
        # What was copied ahead in time would decide who stays.
        ahead = not options.deterministic
        return DeviceForward(*parts, places=loaded.places, read_ahead=ahead, tracer=loaded.tracer)
    ahead = not (loaded.plan.all_resident or options.deterministic)
    return Forward(*parts, read_ahead=ahead, tracer=loaded.tracer)


class _Mark:
    """Counters at the beginning of a step, to credit its phase with the difference."""

    def __init__(self, loaded: Loaded) -> None:
        self._store = loaded.store.stats
        self._begin = time.perf_counter()
        self._was = self._now()

    def _now(self) -> tuple[int, int, int, int, int]:
        s = self._store
        return s.picks, s.pick_hits, s.expert_reads, s.expert_bytes, s.stall_ns

    def add_to(self, phase: PhaseStats, tokens: int) -> None:
        picks, hits, reads, nbytes, stall = (
            now - was for now, was in zip(self._now(), self._was, strict=True)
        )
        phase.tokens += tokens
        phase.steps += 1
        phase.seconds += time.perf_counter() - self._begin
        phase.picks += picks
        phase.hits += hits
        phase.expert_reads += reads
        phase.expert_bytes += nbytes
        phase.stall_seconds += stall / 1e9
