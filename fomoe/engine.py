"""The engine: what people ask of a model, as sequences for the loop that runs steps.

Owns: the public calls, opening and closing. Does not know: when a sequence is computed
(runner.py), formats, policies, formulas, where output goes.
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
from fomoe.errors import RequestError
from fomoe.loading import Loaded, load
from fomoe.memory import finish
from fomoe.plan import MemoryPlan
from fomoe.runner import Runner
from fomoe.sampling import Sampler, Sampling
from fomoe.sequence import Sequence
from fomoe.stats import DeviceStats, Stats
from fomoe.stop_text import StopText
from fomoe.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. `text` is what it adds to the text, empty while a character is incomplete;
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
        self._stats = Stats(load_seconds=load_seconds, load_gb_per_second=loaded.load_gb_per_second)
        self._runner = Runner(loaded, options, self._stats)
        self._closing: asyncio.Task[None] | None = None

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
        """Open a GGUF file, any shard of a split one: await the result, or enter it (async with).

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
        """Text to token ids and back, as the model's file says."""
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
        the drive fails, ClosedError when the engine is closed meanwhile.
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
        self._runner.submit(sequence)
        try:
            while True:
                output = await self._runner.next_output(sequence)
                ended = output.token in stop_ids
                piece = "" if ended else decoder.push(output.token)
                piece += decoder.flush() if output.last else ""
                shown, stopped = text.push(piece, last=output.last)
                reason = "stop" if ended or stopped else "length" if output.last else None
                yield Token(output.token, shown, reason)
                if reason:
                    return
        finally:
            self._runner.cancel(sequence)

    async def logits(self, tokens: AnySequence[int]) -> npt.NDArray[np.float32]:
        """Teacher-forced logits, float32 [len(tokens), vocab]; row i is what follows token i.
        Raises RequestError for tokens that do not fit, ReadError when the drive fails.
        """
        return np.concatenate([part async for part in self.logit_rows(tokens)])

    async def logit_rows(
        self, tokens: AnySequence[int], *, first: int = 0, stepwise: bool = False
    ) -> AsyncIterator[npt.NDArray[np.float32]]:
        """The rows of logits() from row `first` on, step by step, for texts whose logits do not fit
        into memory at once. `stepwise` computes token by token, as generation does (with CAR).
        Raises as logits() does.
        """
        ids = self._encode(tokens)
        self._check_room(len(ids))
        sequence = Sequence(ids, sampler=None, logits_from=first, stepwise=stepwise)
        self._runner.submit(sequence)
        try:
            while True:
                output = await self._runner.next_output(sequence)
                if output.logits is not None:
                    yield output.logits
                if output.last:
                    return
        finally:
            self._runner.cancel(sequence)

    async def feed(
        self, pieces: Iterable[AnySequence[int]], *, max_tokens: int, stepwise: bool = False
    ) -> AsyncIterator[npt.NDArray[np.float32]]:
        """Compute tokens that the caller has, piece by piece; yields the logits after each piece,
        float32 [vocab].

        A piece is taken when the iteration goes on, so it may depend on the logits before it. All
        pieces together have at most `max_tokens` tokens: that much of the context is taken. The
        first piece counts as a prompt, and so does any of several tokens; `stepwise` computes them
        token by token too, as generation does (with CAR). Raises RequestError for what was not
        announced, ReadError when the drive fails.
        """
        sequence = Sequence((), sampler=None, max_tokens=max_tokens, fed=True, stepwise=stepwise)
        self._check_room(max_tokens)
        self._runner.submit(sequence)
        try:
            for piece in pieces:
                ids = self._encode(piece)
                if len(sequence.tokens) + len(ids) > max_tokens:
                    raise RequestError(f"more tokens than the {max_tokens} that were announced")
                self._runner.extend(sequence, ids)
                output = await self._runner.next_output(sequence)
                assert output.logits is not None
                yield output.logits[-1]
        finally:
            self._runner.cancel(sequence)

    async def preload(self) -> None:
        """Read experts, from the first on, until every slot that is free now is taken. One that
        cannot be read is left out: whoever needs it is told."""
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
            self._runner.stop("the engine is closed")
            self._closing = asyncio.create_task(self._close(), name="fomoe-close")
        await finish(self._closing)

    async def _close(self) -> None:
        try:
            await self._runner.close()
        finally:
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
