"""Benchmarks: what llama-bench calls tests, run on an engine.

Owns: which tokens a test computes, what is timed, and the figures of a test. Does not know: flags,
output formats. Tests are counted as llama-bench counts them: every repetition starts from an empty
context; neither tokenising nor sampling is in the time, nor are the tokens of the depth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fomoe.engine import Engine
from fomoe.errors import RequestError
from fomoe.stats import PhaseStats


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTest:
    """`prompt` tokens computed together and `generated` ones by one, after `depth` others."""

    prompt: int = 0
    generated: int = 0
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp512, tg128, pp512+tg128, tg128 @ d4096."""
        parts = [f"pp{self.prompt}"] * bool(self.prompt)
        parts += [f"tg{self.generated}"] * bool(self.generated)
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def timed_tokens(self) -> int:
        return self.prompt + self.generated

    @property
    def total_tokens(self) -> int:
        return self.depth + self.timed_tokens

    def pieces(self, tokens: Sequence[int]) -> list[Sequence[int]]:
        """The timed tokens, cut as they are to be computed."""
        prompt = tokens[self.depth : self.depth + self.prompt]
        rest = tokens[self.depth + self.prompt : self.total_tokens]
        return [prompt] * bool(prompt) + [[token] for token in rest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One repetition: its time, and what the experts of its timed tokens cost. `cold`: nothing had
    run since the model was opened."""

    cold: bool
    seconds: float
    picks: int
    hits: int
    expert_bytes: int
    stall_seconds: float


@dataclass(slots=True)
class BenchResult:
    """A test's samples."""

    test: BenchTest
    samples: list[Sample] = field(default_factory=list)
    begun_at: float = field(default_factory=time.time)

    @property
    def cache(self) -> str:
        """What the samples began with: "cold", "warm", or "mixed" where the first was cold."""
        cold = [sample.cold for sample in self.samples]
        return "cold" if all(cold) else "mixed" if any(cold) else "warm"

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.test.timed_tokens / s.seconds for s in self.samples]

    @property
    def hit_rate(self) -> float | None:
        picks = self._sum("picks")
        return self._sum("hits") / picks if picks else None

    @property
    def mib_per_token(self) -> float:
        tokens = self.test.timed_tokens * len(self.samples)
        return self._sum("expert_bytes") / tokens / (1 << 20)

    @property
    def stall_share(self) -> float:
        return self._sum("stall_seconds") / self._sum("seconds")

    @property
    def read_gb_per_second(self) -> float:
        return self._sum("expert_bytes") / self._sum("seconds") / 1e9

    def _sum(self, name: str) -> float:
        return float(sum(getattr(sample, name) for sample in self.samples))

    def to_dict(self) -> dict[str, Any]:
        """The names that llama-bench's JSON has, then this engine's own."""
        times_ns = [s.seconds * 1e9 for s in self.samples]
        return {
            "n_prompt": self.test.prompt,
            "n_gen": self.test.generated,
            "n_depth": self.test.depth,
            "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.begun_at)),
            "avg_ns": round(statistics.fmean(times_ns)),
            "stddev_ns": round(deviation(times_ns)),
            "avg_ts": statistics.fmean(self.rates),
            "stddev_ts": deviation(self.rates),
            "samples_ns": [round(t) for t in times_ns],
            "samples_ts": self.rates,
            "cache": self.cache,
            "hit_rate": self.hit_rate,
            "mib_per_token": self.mib_per_token,
            "stall_share": self.stall_share,
            "read_gb_per_second": self.read_gb_per_second,
        }


class TokenSource:
    """Tokens for tests: random ones, or a text's, each repetition going on where the last ended."""

    def __init__(self, vocab_size: int, text: Sequence[int] | None = None) -> None:
        self._vocab_size = vocab_size
        self._text = text
        self._position = 0
        self._rng = np.random.default_rng(0)

    @property
    def kind(self) -> str:
        return "random" if self._text is None else "text"

    def take(self, count: int) -> list[int]:
        """The next tokens. RequestError when the text has no more."""
        if self._text is None:
            drawn: list[int] = self._rng.integers(0, self._vocab_size, count).tolist()
            return drawn
        self.require(count)
        begin, self._position = self._position, self._position + count
        return list(self._text[begin : self._position])

    def require(self, count: int) -> None:
        """Raise RequestError unless the text has so many tokens more."""
        if self._text is not None and self._position + count > len(self._text):
            raise RequestError(
                f"the text has {len(self._text)} tokens, the tests need {self._position + count}:"
                " give a longer one, fewer repetitions (-r) or smaller tests"
            )


async def run_sample(engine: Engine, test: BenchTest, source: TokenSource) -> Sample:
    """One repetition. The depth's tokens are computed before the clock starts."""
    cold = not totals(engine).tokens
    tokens = source.take(test.total_tokens)
    marks: list[tuple[float, PhaseStats]] = []

    def pieces() -> Iterator[Sequence[int]]:
        # A piece is asked for when the one before has been computed: that is when it is timed.
        if test.depth:
            yield tokens[: test.depth]
        marks.append((time.perf_counter(), totals(engine)))
        yield from test.pieces(tokens)
        marks.append((time.perf_counter(), totals(engine)))

    # Where nothing comes before them, the first of generated tokens is one of them too.
    stepwise = not (test.prompt or test.depth)
    async for _ in engine.feed(pieces(), max_tokens=test.total_tokens, stepwise=stepwise):
        pass
    (begin, before), (end, after) = marks
    return Sample(
        cold=cold,
        seconds=end - begin,
        picks=after.picks - before.picks,
        hits=after.hits - before.hits,
        expert_bytes=after.expert_bytes - before.expert_bytes,
        stall_seconds=after.stall_seconds - before.stall_seconds,
    )


async def warm_up(engine: Engine, test: BenchTest, source: TokenSource) -> None:
    """Bring the cache into the state it has in the middle of a long run: everything that fits in
    memory is read, and the test runs once."""
    if engine.plan.all_resident:
        await engine.preload()
    await run_sample(engine, test, source)


def decode_bytes(engine: Engine) -> int:
    """Bytes of weights that computing one token touches: all but the embedding and the experts that
    it does not pick."""
    gguf, hp = engine.loaded.gguf, engine.loaded.hp
    dense = sum(gguf.tensors[name].nbytes for name in hp.dense_tensors)
    return dense + engine.plan.streamed_bytes_per_token


def totals(engine: Engine) -> PhaseStats:
    """A copy of the engine's counters, both phases together."""
    stats = engine.stats()
    both = (stats.prompt, stats.generation)
    return PhaseStats(
        tokens=sum(p.tokens for p in both),
        picks=sum(p.picks for p in both),
        hits=sum(p.hits for p in both),
        expert_bytes=sum(p.expert_bytes for p in both),
        stall_seconds=sum(p.stall_seconds for p in both),
    )


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
