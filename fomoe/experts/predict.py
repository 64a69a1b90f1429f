"""Who comes next: how good predictions of the next layer's picks are, and which of them to read.

Owns: the recall meter, what is worth reading, and the switch that turns read-ahead off when it
does not pay. Does not know: routers, reads, clocks; it is told ids, bytes and seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fomoe.errors import RequestError

Mode = Literal["auto", "on", "off"]

_WINDOW_MEMORY = 1 / 16  # weight of a layer's newest window in its running mean
_OUTCOME_MEMORY = 1 / 32  # the same for the outcome of a read
_FIRST_PRECISION = 0.6  # of a place that has not been seen
_PREDICTION_S = 3e-4  # what asking a router costs (512 experts of 4,096 columns in F32)
_TRIAL_READS = 32  # outcomes before a verdict: one time constant of the above
_FIRST_PAUSE = 256  # tokens until read-ahead is tried again; doubles with every failure
_LONGEST_PAUSE = 16384


@dataclass(slots=True)
class RecallMeter:
    """How many of the picks were foreseen, all of them and those that were not resident."""

    layers: int = 0
    picks: int = 0
    foreseen_at_k: int = 0  # in the first k of the prediction, k the number of picks
    foreseen: int = 0  # anywhere in the prediction
    misses: int = 0
    misses_foreseen_at_k: int = 0
    misses_foreseen: int = 0

    def note(
        self, predicted: Sequence[int], picks: Collection[int], misses: Collection[int]
    ) -> None:
        """One token at one layer: the prediction, best first; the distinct picks; those of them
        that were absent when the prediction was made."""
        at_k = set(predicted[: len(picks)])
        anywhere = set(predicted)
        self.layers += 1
        self.picks += len(picks)
        self.foreseen_at_k += len(at_k.intersection(picks))
        self.foreseen += len(anywhere.intersection(picks))
        self.misses += len(misses)
        self.misses_foreseen_at_k += len(at_k.intersection(misses))
        self.misses_foreseen += len(anywhere.intersection(misses))


@dataclass(slots=True)
class PrefetchStats:
    """What read-ahead did. Seconds of stall saved and caused are the caller's measurements."""

    issued: int = 0
    useful: int = 0  # the expert was picked
    wasted: int = 0
    saved_s: float = 0.0
    cost_s: float = 0.0
    switched_off: int = 0  # how often it was found not to pay
    paused: bool = False  # it is switched off now


class Prefetcher:
    """Chooses predicted experts to read before their layer.

    Reads go out one after the other from the prediction on, and one that turns out wrong is left
    where it is: what it costs is what the drive was handed of it, at most `in_flight_bytes`; what a
    right one saves is the part of it that was read before its layer asked. Under "auto" a read is
    issued where, by how often a place in the prediction was picked of late, it saves more than it
    costs; and the measured balance of recent reads must stay positive, or read-ahead pauses. "on"
    reads the best `max_reads`, "off" none.
    """

    def __init__(
        self,
        mode: Mode,
        num_layers: int,
        *,
        bytes_per_s: float,
        latency_s: float,
        in_flight_bytes: int,
        max_reads: int = 3,
    ) -> None:
        if mode not in get_args(Mode):
            raise RequestError(f"prefetch is auto, on or off, not {mode!r}")
        self.mode = mode
        self.stats = PrefetchStats()
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._in_flight_bytes = in_flight_bytes
        self._max_reads = max_reads
        self._windows_s = [-1.0] * num_layers
        self._precision: list[float] = []  # of absent experts by place in a prediction
        self._balance_s = 0.0  # saved minus cost per read, running mean
        self._outcomes = 0  # of this trial
        self._pause = _FIRST_PAUSE
        self._resume_at = 0

    def active(self, clock: int) -> bool:
        """Whether reads may be issued at token `clock`."""
        return self.mode == "on" or (self.mode == "auto" and clock >= self._resume_at)

    def note_window(self, layer: int, seconds: float) -> None:
        """The time from the prediction for `layer` to its router's word."""
        old = self._windows_s[layer]
        self._windows_s[layer] = seconds if old < 0 else old + _WINDOW_MEMORY * (seconds - old)

    def note_place(self, place: int, *, picked: bool) -> None:
        """The expert at this place of a prediction was absent, and picked or not."""
        while len(self._precision) <= place:
            self._precision.append(_FIRST_PRECISION)
        self._precision[place] += _OUTCOME_MEMORY * (picked - self._precision[place])

    def read_seconds(self, expert_bytes: int) -> float:
        """How long the drive takes for an expert."""
        return self._latency_s + expert_bytes / self._bytes_per_s

    def cost_seconds(self, expert_bytes: int) -> float:
        """By how much a read that is left where it is delays others, at most."""
        return self.read_seconds(min(expert_bytes, self._in_flight_bytes))

    def choose(
        self, layer: int, absent: Sequence[tuple[int, int]], expert_bytes: int, *, clock: int
    ) -> list[int]:
        """Which of the predicted, absent experts (place in the prediction, expert; best first) to
        read now; the caller tells the outcome of each by note_outcome."""
        if not (absent and self.active(clock)):
            return []
        self.stats.paused = False
        if self.mode == "on":
            chosen = [expert for _, expert in absent[: self._max_reads]]
        else:
            chosen = self._worthwhile(layer, absent, expert_bytes)
            if not chosen:
                self._weigh(-_PREDICTION_S, clock)
        self.stats.issued += len(chosen)
        return chosen

    def _worthwhile(
        self, layer: int, absent: Sequence[tuple[int, int]], expert_bytes: int
    ) -> list[int]:
        whole_s, left_s = self.read_seconds(expert_bytes), self._windows_s[layer]
        cost_s = self.cost_seconds(expert_bytes)
        chosen: list[int] = []
        for place, expert in absent[: self._max_reads]:
            known = place < len(self._precision)
            likely = self._precision[place] if known else _FIRST_PRECISION
            if likely * min(left_s, whole_s) <= (1.0 - likely) * cost_s:
                break
            chosen.append(expert)
            left_s -= whole_s
        return chosen

    def note_outcome(
        self, clock: int, *, used: bool, saved_s: float = 0.0, cost_s: float = 0.0
    ) -> None:
        """What became of a read: whether its expert was picked, the stall that it saved (0 when it
        landed no earlier than a demand read would have), and the stall that it caused others."""
        stats = self.stats
        stats.useful += used
        stats.wasted += not used
        stats.saved_s += saved_s
        stats.cost_s += cost_s
        self._weigh(saved_s - cost_s, clock)

    def _weigh(self, gain_s: float, clock: int) -> None:
        self._balance_s += _OUTCOME_MEMORY * (gain_s - self._balance_s)
        self._outcomes += 1
        if self.mode != "auto" or self._outcomes < _TRIAL_READS or clock < self._resume_at:
            return
        if self._balance_s > 0.0:
            self._pause = _FIRST_PAUSE
            return
        self.stats.switched_off += 1
        self.stats.paused = True
        self._resume_at = clock + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._outcomes = 0
        self._balance_s = 0.0
