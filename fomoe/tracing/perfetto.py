"""A recording as a Chrome trace, which Perfetto and chrome://tracing open.

Owns: the lanes and names of that format ("Trace Event Format": complete events "X", counters "C",
instants "i", names "M"; times in microseconds). Does not know: files' names, the summary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from fomoe.trace_format import Kind, Part, Records
from fomoe.tracing.intervals import lanes
from fomoe.tracing.stalls import StallReasons
from fomoe.tracing.summary import Summary
from fomoe.tracing.timeline import submitted

STEPS, LAYERS, COMPUTE, STALLS, CHANGES, READS, COPIES = 1, 2, 3, 4, 5, 10, 300
LANES = {
    STEPS: "steps",
    LAYERS: "layers",
    COMPUTE: "compute",
    STALLS: "stalls",
    CHANGES: "evictions and substitutions",
}
MAX_READ_LANES = 256

Event = dict[str, Any]


def write_chrome_trace(summary: Summary, out: TextIO) -> None:
    """Write all records as one JSON object, an event a line."""
    info = json.dumps({"fomoe": dict(summary.recording.info)})
    out.write(f'{{"displayTimeUnit":"ms","otherData":{info},"traceEvents":[\n')
    comma = ""
    for event in _events(summary):
        out.write(comma + json.dumps({"pid": 1, **event}, separators=(",", ":")))
        comma = ",\n"
    out.write("\n]}\n")


def _events(summary: Summary) -> Iterator[Event]:
    t = summary.timeline
    records = summary.recording.records
    start = int(records["begin"].min()) if len(records) else 0
    yield _named("process_name", 0, str(summary.recording.info.get("model", "fomoe")))
    for lane, name in LANES.items():
        yield _named("thread_name", lane, name)
    for r in t.steps.tolist():
        name = "prompt" if r[3] else "decode"
        yield _span(STEPS, start, r, f"{name} {r[4]}", {"tokens": r[2], "first token": r[4]})
    for r in t.layers.tolist():
        yield _span(LAYERS, start, r, f"layer {r[6]}", {})
    for r in t.compute.tolist():
        args = {"layer": r[6], "expert": r[5], "experts": r[3]}
        name = Part(r[2]).name.lower() if r[2] in set(Part) else f"part {r[2]}"
        yield _span(
            COMPUTE, start, r, name, {k: v for k, v in args.items() if v > 0 or k != "experts"}
        )
    yield from _stalls(summary, start)
    yield from _reads(t.reads, start)
    yield from _changes(records, start)
    yield from _copies(records, start)
    for i in np.flatnonzero(summary.times.picks).tolist():
        rate = summary.times.hits[i] / summary.times.picks[i]
        at = (int(t.steps["begin"][i]) - start) / 1e3
        yield {"ph": "C", "name": "hit rate", "ts": at, "args": {"%": round(100 * float(rate), 2)}}


def _named(what: str, lane: int, name: str) -> Event:
    return {"ph": "M", "name": what, "tid": lane, "args": {"name": name}}


def _span(lane: int, start: int, record: tuple[int, ...], name: str, args: Event) -> Event:
    begin, end = record[:2]
    times = {"ts": (begin - start) / 1e3, "dur": (end - begin) / 1e3}
    return {"ph": "X", "tid": lane, **times, "name": name, "args": args}


def _stalls(summary: Summary, start: int) -> Iterator[Event]:
    reasons = StallReasons(summary.timeline)
    for i, record in enumerate(summary.timeline.stalls.tolist()):
        stall = reasons.stall(i)
        args = {"layer": stall.layer, "expert": stall.expert}
        yield _span(STALLS, start, record, stall.why, args)


def _reads(reads: Records, start: int) -> Iterator[Event]:
    """Each in the lowest lane that was free, from handed to the drive until landed."""
    begin = submitted(reads)
    order = np.argsort(begin, kind="stable")
    reads, begin = reads[order], begin[order]
    lane = lanes(begin, reads["end"])
    for i in range(min(int(lane.max(initial=-1)) + 1, MAX_READ_LANES)):
        yield _named("thread_name", READS + i, f"read {i}")
    for r, b, n in zip(reads.tolist(), begin.tolist(), lane.tolist(), strict=True):
        kind = "prefetch" if r[7] == Kind.PREFETCH else "read"
        args = {"bytes": r[2], "queued us": (b - r[0]) / 1e3, "layer": r[6], "expert": r[5]}
        span = (b, r[1])
        yield _span(READS + n % MAX_READ_LANES, start, span, f"{kind} {r[6]}/{r[5]}", args)


def _copies(records: Records, start: int) -> Iterator[Event]:
    """By device, each in the lowest lane that was free, from queued until it was there."""
    copies = records[records["kind"] == Kind.COPY]
    copies = copies[np.argsort(copies["begin"], kind="stable")]
    track = COPIES
    for device in np.unique(copies["b"] >> 1).tolist():
        own = copies[copies["b"] >> 1 == device]
        lane = lanes(own["begin"], own["end"])
        count = int(lane.max()) + 1
        for i in range(count):
            yield _named("thread_name", track + i, f"copy {i} to device {device}")
        for r, n in zip(own.tolist(), lane.tolist(), strict=True):
            name = f"{'ahead' if r[3] & 1 else 'copy'} {r[6]}/{r[5]}"
            yield _span(track + n, start, r, name, {"bytes": r[2]})
        track += count


def _changes(records: Records, start: int) -> Iterator[Event]:
    for kind, name in ((Kind.EVICT, "evict"), (Kind.SUBSTITUTE, "substitute")):
        for r in records[records["kind"] == kind].tolist():
            at = (r[0] - start) / 1e3
            text = f"{name} {r[6]}/{r[5]}" + (f" by {r[2]}" if kind is Kind.SUBSTITUTE else "")
            yield {"ph": "i", "s": "t", "tid": CHANGES, "ts": at, "name": text}
