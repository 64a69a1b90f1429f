"""From logits to a token: llama.cpp's sampler chain, its names and its defaults.

Owns: penalties, truncation, temperature, the random generator. Does not know: models, text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import RequestError

# Rows are scanned in blocks of this many logits to find the top k (see _largest).
_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn. Applied in llama.cpp's order: penalties, top-k, top-p, min-p,
    temperature.

    temperature 0 takes the likeliest token. top_k 0, top_p 1 and min_p 0 switch those off;
    repeat_penalty 1 and the other penalties at 0 change nothing. They look at the last
    `repeat_last_n` tokens (-1: all), prompt included. seed -1 draws a fresh one. Raises
    RequestError for values that cannot be.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = -1

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0.0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repeat_penalty", 0.0 < self.repeat_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("repeat_last_n", self.repeat_last_n >= -1, "-1 or more"),
            ("seed", self.seed >= -1, "-1 (random) or more"),
        )
        for name, good, allowed in checks:
            if not good:
                raise RequestError(f"{name} must be {allowed}, not {getattr(self, name)}")


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, options: Sampling) -> None:
        self.options = options
        self._rng = np.random.default_rng(None if options.seed < 0 else options.seed)

    def sample(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> int:
        """The next token, given float32 logits [vocab] (left unchanged) and the tokens so far."""
        o = self.options
        logits = self._penalise(logits, history)
        if o.temperature == 0.0:
            return int(logits.argmax())
        ids = _largest(logits, o.top_k) if o.top_k else np.argsort(-logits)
        z = logits[ids].astype(np.float64)
        p = _softmax(z)
        if o.top_p < 1.0:
            # The smallest set of likeliest tokens whose probability reaches top_p.
            z = z[: int(np.searchsorted(np.cumsum(p), o.top_p)) + 1]
        if o.min_p > 0.0:
            z = z[z >= z[0] + np.log(o.min_p)]
        p = _softmax(z / o.temperature)
        draw = np.searchsorted(np.cumsum(p), self._rng.random())
        return int(ids[min(int(draw), len(z) - 1)])

    def _penalise(
        self, logits: npt.NDArray[np.float32], history: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        o = self.options
        off = o.repeat_penalty == 1.0 and o.presence_penalty == 0.0 and o.frequency_penalty == 0.0
        if off or o.repeat_last_n == 0:
            return logits
        recent = history if o.repeat_last_n < 0 else history[-o.repeat_last_n :]
        if not recent:
            return logits
        counts = Counter(recent)
        ids = np.fromiter(counts.keys(), np.int64)
        n = np.fromiter(counts.values(), np.float32)
        logits = logits.copy()
        z = logits[ids]
        z = np.where(z > 0, z / o.repeat_penalty, z * o.repeat_penalty)
        logits[ids] = z - n * o.frequency_penalty - o.presence_penalty
        return logits


def _softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(z - z.max())
    return np.asarray(e / e.sum())


def _largest(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Indices of the k largest logits, in descending order.

    The k-th largest of the blocks' maxima is at most the k-th largest logit, so only what reaches
    it has to be sorted: 0.08 ms for 248,320 logits where argpartition takes 2 ms.
    """
    if k >= len(logits):
        return np.argsort(-logits, kind="stable")
    whole = len(logits) // _BLOCK * _BLOCK
    most = logits
    if k * _BLOCK < whole:
        most = logits[:whole].reshape(-1, _BLOCK).max(axis=1)
    bound = np.partition(most, len(most) - k)[len(most) - k]
    candidates = np.flatnonzero(logits >= bound)
    order = np.argsort(-logits[candidates], kind="stable")[:k]
    return np.asarray(candidates[order])
