"""What a phase, prompt or decode, spent its time on, and what the drive did meanwhile.

Owns: shares, rates and ratios over many steps. Does not know: how they are shown. Rates are GB/s
(1e9 bytes); NaN: not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fomoe.trace_format import Part, Records, Source
from fomoe.tracing.intervals import I64, Spans, covered, following, preceding, union
from fomoe.tracing.timeline import StepTimes, Timeline, submitted, sums

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the drive did in a phase."""

    reads: int
    bytes: int
    flight_ns: int
    gbps_in_flight: float
    gbps_overall: float
    ceiling_gbps: float
    depth: float  # reads in flight, on average while there is one
    latency_us: F64  # median and p99, handed to the drive until landed
    queued_us: F64  # median and p99, queued until handed to the drive
    covered_share: float  # of the time in flight, that with compute going on


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Sums over the steps of one phase. Shares and ratios are NaN where there is nothing to divide.

    `ratio`: step time over max(time in flight, compute), median of the steps. `ratio_floor`: the
    same with bytes at the drive's ceiling in place of the time in flight.
    """

    name: str
    steps: int
    tokens: int
    wall_ns: int
    compute_ns: int
    stalled_ns: int
    overhead_ns: int
    between_ns: int
    parts: dict[str, int]  # nanoseconds of compute by Part, within steps
    outside: dict[str, int]  # the same between them, such as sampling
    hit_rate: float  # of picks; a pick is one expert of one token at one layer
    picks: int
    late_picks: int  # their experts were being read when the router named them
    reading: Reading
    ratio: float
    ratio_floor: float
    landed_us: F64  # median and p99 from landed to computed
    landed_idle_us: F64  # of these, with nothing being computed
    hit_history: list[tuple[int, float]] = field(default_factory=list)  # (first token, rate)


def phases(t: Timeline, times: StepTimes) -> list[Phase]:
    """Prompt and decode, whichever was recorded."""
    prompt = t.steps["b"] == 1
    chosen = [("decode", ~prompt), ("prompt", prompt)]
    return [_phase(t, times, name, mask) for name, mask in chosen if mask.any()]


def _phase(t: Timeline, times: StepTimes, name: str, mask: npt.NDArray[np.bool_]) -> Phase:
    wall = times.wall[mask]
    in_phase = np.concatenate((mask, [False]))  # -1, before the first step, is in no phase
    uses = t.uses[in_phase[t.step_at(t.uses["begin"])]]
    compute = t.compute[in_phase[t.step_at(t.compute["begin"])]]
    inside = compute["begin"] < t.steps["end"][t.step_at(compute["begin"])]
    io, busy = times.flight[mask], times.compute[mask]
    floor = times.read_bytes[mask] / t.ceiling_gbps
    landed, idle = landed_delays(t, mask)
    return Phase(
        name=name,
        steps=int(mask.sum()),
        tokens=int(t.steps["a"][mask].sum()),
        wall_ns=int(wall.sum()),
        compute_ns=int(busy.sum()),
        stalled_ns=int(times.stalled[mask].sum()),
        overhead_ns=int(times.overhead[mask].sum()),
        between_ns=int(times.between[mask].sum()),
        parts=_parts(compute[inside]),
        outside=_parts(compute[~inside]),
        hit_rate=_ratio(times.hits[mask].sum(), times.picks[mask].sum()),
        picks=int(times.picks[mask].sum()),
        late_picks=int(np.maximum(uses["a"], 1)[uses["b"] == Source.IN_FLIGHT].sum()),
        reading=_reading(t, times, mask),
        ratio=_median(wall / np.maximum(np.maximum(io, busy), 1)) if busy.any() else math.nan,
        ratio_floor=_median(wall / np.maximum(np.maximum(floor, busy), 1)),
        landed_us=quantiles_us(landed),
        landed_idle_us=quantiles_us(idle),
        hit_history=_hit_history(t, times, mask),
    )


def _parts(compute: Records) -> dict[str, int]:
    times = sums(compute["a"].astype(np.intp), compute["end"] - compute["begin"], max(Part) + 1)
    return {part.name.lower(): int(times[part]) for part in Part if times[part]}


def _reading(t: Timeline, times: StepTimes, mask: npt.NDArray[np.bool_]) -> Reading:
    in_phase = np.concatenate((mask, [False]))
    reads = t.reads[in_phase[t.step_at(t.reads["end"])]]
    start = submitted(reads)
    total = int(reads["a"].sum())
    # Of the time in flight only that within the phase's steps: a read may begin in another phase.
    steps = Spans(t.steps["begin"][mask], t.steps["end"][mask])
    flight = int(times.flight[mask].sum())
    in_flight = covered(steps, submitted(t.reads), t.reads["end"]).sum()
    both = union(
        np.concatenate((t.compute_spans.begin, t.flight_spans.begin)),
        np.concatenate((t.compute_spans.end, t.flight_spans.end)),
    )
    # Computing and reading: what each has more than both together.
    overlap = times.compute[mask].sum() + flight - covered(both, *steps).sum()
    return Reading(
        reads=len(reads),
        bytes=total,
        flight_ns=flight,
        gbps_in_flight=_ratio(total, flight) if len(reads) else math.nan,
        gbps_overall=_ratio(total, times.wall[mask].sum()) if len(reads) else math.nan,
        ceiling_gbps=t.ceiling_gbps,
        depth=_ratio(in_flight, flight),
        latency_us=quantiles_us(reads["end"] - start),
        queued_us=quantiles_us(start - reads["begin"]),
        covered_share=_ratio(overlap, flight),
    )


def _hit_history(
    t: Timeline, times: StepTimes, mask: npt.NDArray[np.bool_], bins: int = 48
) -> list[tuple[int, float]]:
    """Hit rate over the steps of a phase, in at most `bins` stretches of equally many steps."""
    index = np.flatnonzero(mask & (times.picks > 0))
    groups = np.array_split(index, min(bins, len(index))) if len(index) else []
    return [
        (int(t.steps["token"][g[0]]), _ratio(times.hits[g].sum(), times.picks[g].sum()))
        for g in groups
    ]


def landed_delays(t: Timeline, mask: npt.NDArray[np.bool_]) -> tuple[I64, I64]:
    """From each read that landed while its layer waited for it to the compute that used it:
    nanoseconds, and those of them in which nothing was computed. Matched by expert where the
    records name it, else by the next stretch of landed experts of the layer."""
    none = np.zeros(0, np.int64)
    work = t.compute[t.compute["a"] == Part.LANDED]
    reads = t.reads[np.concatenate((mask, [False]))[t.step_at(t.reads["end"])]]
    if not (work.size and reads.size and t.layers.size):
        return none, none
    home = np.searchsorted(t.layers["begin"], reads["end"], side="right") - 1
    layer_end = t.layers["end"][home]
    own = (home >= 0) & (t.layers["layer"][home] == reads["layer"]) & (layer_end > reads["end"])
    # What lands before the router has spoken is not waited for yet.
    asked = preceding(
        _group(t.uses, True), t.uses["begin"], _group(reads, True), reads["end"].astype(np.int64)
    )
    own &= asked >= 0
    if len(t.uses):
        own &= t.uses["begin"][asked] >= t.layers["begin"][home]
    reads, layer_end = reads[own], layer_end[own]
    named = bool((work["expert"] >= 0).all())
    found = following(
        _group(work, named), work["begin"], _group(reads, named), reads["end"].astype(np.int64)
    )
    good = (found >= 0) & (work["begin"][found] <= layer_end)
    begin, landed = work["begin"][found][good], reads["end"][good]
    return begin - landed, begin - landed - covered(t.compute_spans, landed, begin)


def _group(records: Records, named: bool) -> I64:
    layer = records["layer"].astype(np.int64)
    return layer << 32 | records["expert"] if named else layer


def quantiles_us(values: I64) -> F64:
    """Median and 99th percentile of nanoseconds, in microseconds; NaN when there are none."""
    if not len(values):
        return np.full(2, np.nan)
    return np.quantile(values, [0.5, 0.99]) / 1e3


def _median(values: F64) -> float:
    good = values[np.isfinite(values)]
    return float(np.median(good)) if len(good) else math.nan


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan
