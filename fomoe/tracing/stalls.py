"""Why compute had to wait: each stall, and the reads and evictions that explain it.

Owns: the reasons. Does not know: how they are shown. Where the engine gave a reason it is kept; the
others are worked out from what was recorded before the stall.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe.trace import Kind, Reason, Records
from fomoe.tracing.timeline import Timeline, submitted

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
    """Explains the stalls of a timeline. `history` from first to last needs one pass over the reads
    and evictions; each stall after that is a few binary searches."""

    def __init__(self, t: Timeline) -> None:
        records = t.recording.records
        self._t = t
        self._reads = _by_expert(t.reads)
        self._evicted = _by_expert(records[records["kind"] == Kind.EVICT])
        self._submitted = np.sort(submitted(t.reads))
        self._landed = np.sort(t.reads["end"])

    def explain(self, stall: np.void) -> Stall:
        begin, end = int(stall["begin"]), int(stall["end"])
        known = Reason(int(stall["a"])) if int(stall["a"]) in set(Reason) else Reason.UNKNOWN
        layer, expert = int(stall["layer"]), int(stall["expert"])
        token = int(self._t.token_at(stall["begin"]))
        read = self._read_of(layer, expert, begin, end)
        ago, share, ahead = -1, 0.0, -1
        if read is not None:
            queued, landed = int(read["begin"]), int(read["end"])
            start = int(submitted(read.reshape(1))[0])
            share = (start - queued) / max(landed - queued, 1)
            ahead = int(
                np.searchsorted(self._submitted, queued) - np.searchsorted(self._landed, queued)
            )
            ago = self._evicted_ago(layer, expert, queued, token)
            known = known or self._reason(read, ago, share)
        return Stall(
            begin_ns=begin,
            wait_ns=end - begin,
            token=token,
            layer=layer,
            expert=expert,
            reason=known,
            ago=ago,
            queued_share=share,
            ahead=ahead,
        )

    def worst(self, count: int) -> list[Stall]:
        """The longest stalls, longest first."""
        stalls = self._t.stalls
        order = np.argsort(stalls["begin"] - stalls["end"], kind="stable")[:count]
        return [self.explain(stalls[i]) for i in order]

    def totals(self) -> list[ReasonTotal]:
        """Waits by reason, the largest sum first. Very many stalls are sampled by the longest:
        what is left over counts as unknown."""
        sums: dict[Reason, list[int]] = {}
        for stall in self.worst(20_000):
            sums.setdefault(stall.reason, []).append(stall.wait_ns)
        rest = len(self._t.stalls) - sum(map(len, sums.values()))
        wait = int((self._t.stalls["end"] - self._t.stalls["begin"]).sum())
        left = wait - sum(map(sum, sums.values()))
        totals = [
            ReasonTotal(reason=reason, count=len(waits), wait_ns=sum(waits))
            for reason, waits in sums.items()
        ]
        if rest:
            totals.append(ReasonTotal(reason=Reason.UNKNOWN, count=rest, wait_ns=left))
        return sorted(totals, key=lambda total: -total.wait_ns)

    def _reason(self, read: np.void, ago: int, queued_share: float) -> Reason:
        if read["kind"] == Kind.PREFETCH:
            return Reason.LATE
        if ago >= 0:
            return Reason.EVICTED
        if self._earlier_read(read) or self._t.recording.dropped:
            return Reason.QUEUED if queued_share > 0.5 else Reason.UNKNOWN
        return Reason.COLD

    def _read_of(self, layer: int, expert: int, begin: int, end: int) -> np.void | None:
        """The read of the expert that was under way during the stall."""
        own = self._reads.get((layer, expert))
        if own is None or expert < 0:
            return None
        i = int(np.searchsorted(own["end"], begin, side="right"))
        return own[i] if i < len(own) and own[i]["begin"] < end else None

    def _earlier_read(self, read: np.void) -> bool:
        own = self._reads[int(read["layer"]), int(read["expert"])]
        return bool(own[0]["end"] <= read["begin"])

    def _evicted_ago(self, layer: int, expert: int, queued: int, token: int) -> int:
        own = self._evicted.get((layer, expert))
        i = int(np.searchsorted(own["begin"], queued, side="right")) if own is not None else 0
        if own is None or i == 0 or token < 0:
            return -1
        return max(0, token - int(self._t.token_at(own["begin"][i - 1])))


def _by_expert(records: Records) -> dict[tuple[int, int], Records]:
    """The records of each (layer, expert), in order of their end."""
    order = np.lexsort((records["end"], records["expert"], records["layer"]))
    records = records[order]
    key = records["layer"].astype(np.int64) << 32 | records["expert"]
    cuts = np.flatnonzero(np.diff(key)) + 1
    groups = np.split(records, cuts) if len(records) else []
    return {(int(g["layer"][0]), int(g["expert"][0])): g for g in groups}
