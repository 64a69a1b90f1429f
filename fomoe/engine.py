"""The engine: joins file, model, experts and reader, and serves sequences.

Owns: opening and closing in the right order, and the loop that runs steps. Does not know: formats,
policies, formulas, where output goes.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe import host
from fomoe.config import EngineOptions, parse_size, parse_sizes
from fomoe.device_forward import DeviceForward
from fomoe.errors import ClosedError, FomoeError, RequestError
from fomoe.forward import ExpertLostError, Forward, StepCancelledError
from fomoe.loading import Loaded, load
from fomoe.memory import finish
from fomoe.plan import MemoryPlan
from fomoe.sampling import Sampler, Sampling
from fomoe.scheduler import Chunk, Scheduler
from fomoe.sequence import Output, Sequence
from fomoe.stats import DeviceStats, PhaseStats, Stats
from fomoe.tokenizer import Tokenizer
from fomoe.trace import Kind, Part


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. `text` is what it adds to the text (empty while a character is
    incomplete);
    `finish_reason` is None, or, for the last one, "stop" (end of generation) or "length"."""

    id: int
    text: str
    finish_reason: str | None = None


class Engine:
    """A model that answers. Open one with `async with Engine.open(path, dram="16GiB") as engine`.

    Any number of generate() and logits() calls may run at once on one event loop; their tokens are
    computed together, step by step, so that an expert read for one serves all that picked it.
    """

    def __init__(self, loaded: Loaded, options: EngineOptions, load_seconds: float) -> None:
        self._loaded = loaded
        self._options = options
        self._forward = _forward(loaded, options)
        self._scheduler = Scheduler(options.ubatch)
        self._stats = Stats(load_seconds=load_seconds, load_gb_per_second=loaded.load_gb_per_second)
        self._work = asyncio.Event()
        self._num_sequences = 0
        self._ended = ""  # why nothing is computed any more
        self._closing: asyncio.Task[None] | None = None
        self._runner = asyncio.create_task(self._run(), name="fomoe-engine")

    @staticmethod
    def open(
        path: str | Path,
        *,
        dram: str | int | None = None,
        vram: str | int | AnySequence[str | int] = (),
        on_plan: Callable[[MemoryPlan], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Opening:
        """Open a GGUF file (any shard of a split one): await the result, or use it with `async
        with`.

        dram: what the process may use in all, as bytes or text ("16GiB"); None plans from what is
        free. vram: the same of every device, or one for each ("14GiB,10GiB"). on_plan(plan) is
        called with the memory plan before anything is loaded, progress(done, total) with bytes
        while dense weights are read. Other options: the fields of EngineOptions.
        Raises FomoeError: FormatError, UnsupportedError, BudgetError, ReadError or RequestError.
        """
        options.setdefault("cache_dir", host.cache_dir())
        try:
            chosen = EngineOptions(
                dram=None if dram is None else parse_size(dram), vram=parse_sizes(vram), **options
            )
        except TypeError as error:
            raise RequestError(f"unknown engine option: {error}") from error
        return Opening(Path(path), chosen, on_plan, progress)

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan that the engine keeps to."""
        return self._loaded.plan

    @property
    def options(self) -> EngineOptions:
        """The options that the engine was opened with."""
        return self._options

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def loaded(self) -> Loaded:
        """What was loaded: file, hyper-parameters, reader. For tools that report on it."""
        return self._loaded

    async def generate(
        self,
        prompt: str | AnySequence[int],
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: AnySequence[str] = (),
        ignore_eos: bool = False,
    ) -> AsyncIterator[Token]:
        """Continue a prompt (text, or token ids), yielding tokens as they are generated.

        Ends with a token that stops generation, after `max_tokens`, when the context is full, or
        when one of the `stop` texts appears (it is not yielded). Leaving the iteration cancels the
        generation; others go on. Raises RequestError for a prompt that does not fit, ReadError when
        the drive fails.
        """
        ids = self.encode(prompt)
        room = self._loaded.states.capacity - len(ids)
        if max_tokens is not None and max_tokens < 0:
            raise RequestError(f"max_tokens must be 0 or more, not {max_tokens}")
        limit = room if max_tokens is None else min(room, max_tokens)
        if limit == 0:
            return
        stop_ids = frozenset() if ignore_eos else self.tokenizer.stop_ids
        sequence = Sequence(
            ids, sampler=Sampler(sampling or Sampling()), max_tokens=limit, stop_ids=stop_ids
        )
        text = StopText([stop] if isinstance(stop, str) else stop)
        decoder = self.tokenizer.decoder()
        self._submit(sequence)
        try:
            while True:
                output = await self._next_output(sequence)
                ended = output.token in stop_ids
                piece = "" if ended else decoder.push(output.token)
                piece += decoder.flush() if output.last else ""
                shown, stopped = text.push(piece, last=output.last)
                reason = "stop" if ended or stopped else "length" if output.last else None
                yield Token(output.token, shown, reason)
                if reason:
                    return
        finally:
            self._cancel(sequence)

    async def logits(self, tokens: AnySequence[int]) -> npt.NDArray[np.float32]:
        """Teacher-forced logits, float32 [len(tokens), vocab]: row i is what follows tokens[: i +
        1].
        """
        return np.concatenate([part async for part in self.logit_rows(tokens)])

    async def logit_rows(
        self, tokens: AnySequence[int], *, first: int = 0, stepwise: bool = False
    ) -> AsyncIterator[npt.NDArray[np.float32]]:
        """The rows of logits() from row `first` on, step by step, for texts whose logits do not fit
        into memory at once. `stepwise` computes token by token, as generation does (with CAR).
        """
        ids = self._encode(tokens)
        self._check_room(len(ids))
        sequence = Sequence(ids, sampler=None, logits_from=first, stepwise=stepwise)
        self._submit(sequence)
        try:
            while True:
                output = await self._next_output(sequence)
                if output.logits is not None:
                    yield output.logits
                if output.last:
                    return
        finally:
            self._cancel(sequence)

    async def feed(
        self, pieces: Iterable[AnySequence[int]], *, max_tokens: int, stepwise: bool = False
    ) -> AsyncIterator[npt.NDArray[np.float32]]:
        """Compute tokens that the caller has, piece by piece; yields the logits after each piece,
        float32 [vocab].

        A piece is taken when the iteration goes on, so it may depend on the logits before it. All
        pieces together have at most `max_tokens` tokens: that much of the context is taken. The
        first piece counts as a prompt; `stepwise` computes it token by token too, as generation
        does (with CAR).
        """
        sequence = Sequence((), sampler=None, max_tokens=max_tokens, fed=True, stepwise=stepwise)
        self._check_room(max_tokens)
        self._submit(sequence)
        try:
            for piece in pieces:
                ids = self._encode(piece)
                if len(sequence.tokens) + len(ids) > max_tokens:
                    raise RequestError(f"more tokens than the {max_tokens} that were announced")
                sequence.extend(ids)
                self._work.set()
                output = await self._next_output(sequence)
                assert output.logits is not None
                yield output.logits[-1]
        finally:
            self._cancel(sequence)

    async def preload(self) -> None:
        """Read experts, from the first on, until every slot that is free now is taken."""
        store = self._loaded.store
        for layer in self._loaded.hp.layers:
            store.prefetch(layer.index, range(layer.moe.num_experts))
        await store.settle()

    def stats(self) -> Stats:
        """Figures since the engine was opened (a live object: copy what is to be kept)."""
        reader = self._loaded.reader.stats
        self._stats.read_retries = reader.retries
        self._stats.short_reads = reader.short_reads
        self._stats.residency = self._loaded.residency.stats
        places = dict.fromkeys(self._loaded.places)
        self._stats.devices = [DeviceStats(p.device.name, p.tier.stats) for p in places]
        self._stats.peak_bytes = host.peak_resident_bytes()
        self._stats.planned_bytes = self._loaded.plan.total_bytes
        handover = self._loaded.store.stats.handover_ns
        self._stats.landed_to_compute_us = statistics.median(handover) / 1e3 if handover else None
        return self._stats

    async def close(self) -> None:
        """End all generations; free the memory once neither kernel nor threads use it. That cannot
        be interrupted: who is cancelled meanwhile waits to its end. All callers do.
        """
        if self._closing is None:
            self._ended = self._ended or "the engine is closed"
            self._closing = asyncio.create_task(self._close(), name="fomoe-close")
        await finish(self._closing)

    async def _close(self) -> None:
        for sequence in self._scheduler.running:
            sequence.cancelled = True  # a step under way is left between two layers
        self._work.set()
        try:
            await self._runner
        finally:
            self._forward.close()
            await self._loaded.close()

    def encode(self, prompt: str | AnySequence[int]) -> list[int]:
        """The token ids of a prompt that the context has room to continue. Raises RequestError."""
        ids = self._encode(prompt)
        if len(ids) >= self._loaded.states.capacity:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the context holds"
                f" {self._loaded.states.capacity}: shorten the prompt or raise -c (--ctx-size)"
            )
        return ids

    def _encode(self, prompt: str | AnySequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt has no tokens; this model needs at least one")
        vocab = self._loaded.hp.vocab_size
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {vocab}")
        return ids

    def _check_room(self, num_tokens: int) -> None:
        if num_tokens > self._loaded.states.capacity:
            raise RequestError(
                f"{num_tokens} tokens do not fit into a context of {self._loaded.states.capacity}:"
                " raise -c (--ctx-size)"
            )

    def _submit(self, sequence: Sequence) -> None:
        if self._ended:
            raise ClosedError(self._ended)
        self._num_sequences += 1
        sequence.number = self._num_sequences
        self._scheduler.waiting.append(sequence)
        self._work.set()

    async def _next_output(self, sequence: Sequence) -> Output:
        output = await sequence.next_output()
        self._work.set()  # the sequence may have been held up
        return output

    def _cancel(self, sequence: Sequence) -> None:
        """The consumer left: the sequence is dropped between two layers or before its next step."""
        sequence.cancelled = True
        self._work.set()

    def _admit(self, sequence: Sequence) -> bool:
        if sequence.cancelled:
            return True
        sequence.state = self._loaded.states.take(sequence.max_total)
        return sequence.state is not None

    def _drop_ended(self) -> None:
        running = self._scheduler.running
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
                self._scheduler.admit(self._admit)
                self._drop_ended()
                chunks = self._scheduler.next_step()
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
            for sequence in (*self._scheduler.running, *self._scheduler.waiting):
                if not sequence.finished:
                    sequence.fail(ClosedError(self._ended))

    async def _step(self, chunks: list[Chunk]) -> None:
        is_prompt = any(c.is_prompt for c in chunks)
        phase = self._stats.prompt if is_prompt else self._stats.generation
        before = _Mark(self._loaded)
        num_tokens = 0
        try:
            logits = await self._forward.run(chunks)
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


class Opening:
    """An engine on its way: await it, or enter it."""

    def __init__(
        self,
        path: Path,
        options: EngineOptions,
        on_plan: Callable[[MemoryPlan], None] | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._path = path
        self._options = options
        self._on_plan = on_plan
        self._progress = progress
        self._engine: Engine | None = None

    async def _open(self) -> Engine:
        begin = time.perf_counter()
        loaded = await load(self._path, self._options, self._on_plan, self._progress)
        return Engine(loaded, self._options, time.perf_counter() - begin)

    def __await__(self) -> Generator[Any, None, Engine]:
        return self._open().__await__()

    async def __aenter__(self) -> Engine:
        self._engine = await self._open()
        return self._engine

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._engine is not None
        await self._engine.close()


class StopText:
    """Withholds text that may be the beginning of a stop text."""

    def __init__(self, stops: AnySequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""

    def push(self, text: str, *, last: bool) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop text was met (it and what follows are
        cut).
        """
        held = self._held + text
        found = [i for i in (held.find(s) for s in self._stops) if i >= 0]
        if found:
            return held[: min(found)], True
        keep = 0
        if not last:
            keep = max(
                (n for s in self._stops for n in range(1, len(s)) if held.endswith(s[:n])),
                default=0,
            )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False


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
