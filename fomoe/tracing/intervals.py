"""Sets of time as arrays: unions, overlaps, lanes. Knows nothing of what the times are of."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


class Spans(NamedTuple):
    """Disjoint spans in ascending order: int64 [n] each, in nanoseconds."""

    begin: I64
    end: I64

    @property
    def total(self) -> int:
        return int((self.end - self.begin).sum())


def union(begin: I64, end: I64) -> Spans:
    """The time covered by at least one of the intervals."""
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], np.maximum.accumulate(end[order])
    if not begin.size:
        return Spans(begin, end)
    first = np.concatenate(([True], begin[1:] > end[:-1]))
    last = np.concatenate((first[1:], [True]))
    return Spans(begin[first], end[last])


def covered(spans: Spans, begin: I64, end: I64) -> I64:
    """How much of each interval [begin, end) lies within the spans."""
    if not spans.begin.size:
        return np.zeros(np.shape(begin), np.int64)
    return _covered_until(spans, end) - _covered_until(spans, begin)


def _covered_until(spans: Spans, at: I64) -> I64:
    """Length of the spans before each time."""
    before = np.concatenate(([0], np.cumsum(spans.end - spans.begin)))
    i = np.searchsorted(spans.begin, at, side="right")
    over = np.where(i > 0, np.maximum(spans.end[np.maximum(i, 1) - 1] - at, 0), 0)
    return before[i] - over


def lanes(begin: I64, end: I64) -> npt.NDArray[np.int32]:
    """A lane for each interval (ascending begin) such that none overlap: the lowest free one."""
    result = np.empty(len(begin), np.int32)
    busy: list[tuple[int, int]] = []  # (end, lane)
    free: list[int] = []
    for i, (b, e) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        while busy and busy[0][0] <= b:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (e, lane))
        result[i] = lane
    return result


def following(groups: I64, times: I64, of_groups: I64, of_times: I64) -> npt.NDArray[np.intp]:
    """For each (group, time) asked for, the index of the first of `times` in the same group that is
    not earlier; -1 where there is none."""
    asked = len(of_times)
    group = np.concatenate((of_groups, groups))
    is_time = np.arange(len(group)) >= asked  # at equal times what is asked for sorts first
    order = np.lexsort((is_time, np.concatenate((of_times, times)), group))
    places = np.flatnonzero(is_time[order])
    rank = np.empty(len(order), np.intp)
    rank[order] = np.arange(len(order))
    next_place = np.searchsorted(places, rank[:asked])
    inside = next_place < len(places)
    index = order[places[np.minimum(next_place, len(places) - 1)]] - asked if len(places) else rank
    found = np.where(inside, index[:asked], -1)
    same = (found >= 0) & (groups[found] == of_groups) if len(groups) else inside
    return np.where(same, found, -1)


def preceding(groups: I64, times: I64, of_groups: I64, of_times: I64) -> npt.NDArray[np.intp]:
    """Like `following`, but the last of `times` that is not later."""
    return following(groups, -times, of_groups, -of_times)
