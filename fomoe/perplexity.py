"""Scoring a text as llama.cpp's llama-perplexity does, and comparing two ways of computing it.

Owns: which tokens of which windows count, and the statistics. Does not know: engines, files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import RequestError

F32Array = npt.NDArray[np.float32]

# Of a normal distribution: 95 % lie within so many standard errors.
_Z95 = 1.96


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens to be computed; the rows of logits from `first` on predict what is scored."""

    tokens: list[int]
    first: int

    @property
    def targets(self) -> list[int]:
        return self.tokens[self.first + 1 :]


def windows(
    tokens: Sequence[int], context: int, *, stride: int = 0, bos: int | None = None
) -> list[Window]:
    """Windows of `context` tokens. Without a stride they follow one another and the second half of
    each is scored; with one, each begins `stride` tokens after the last and its last `stride`
    tokens are scored. A model that wants a beginning-of-text token gets it in place of a window's
    first (as llama-perplexity does). Raises RequestError when the text is too short.
    """
    if context < 4:
        raise RequestError(f"a window of {context} tokens is too short: give -c 4 or more")
    if not 0 <= stride < context:
        raise RequestError(f"--stride is from 0 to below -c, which is {context}; not {stride}")
    step = stride or context
    first = context - 1 - stride if stride else context // 2
    starts = range(0, len(tokens) - context + 1, step)
    if not starts:
        raise RequestError(
            f"the text has {len(tokens)} tokens, one window of -c {context} needs {context}"
        )
    result = []
    for start in starts:
        window = list(tokens[start : start + context])
        if bos is not None:
            window[0] = bos
        result.append(Window(window, first))
    return result


def log_softmax(logits: F32Array) -> F32Array:
    """float32 [n, vocab] -> natural log-probabilities."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(
        np.float32
    )
    return np.asarray(shifted)


@dataclass(slots=True)
class Score:
    """Sums over scored tokens. `nll` is the negative log-likelihood of the text, nats; the rest
    compares with base log-probabilities and stays 0 without them."""

    tokens: int = 0
    nll: float = 0.0
    nll_squared: float = 0.0
    base_nll: float = 0.0
    difference_squared: float = 0.0
    kl: float = 0.0
    kl_squared: float = 0.0
    kl_max: float = 0.0
    agreements: int = 0

    def add(
        self, log_probs: F32Array, targets: Sequence[int], base: F32Array | None = None
    ) -> None:
        """Rows of log-probabilities [n, vocab], the n tokens that came, and exact rows."""
        rows = np.arange(len(targets))
        nll = -log_probs[rows, targets].astype(np.float64)
        self.tokens += len(targets)
        self.nll += float(nll.sum())
        self.nll_squared += float((nll**2).sum())
        if base is None:
            return
        base_nll = -base[rows, targets].astype(np.float64)
        self.base_nll += float(base_nll.sum())
        self.difference_squared += float(((nll - base_nll) ** 2).sum())
        kl = (np.exp(base) * (base - log_probs)).sum(axis=1, dtype=np.float64)
        self.kl += float(kl.sum())
        self.kl_squared += float((kl**2).sum())
        self.kl_max = max(self.kl_max, float(kl.max(initial=0.0)))
        self.agreements += int((log_probs.argmax(axis=1) == base.argmax(axis=1)).sum())

    def merge(self, other: Score) -> None:
        for name in self.__slots__:
            if name != "kl_max":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kl_max = max(self.kl_max, other.kl_max)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def perplexity_error(self) -> float:
        """Standard error of the perplexity, as llama-perplexity prints it."""
        return self.perplexity * _error(self.nll, self.nll_squared, self.tokens)

    def lines(self, *, compared: bool) -> list[str]:
        """The result as text."""
        n = self.tokens
        lines = [f"PPL = {self.perplexity:.4f} +/- {self.perplexity_error:.4f} ({n} tokens)"]
        if not compared:
            return lines
        mean = (self.nll - self.base_nll) / n
        error = _Z95 * _error(self.nll - self.base_nll, self.difference_squared, n)
        kl_error = _Z95 * _error(self.kl, self.kl_squared, n)
        share = self.agreements / n
        share_error = _Z95 * math.sqrt(share * (1 - share) / n)
        return [
            *lines,
            f"PPL of the base = {math.exp(self.base_nll / n):.4f}",
            f"PPL ratio = {math.exp(mean):.5f}"
            f" (95 %: {math.exp(mean - error):.5f} to {math.exp(mean + error):.5f})",
            f"mean KL divergence = {self.kl / n:.6f} +/- {kl_error:.6f} nats (95 %),"
            f" at most {self.kl_max:.4f}",
            f"same first choice = {100 * share:.2f} +/- {100 * share_error:.2f} % (95 %)",
        ]


def _error(total: float, squares: float, n: int) -> float:
    """Standard error of a mean, from the sum and the sum of squares of n values."""
    if n < 2:
        return math.nan
    return math.sqrt(max(squares / n - (total / n) ** 2, 0.0) / (n - 1))
