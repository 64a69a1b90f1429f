"""Who comes next: how good predictions of the next layer's picks are, and which of them to read.

Owns: the recall meter, what is worth reading, and the trials that turn read-ahead off where it does
not pay. Does not know: routers, reads, clocks; it is told ids, bytes and seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, get_args

from fomoe.errors import RequestError

Mode = Literal["auto", "on", "off"]

_WINDOW_MEMORY = 1 / 16  # weight of a layer's newest window in its running mean
_OUTCOME_MEMORY = 1 / 32  # the same for how often a place in a prediction is picked
_FIRST_PRECISION = 0.6  # of a place that has not been seen
_TRIAL_TOKENS = 96  # half of them with reads ahead
_TRIAL_TURN = 4  # tokens in a row with them, then without
_FIRST_TERM = 256  # tokens until the next trial; doubles while verdicts stay the same
_LONGEST_TERM = 16384


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
    """What read-ahead did."""

    issued: int = 0
    useful: int = 0  # the expert was picked
    wasted: int = 0
    switched_off: int = 0  # how often it was found not to pay
    paused: bool = False  # it is switched off now


class Prefetcher:
    """Chooses predicted experts to read before their layer.

    Reads go out one after the other from the prediction on, and one that turns out wrong is left
    where it is: what it costs is what the drive was handed of it, at most `in_flight_bytes`; what a
    right one saves is the part of it that was read before its layer asked. Under "auto" a read is
    issued where, by how often a place in the prediction was picked of late, it saves more than it
    costs. Whether all that pays is measured: in a trial a few tokens with it and a few without take
    turns, and what the medians of their times say holds until the next trial. Sums of what single
    reads saved do not tell: a drive that is busy anyway, or stand-ins, make savings of no effect,
    and to ask a router has its price, too. "on" reads the best `max_reads`, "off" none.
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
        self._tokens = 0  # of this trial or term
        self._trial: tuple[list[float], list[float]] = ([], [])  # seconds without, and with
        self._in_trial = True
        self._pays = True  # the last verdict
        self._term = _FIRST_TERM

    @property
    def active(self) -> bool:
        """Whether reads may be issued for the token at hand."""
        if self.mode != "auto":
            return self.mode == "on"
        return self._pays if not self._in_trial else self._tokens // _TRIAL_TURN % 2 == 0

    def note_token(self, seconds: float) -> None:
        """A token was generated in so long, with or without reads ahead as `active` said."""
        if self.mode != "auto":
            return
        with_reads, first = self.active, self._tokens % _TRIAL_TURN == 0
        self._tokens += 1
        if not self._in_trial:
            self._in_trial = self._tokens >= self._term
            self._tokens = 0 if self._in_trial else self._tokens
            return
        if not first:  # which still lives on what the token before it has read ahead, or has not
            self._trial[with_reads].append(seconds)
        if self._tokens >= _TRIAL_TOKENS:
            self._decide()

    def _decide(self) -> None:
        without, with_reads = self._trial
        pays = median(with_reads) < median(without)
        self._term = min(2 * self._term, _LONGEST_TERM) if pays == self._pays else _FIRST_TERM
        self._pays, self._in_trial, self._tokens, self._trial = pays, False, 0, ([], [])
        self.stats.switched_off += not pays
        self.stats.paused = not pays

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

    def choose(self, layer: int, absent: Sequence[tuple[int, int]], expert_bytes: int) -> list[int]:
        """Which of the predicted, absent experts (place in the prediction, expert; best first) to
        read now; the caller tells of those that it does read by note_issued, and later by
        note_outcome."""
        if not (absent and self.active):
            return []
        if self.mode == "on":
            return [expert for _, expert in absent[: self._max_reads]]
        return self._worthwhile(layer, absent, expert_bytes)

    def note_issued(self, count: int) -> None:
        """So many of the reads that were chosen are made: others found no slot."""
        self.stats.issued += count

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

    def note_outcome(self, *, used: bool) -> None:
        """What became of a read: whether its expert was picked."""
        self.stats.useful += used
        self.stats.wasted += not used
