"""What the HTML page of a recording is given: the summary, and arrays of bounded size.

Owns: which records a page keeps when there are more than it can hold. Does not know: HTML.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.trace_format import Kind, Part, Records, Source
from fomoe.tracing.intervals import I64, lanes
from fomoe.tracing.layers import expert_counts
from fomoe.tracing.stalls import StallReasons
from fomoe.tracing.summary import Summary, as_json
from fomoe.tracing.timeline import Timeline, submitted, sums

BUDGET = 150_000  # records drawn in detail: 4 MB of page, drawn in some 10 ms
MAX_STEPS = 50_000
SLOWEST = 16  # steps always kept in detail
PLACE = "/*RECORDING*/null"


def fill_page(template: str, summary: Summary, budget: int = BUDGET) -> str:
    """The page of a template that says where the recording goes."""
    assert PLACE in template
    # Inside a script only "</" could end it early; "<!--" would change how it is parsed.
    text = json.dumps(page_data(summary, budget), allow_nan=False, separators=(",", ":"))
    return template.replace(PLACE, text.replace("<", "\\u003c"))


def page_data(summary: Summary, budget: int) -> dict[str, Any]:
    """Plain JSON values; arrays are base64 of little-endian numbers, times microseconds since the
    first record."""
    t = summary.timeline
    records = summary.recording.records
    start = int(records["begin"].min()) if len(records) else 0
    kept = kept_steps(t, summary, budget)
    return {
        "summary": as_json(summary),
        "parts": {int(part): part.name.lower() for part in Part},
        "steps": _steps(summary, start, kept),
        "detail": _detail(t, start, kept, budget),
        "heat": _heat(t),
    }


def kept_steps(t: Timeline, summary: Summary, budget: int) -> npt.NDArray[np.bool_]:
    """Which steps are drawn in detail: all if they fit, else the slowest and as many evenly spaced
    ones as there is room for."""
    count = len(t.steps)
    kept = np.zeros(count, bool)
    drawn = np.concatenate([r["begin"] for r in (t.layers, t.compute, t.stalls, t.reads)])
    per_step = sums(t.step_at(drawn), np.ones(len(drawn), np.int64), count)
    total = int(per_step.sum())
    if total <= budget:
        return ~kept
    stride = -(-total // budget)
    slowest = np.argsort(-summary.times.wall, kind="stable")[:SLOWEST]
    room = budget
    for i in [*slowest.tolist(), *range(0, count, stride)]:
        if not kept[i] and per_step[i] <= room:
            kept[i] = True
            room -= int(per_step[i])
    return kept


def _steps(summary: Summary, start: int, kept: npt.NDArray[np.bool_]) -> dict[str, Any]:
    steps, times = summary.timeline.steps[-MAX_STEPS:], summary.times
    last = slice(-MAX_STEPS, None)
    return {
        "begin": _floats64(steps["begin"] - start),
        "wall": _floats(times.wall[last]),
        "compute": _floats(times.compute[last]),
        "stalled": _floats(times.stalled[last]),
        "token": _array(steps["token"], "<i4"),
        "tokens": _array(steps["a"], "<i4"),
        "prompt": _array(steps["b"] == 1, "u1"),
        "kept": _array(kept[last], "u1"),
        "picks": _array(times.picks[last], "<i4"),
        "hits": _array(times.hits[last], "<i4"),
        "bytes": _array(times.read_bytes[last], "<f8"),
    }


def _detail(
    t: Timeline, start: int, kept: npt.NDArray[np.bool_], budget: int
) -> dict[str, dict[str, Any]]:
    """The records of the kept steps by lane. x and y: layers: experts used, of them resident;
    compute: Part, experts; stalls: number of the reason; reads: bytes, microseconds queued."""
    mask = np.concatenate((kept, [False]))
    chosen = [
        _longest(r, np.flatnonzero(mask[t.step_at(r["begin"])]), budget)
        for r in (t.layers, t.compute, t.stalls, t.reads)
    ]
    layers, compute, stalls, reads = (
        r[i] for r, i in zip((t.layers, t.compute, t.stalls, t.reads), chosen, strict=True)
    )
    uses, resident = _uses_of(t, layers)
    reasons = StallReasons(t)
    whys = [reasons.stall(int(i)).why for i in chosen[2]]
    names = list(dict.fromkeys(whys))
    index = {name: i for i, name in enumerate(names)}
    flight = submitted(reads)
    order = np.argsort(flight, kind="stable")
    reads, flight = reads[order], flight[order]
    why = np.array([index[name] for name in whys], np.int64)
    return {
        "layers": _lane(layers, layers["begin"], start, uses, resident),
        "compute": _lane(compute, compute["begin"], start, compute["a"], compute["b"]),
        "stalls": {**_lane(stalls, stalls["begin"], start, why, why), "whys": names},
        "reads": {
            **_lane(reads, flight, start, reads["a"], (flight - reads["begin"]) // 1000),
            "lane": _array(lanes(flight, reads["end"]), "<i2"),
            "prefetch": _array(reads["kind"] == Kind.PREFETCH, "u1"),
        },
    }


def _longest(records: Records, index: npt.NDArray[np.intp], limit: int) -> npt.NDArray[np.intp]:
    """Of the records at `index` the longest ones, in their order."""
    if len(index) <= limit:
        return index
    length = records["end"][index] - records["begin"][index]
    return index[np.sort(np.argpartition(-length, limit)[:limit])]


def _uses_of(t: Timeline, layers: Records) -> tuple[I64, I64]:
    """Experts used, and of them resident, in each layer record."""
    size = int(max(t.uses["layer"].max(initial=0), layers["layer"].max(initial=0))) + 1
    key = t.step_at(t.uses["begin"]) * size + t.uses["layer"]
    own = t.step_at(layers["begin"]) * size + layers["layer"]
    total = (len(t.steps) + 1) * size
    resident = (t.uses["b"] == Source.RESIDENT).astype(np.int64)
    uses = sums(key, np.ones(len(key), np.int64), total)
    return uses[own], sums(key, resident, total)[own]


def _lane(records: Records, begin: I64, start: int, x: I64, y: I64) -> dict[str, Any]:
    return {
        "begin": _floats64(begin - start),
        "length": _floats(records["end"] - begin),
        "layer": _array(records["layer"], "<i2"),
        "expert": _array(records["expert"], "<i2"),
        "x": _array(x, "<f4"),
        "y": _array(y, "<f4"),
    }


def _heat(t: Timeline) -> dict[str, Any]:
    counts = expert_counts(t)
    layers, experts = counts.uses.shape
    return {
        "layers": layers,
        "experts": experts,
        "uses": _array(counts.uses, "<u4"),
        "misses": _array(counts.misses, "<u4"),
        "evictions": _array(counts.evictions, "<u4"),
    }


def _floats64(nanoseconds: I64) -> str:
    return _array(nanoseconds / 1e3, "<f8")


def _floats(nanoseconds: I64) -> str:
    return _array(nanoseconds / 1e3, "<f4")


def _array(values: npt.NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()
