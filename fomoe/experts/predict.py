"""Who comes next: how good predictions of the next layer's picks are, and which of them to read.

Owns: the recall meter, the deadline rule and the switch that turns read-ahead off when it does not
pay. Does not know: routers, reads, clocks; it is told ids, bytes and seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fomoe.errors import RequestError

Mode = Literal["auto", "on", "off"]

_WINDOW_MEMORY = 1 / 16  # weight of a layer's newest window in its running mean
_OUTCOME_MEMORY = 1 / 32  # the same for the outcome of a read
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


class Prefetcher:
    """Chooses predicted experts to read before their layer.

    A read is issued when the drive is idle, when it can land before its layer needs it (the
    deadline rule), and when what it is likely to save exceeds what it is likely to cost. Under
    "auto" the measured balance of recent reads must stay positive, or read-ahead pauses; "on" reads
    the best `max_reads` whenever the drive is idle, "off" none.
    """

    def __init__(
        self,
        mode: Mode,
        num_layers: int,
        *,
        bytes_per_s: float,
        latency_s: float,
        max_reads: int = 2,
    ) -> None:
        if mode not in get_args(Mode):
            raise RequestError(f"prefetch is auto, on or off, not {mode!r}")
        self.mode = mode
        self.stats = PrefetchStats()
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._max_reads = max_reads
        self._windows_s = [-1.0] * num_layers
        self._precision = [0.5] * max_reads  # by rank among the reads of one prediction
        self._cost_s = 0.0  # of a wasted read, running mean
        self._balance_s = 0.0  # saved minus cost per read, running mean
        self._outcomes = 0  # of this trial
        self._pause = _FIRST_PAUSE
        self._resume_at = 0

    def active(self, clock: int) -> bool:
        """Whether reads may be issued at token `clock`."""
        return self.mode == "on" or (self.mode == "auto" and clock >= self._resume_at)

    def note_window(self, layer: int, seconds: float) -> None:
        """The time from the prediction for `layer` to the moment its absent experts were waited
        for: attention, router, shared and resident experts."""
        old = self._windows_s[layer]
        self._windows_s[layer] = seconds if old < 0 else old + _WINDOW_MEMORY * (seconds - old)

    def budget(self, layer: int, expert_bytes: int) -> int:
        """How many experts of this size can be read within the layer's window."""
        room_s = self._windows_s[layer] - self._latency_s
        return int(max(0.0, room_s) * self._bytes_per_s / expert_bytes)

    def choose(
        self, layer: int, absent: Sequence[int], expert_bytes: int, *, idle: bool, clock: int
    ) -> list[int]:
        """Which of the predicted, absent experts (best first) to read now; the caller tells the
        outcome of each by note_outcome with its index in the returned list as rank."""
        if not (absent and idle and self.active(clock)):
            return []
        if self.mode == "on":
            chosen = list(absent[: self._max_reads])
        else:
            saved_s = self._latency_s + expert_bytes / self._bytes_per_s
            chosen = []
            for rank, expert in enumerate(
                absent[: min(self._max_reads, self.budget(layer, expert_bytes))]
            ):
                likely = self._precision[rank]
                if likely * saved_s <= (1.0 - likely) * self._cost_s:
                    break
                chosen.append(expert)
        self.stats.issued += len(chosen)
        return chosen

    def note_outcome(
        self, rank: int, clock: int, *, used: bool, saved_s: float = 0.0, cost_s: float = 0.0
    ) -> None:
        """What became of a read: whether its expert was picked, the stall that it saved (0 when it
        landed no earlier than a demand read would have), and the stall that it caused others."""
        stats = self.stats
        stats.useful += used
        stats.wasted += not used
        stats.saved_s += saved_s
        stats.cost_s += cost_s
        self._precision[rank] += _OUTCOME_MEMORY * (used - self._precision[rank])
        if not used:
            self._cost_s += _OUTCOME_MEMORY * (cost_s - self._cost_s)
        self._balance_s += _OUTCOME_MEMORY * (saved_s - cost_s - self._balance_s)
        self._outcomes += 1
        if self.mode == "auto" and self._outcomes >= _TRIAL_READS and clock >= self._resume_at:
            self._judge(clock)

    def _judge(self, clock: int) -> None:
        if self._balance_s > 0.0:
            self._pause = _FIRST_PAUSE
            return
        self.stats.switched_off += 1
        self._resume_at = clock + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._outcomes = 0
        self._balance_s = self._cost_s = 0.0
        self._precision = [0.5] * self._max_reads
