"""Why compute had to wait: each stall, and the reads and evictions that explain it.

Owns: the reasons. Does not know: how they are shown. Where the engine gave a reason it is kept; the
others are worked out from what was recorded before the stall.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.trace_format import Kind, Reason, Records
from fomoe.tracing.intervals import I64, following, preceding
from fomoe.tracing.timeline import Timeline, submitted

Bools = npt.NDArray[np.bool_]

NAMES = {
    Reason.COLD: "never read before",
    Reason.EVICTED: "evicted",
    Reason.LATE: "predicted too late",
    Reason.QUEUED: "behind other reads",
    Reason.FILE: "embedding or other file read",
    Reason.UNKNOWN: "unknown",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One wait. -1: not known. `ago`: tokens since the expert was evicted. `queued_share`: of the
    time from queued to landed, the share before the drive got the read. `ahead`: reads in flight
    when it was queued."""

    begin_ns: int
    wait_ns: int
    token: int
    layer: int
    expert: int
    reason: Reason
    ago: int = -1
    queued_share: float = 0.0
    ahead: int = -1

    @property
    def why(self) -> str:
        text = NAMES[self.reason]
        if self.reason is Reason.EVICTED and self.ago >= 0:
            text = f"evicted {self.ago} token{'s' * (self.ago != 1)} ago"
        if self.queued_share > 0.5 and self.reason is not Reason.QUEUED:
            text += f", behind {self.ahead} reads" if self.ahead > 0 else ", queued"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonTotal:
    reason: Reason
    count: int
    wait_ns: int


class StallReasons:
    """The stalls of a timeline, explained: arrays in the order of `timeline.stalls`."""

    def __init__(self, t: Timeline) -> None:
        self._t = t
        stalls, reads = t.stalls, t.reads
        self.token = t.token_at(stalls["begin"])
        # The read that the stall waited for: of its expert, the first to land after it began.
        group = _group(reads)
        found = following(group, reads["end"], _group(stalls), stalls["begin"] + 1)
        known = (found >= 0) & (stalls["expert"] >= 0)
        if len(reads):
            known &= reads["begin"][found] < stalls["end"]
        self._read = np.where(known, found, -1)
        queued = _at(reads["begin"], self._read)
        waited = _at(submitted(reads), self._read) - queued
        self.queued_share = waited / np.maximum(_at(reads["end"], self._read) - queued, 1)
        before = np.searchsorted(np.sort(submitted(reads)), queued)
        landed = np.searchsorted(reads["end"], queued, side="right")
        self.ahead = np.where(known, np.maximum(before - landed, 0), -1)
        self.ago = self._evicted_ago(queued)
        earlier = preceding(group, reads["end"], _group(stalls), queued) >= 0
        self.reason = self._reasons(known, earlier)

    def _evicted_ago(self, queued: I64) -> I64:
        """Tokens since the expert was last evicted before its read was queued, -1 if it was not."""
        records = self._t.recording.records
        evicted = records[records["kind"] == Kind.EVICT]
        found = preceding(_group(evicted), evicted["begin"], _group(self._t.stalls), queued)
        token = _at(self._t.token_at(evicted["begin"]), found)
        known = (found >= 0) & (self._read >= 0) & (self.token >= 0) & (token >= 0)
        return np.where(known, np.maximum(self.token - token, 0), -1)

    def _reasons(self, known: Bools, earlier: Bools) -> I64:
        prefetch = _at(self._t.reads["kind"].astype(np.int64), self._read) == Kind.PREFETCH
        # Without an eviction, an expert that was read before or may have been: no telling.
        unsure = earlier | (self._t.recording.dropped > 0)
        worked_out = np.select(
            [~known, prefetch, self.ago >= 0, unsure & (self.queued_share > 0.5), unsure],
            [Reason.UNKNOWN, Reason.LATE, Reason.EVICTED, Reason.QUEUED, Reason.UNKNOWN],
            Reason.COLD,
        )
        given = self._t.stalls["a"]
        named = np.isin(given, np.array(list(Reason))) & (given != Reason.UNKNOWN)
        return np.where(named, given, worked_out)

    def stall(self, i: int) -> Stall:
        record = self._t.stalls[i]
        return Stall(
            begin_ns=int(record["begin"]),
            wait_ns=int(record["end"] - record["begin"]),
            token=int(self.token[i]),
            layer=int(record["layer"]),
            expert=int(record["expert"]),
            reason=Reason(int(self.reason[i])),
            ago=int(self.ago[i]),
            queued_share=float(self.queued_share[i]),
            ahead=int(self.ahead[i]),
        )

    def worst(self, count: int) -> list[Stall]:
        """The longest stalls, longest first; none where `count` is negative."""
        stalls = self._t.stalls
        order = np.argsort(stalls["begin"] - stalls["end"], kind="stable")[: max(count, 0)]
        return [self.stall(int(i)) for i in order]

    def totals(self) -> list[ReasonTotal]:
        """Waits by reason, the largest sum first."""
        stalls = self._t.stalls
        wait = stalls["end"] - stalls["begin"]
        totals = [
            ReasonTotal(
                reason=reason,
                count=int((self.reason == reason).sum()),
                wait_ns=int(wait[self.reason == reason].sum()),
            )
            for reason in Reason
        ]
        return sorted((t for t in totals if t.count), key=lambda t: -t.wait_ns)


def _group(records: Records) -> I64:
    group: I64 = records["layer"].astype(np.int64) << 32 | records["expert"]
    return group


def _at(values: npt.NDArray[np.int64], index: npt.NDArray[np.intp]) -> I64:
    """values[index], 0 where the index is -1."""
    padded: I64 = np.concatenate((values, [0]))[index]
    return np.where(index < 0, 0, padded)
