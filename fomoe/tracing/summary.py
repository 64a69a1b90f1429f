"""The summary of a recording, and its form as JSON.

Owns: which results belong to a summary. Does not know: terminals, pages.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fomoe.trace_format import Kind, Records
from fomoe.tracing.layers import LayerTimes, layer_table
from fomoe.tracing.phases import Phase, phases
from fomoe.tracing.recording import Recording
from fomoe.tracing.stalls import NAMES, ReasonTotal, Stall, StallReasons
from fomoe.tracing.timeline import StepTimes, Timeline, step_times, timeline

TIMES = ("wall", "compute", "stalled", "overhead", "between", "flight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted experts and how many of them were picked; recall is against all uses of the layers
    that were predicted for."""

    predicted: int
    picked: int
    prefetched: int  # background reads that landed


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitution:
    """Cache-aware routing: experts replaced, of all picks of decode, and the probability that
    moved."""

    replaced: int
    picks: int
    moved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Experts copied to devices, how many of them ahead of their layer, and the bytes."""

    experts: int
    ahead: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    recording: Recording
    timeline: Timeline
    times: StepTimes
    phases: list[Phase]
    layers: dict[str, list[LayerTimes]]  # by phase
    stalls: list[Stall]  # the worst, longest first
    reasons: list[ReasonTotal]
    prediction: Prediction | None
    substitution: Substitution | None
    copies: Copies | None


def summarise(recording: Recording, *, stalls: int = 15) -> Summary:
    """Everything `show` prints; `stalls` of the worst."""
    t = timeline(recording)
    times = step_times(t)
    found = phases(t, times)
    reasons = StallReasons(t)
    return Summary(
        recording=recording,
        timeline=t,
        times=times,
        phases=found,
        layers={phase.name: layer_table(t, phase.name) for phase in found},
        stalls=reasons.worst(stalls),
        reasons=reasons.totals(),
        prediction=_prediction(recording.records),
        substitution=_substitution(recording.records, found),
        copies=_copies(recording.records),
    )


def _prediction(records: Records) -> Prediction | None:
    predicted = records[records["kind"] == Kind.PREDICT]
    if not len(predicted):
        return None
    return Prediction(
        predicted=int(predicted["a"].sum()),
        picked=int(predicted["b"].sum()),
        prefetched=int((records["kind"] == Kind.PREFETCH).sum()),
    )


def _copies(records: Records) -> Copies | None:
    copies = records[records["kind"] == Kind.COPY]
    if not len(copies):
        return None
    ahead, nbytes = int((copies["b"] & 1).sum()), int(copies["a"].sum())
    return Copies(experts=len(copies), ahead=ahead, bytes=nbytes)


def _substitution(records: Records, found: list[Phase]) -> Substitution | None:
    replaced = records[records["kind"] == Kind.SUBSTITUTE]
    if not len(replaced):
        return None
    return Substitution(
        replaced=len(replaced),
        picks=sum(phase.picks for phase in found if phase.name == "decode"),
        moved=float(replaced["b"].sum()) / 1e6,
    )


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain JSON values; what was not measured is null, never zero."""
    recording = summary.recording
    return {
        key: plain(value)
        for key, value in {
            "path": recording.path,
            "info": recording.info,
            "closed": recording.closed,
            "start_ns": int(recording.records["begin"].min()) if len(recording.records) else 0,
            "records": len(recording.records),
            "dropped": recording.dropped,
            "damaged": recording.damaged,
            "phases": [asdict(phase) for phase in summary.phases],
            "layers": {
                name: [asdict(row) for row in rows] for name, rows in summary.layers.items()
            },
            "stalls": [
                asdict(s) | {"reason": s.reason.name.lower(), "why": s.why} for s in summary.stalls
            ],
            "reasons": [
                asdict(r) | {"reason": r.reason.name.lower(), "name": NAMES[r.reason]}
                for r in summary.reasons
            ],
            "prediction": asdict(summary.prediction) if summary.prediction else None,
            "substitution": asdict(summary.substitution) if summary.substitution else None,
            "copies": asdict(summary.copies) if summary.copies else None,
        }.items()
    }


def steps_as_json(summary: Summary) -> list[dict[str, Any]]:
    """One object for each step; stepping through them shows how a run went."""
    steps, times = summary.timeline.steps, asdict(summary.times)
    return [
        {
            "token": int(step["token"]),
            "tokens": int(step["a"]),
            "phase": "prompt" if step["b"] == 1 else "decode",
            **{f"{name}_ns" if name in TIMES else name: int(times[name][i]) for name in times},
        }
        for i, step in enumerate(steps)
    ]


def plain(value: Any) -> Any:
    """`value` with arrays as lists and NaN as None."""
    match value:
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case float() if not math.isfinite(value):
            return None
        case str() | bool() | int() | float() | None:
            return value
        case _:
            return str(value)
