"""The records of a recording by kind, and where the time of each step went.

Owns: what counts as computing, stalled and overhead. Does not know: phases, layers, how it is
shown. Times are int64 nanoseconds of the recording's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.trace_format import Kind, Records, Source
from fomoe.tracing.intervals import I64, Spans, covered, union
from fomoe.tracing.recording import Recording


@dataclass(frozen=True, slots=True)
class Timeline:
    """The records by kind, and the times that the rest is made of."""

    recording: Recording
    steps: Records
    layers: Records
    compute: Records
    stalls: Records
    reads: Records  # READ and PREFETCH, by the time they landed
    uses: Records
    compute_spans: Spans
    busy_spans: Spans  # computing or stalled
    flight_spans: Spans  # at least one read handed to the drive and not landed

    def step_at(self, time: I64) -> npt.NDArray[np.intp]:
        """The number of the step that had begun last at each time; -1 before the first."""
        after: npt.NDArray[np.intp] = np.searchsorted(self.steps["begin"], time, side="right")
        return after - 1

    def token_at(self, time: I64) -> I64:
        """The token clock at each time: tokens computed when the step began; -1 before all."""
        clock = np.concatenate(([-1], self.steps["token"].astype(np.int64)))
        at: I64 = clock[self.step_at(time) + 1]
        return at

    @property
    def ceiling_gbps(self) -> float:
        value = self.recording.info.get("drive_gbps")
        return float(value) if isinstance(value, int | float) and 1e-6 < value < 1e6 else math.nan


def submitted(reads: Records) -> I64:
    """When each read was handed to the drive; `begin` is when it was queued."""
    at: I64 = reads["begin"] + np.clip(reads["b"], 0, reads["end"] - reads["begin"])
    return at


def timeline(recording: Recording) -> Timeline:
    records = recording.records
    kind = records["kind"]
    steps = np.sort(records[kind == Kind.STEP], order="begin")
    if recording.dropped and len(records):
        # A record is made when it ends: what a step that began before the oldest one did is lost.
        steps = steps[steps["begin"] >= records["end"][0]]
    if steps.size and (steps["token"] < 0).any():
        steps["token"] = np.cumsum(steps["a"]) - steps["a"]
    compute, stalls = records[kind == Kind.COMPUTE], records[kind == Kind.STALL]
    reads = records[(kind == Kind.READ) | (kind == Kind.PREFETCH)]
    reads = reads[np.argsort(reads["end"], kind="stable")]
    both = np.concatenate((compute, stalls))
    return Timeline(
        recording=recording,
        steps=steps,
        layers=np.sort(records[kind == Kind.LAYER], order="begin"),
        compute=np.sort(compute, order="begin"),
        stalls=np.sort(stalls, order="begin"),
        reads=reads,
        uses=records[kind == Kind.USE],
        compute_spans=union(compute["begin"], compute["end"]),
        busy_spans=union(both["begin"], both["end"]),
        flight_spans=union(submitted(reads), reads["end"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """One value for each step, int64 [steps]. A read belongs to the step it landed in or after."""

    wall: I64
    compute: I64
    stalled: I64  # waiting, and nothing computed meanwhile
    overhead: I64  # neither
    between: I64  # from the end of the step before of the same phase, 0 for the first
    flight: I64  # at least one read in flight
    read_bytes: I64
    picks: I64  # one expert of one token at one layer
    hits: I64  # of them, those that were resident


def step_times(t: Timeline) -> StepTimes:
    begin, end = t.steps["begin"], t.steps["end"]
    compute = covered(t.compute_spans, begin, end)
    busy = covered(t.busy_spans, begin, end)
    same = t.steps["b"][1:] == t.steps["b"][:-1]
    between = np.where(same, np.maximum(begin[1:] - end[:-1], 0), 0)
    reads_step, uses_step = t.step_at(t.reads["end"]), t.step_at(t.uses["begin"])
    picks = np.maximum(t.uses["a"], 1)
    hits = np.where(t.uses["b"] == Source.RESIDENT, picks, 0)
    return StepTimes(
        wall=end - begin,
        compute=compute,
        stalled=busy - compute,
        overhead=end - begin - busy,
        between=np.concatenate(([0], between))[: len(begin)],
        flight=covered(t.flight_spans, begin, end),
        read_bytes=sums(reads_step, t.reads["a"], len(begin)),
        picks=sums(uses_step, picks, len(begin)),
        hits=sums(uses_step, hits, len(begin)),
    )


def sums(index: npt.NDArray[np.intp], values: I64, size: int) -> I64:
    """Sum of the values of each index, int64 [size]; those of an index outside are left out."""
    result = np.zeros(size, np.int64)
    inside = (index >= 0) & (index < size)
    np.add.at(result, index[inside], values[inside])
    return result
