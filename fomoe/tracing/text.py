"""The summary as text for a terminal.

Owns: columns and units. Does not know: how the figures were worked out. What was not measured is
printed as -, never as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from fomoe.tracing.layers import LayerTimes
from fomoe.tracing.phases import F64, Phase
from fomoe.tracing.stalls import NAMES
from fomoe.tracing.summary import Summary

BARS = "▁▂▃▄▅▆▇█"
NONE = "-"


def render(summary: Summary) -> str:
    """Everything `tools/trace show` prints."""
    sections = [
        _head(summary),
        _where_time_went(summary.phases),
        _drive(summary.phases),
        _stalls(summary),
        _hit_rates(summary.phases),
        _routing(summary),
        *(_layers(phase, summary.layers[phase.name]) for phase in summary.phases),
    ]
    return "\n\n".join("\n".join(section) for section in map(list, sections) if section) + "\n"


def _head(summary: Summary) -> Iterator[str]:
    recording, info = summary.recording, summary.recording.info
    facts = [str(info.get("model", "model not named"))]
    for key, unit in (("layers", "layers"), ("experts", "experts"), ("top_k", "picked")):
        if info.get(key) is not None:
            facts.append(f"{info[key]} {unit}")
    yield f"{recording.path}: " + ", ".join(facts)
    kept = f"{len(recording.records):,} records"
    if recording.dropped:
        kept += f" (the last; {recording.dropped:,} earlier ones were overwritten)"
    if recording.damaged:
        kept += f", {recording.damaged:,} damaged ones left out"
    yield kept + ("" if recording.closed else "; the run did not end by itself, or still goes on")
    options = info.get("options")
    if isinstance(options, dict) and options:
        yield "options: " + " ".join(f"{key}={value}" for key, value in options.items())
    if not summary.phases:
        yield "No step was recorded: the run ended before the model computed anything."


def _where_time_went(phases: Sequence[Phase]) -> Iterator[str]:
    if not phases:
        return
    inside = dict.fromkeys(part for phase in phases for part in phase.parts)
    outside = dict.fromkeys(part for phase in phases for part in phase.outside)
    times: list[tuple[str, list[int | None]]] = [
        ("computing", [p.compute_ns for p in phases]),
        *((f"  {part}", [p.parts.get(part) for p in phases]) for part in inside),
        ("stalled on the drive", [p.stalled_ns for p in phases]),
        ("overhead", [p.overhead_ns for p in phases]),
        ("all of a token", [p.wall_ns for p in phases]),
        ("between steps", [p.between_ns if p.steps > 1 else None for p in phases]),
        *((f"  {part}", [p.outside.get(part) for p in phases]) for part in outside),
    ]
    rows = [[name, *chain.from_iterable(map(_time_and_share, row, phases))] for name, row in times]
    title = [cell for phase in phases for cell in (f"{phase.name}, ms/token", "share")]
    yield from _table(["Where the time went", *title], rows)
    for phase in phases:
        yield (
            f"{phase.name}: {phase.tokens:,} tokens in {phase.steps:,}"
            f" step{'s' * (phase.steps != 1)}, {phase.wall_ns / 1e9:.2f} s,"
            f" {_number(phase.tokens / max(phase.wall_ns, 1) * 1e9, 2)} tok/s within steps"
        )


def _time_and_share(time: int | None, phase: Phase) -> tuple[str, str]:
    """Milliseconds per token, and the share of the steps' time."""
    if time is None:
        return NONE, NONE
    share = time / phase.wall_ns if phase.wall_ns else math.nan
    return _number(time / 1e6 / max(phase.tokens, 1), 3), _percent(share)


def _drive(phases: Sequence[Phase]) -> Iterator[str]:
    if not phases:
        return
    if not any(phase.reading.reads for phase in phases):
        yield "The drive: nothing was read during the recorded steps."
        return
    columns = [_drive_column(phase) for phase in phases]
    rows = [[name, *(column.get(name, NONE) for column in columns)] for name in columns[0]]
    yield from _table(["The drive", *(phase.name for phase in phases)], rows)
    if math.isnan(phases[0].reading.ceiling_gbps):
        yield "the drive's ceiling was not measured in this run"
    yield "a read that lands during a compute of the loop's own thread is seen to land at its end"


def _drive_column(phase: Phase) -> dict[str, str]:
    r = phase.reading
    mean = f"{r.reads:,} x {r.bytes / 1024 / r.reads:,.0f}" if r.reads else NONE
    return {
        "MiB read per token": _number(r.bytes / 2**20 / max(phase.tokens, 1), 1),
        "reads x mean KiB": mean,
        "GB/s while reading": _rate(r.gbps_in_flight, phase),
        "GB/s over all": _rate(r.gbps_overall, phase),
        "reads in flight": _number(r.depth, 1),
        "us to land, median / p99": _pair(r.latency_us),
        "us queued before, median / p99": _pair(r.queued_us),
        "reading covered by computing": _percent(r.covered_share),
        "token / max(reading, computing)": _number(phase.ratio, 2),
        "token / max(bytes at ceiling, computing)": _number(phase.ratio_floor, 2),
        "us landed to computed, median / p99": _pair(phase.landed_us),
        "  of it with compute idle": _pair(phase.landed_idle_us),
    }


def _rate(gbps: float, phase: Phase) -> str:
    ceiling = phase.reading.ceiling_gbps
    share = f" ({100 * gbps / ceiling:.0f} % of {ceiling:.2f})" if ceiling == ceiling else ""
    return _number(gbps, 2 if gbps >= 0.1 else 4) + share


def _stalls(summary: Summary) -> Iterator[str]:
    if not summary.reasons:
        return
    wait = sum(total.wait_ns for total in summary.reasons)
    rows = [
        [
            NAMES[r.reason],
            f"{r.count:,}",
            f"{r.wait_ns / 1e6:,.1f}",
            _percent(r.wait_ns / max(wait, 1)),
        ]
        for r in summary.reasons
    ]
    yield from _table(["Why compute waited", "stalls", "ms", "share"], rows)
    if not summary.stalls:
        return
    yield ""
    rows = [
        [f"{s.wait_ns / 1e6:.2f}", _id(s.token), _id(s.layer), _id(s.expert), s.why]
        for s in summary.stalls
    ]
    yield from _table(["Worst stalls, ms", "token", "layer", "expert", "why"], rows, left=(4,))


def _hit_rates(phases: Sequence[Phase]) -> Iterator[str]:
    for phase in phases:
        if not phase.picks:
            continue
        rates = [rate for _, rate in phase.hit_history]
        late = f", {_percent(phase.late_picks / phase.picks)} were being read"
        yield (
            f"Hit rate, {phase.name}: {_percent(phase.hit_rate)} of {phase.picks:,} picks"
            + (late if phase.late_picks else "")
        )
        if len(rates) > 1:
            first, last = phase.hit_history[0][0], phase.hit_history[-1][0]
            low, high = _percent(min(rates)), _percent(max(rates))
            yield f"  token {first:,} {_spark(rates)} {last:,}   {low} to {high}"


def _spark(values: Sequence[float]) -> str:
    """Bars between the least and the greatest value."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _routing(summary: Summary) -> Iterator[str]:
    if summary.prediction:
        p = summary.prediction
        yield (
            f"Prediction: {p.predicted:,} experts predicted,"
            f" {_percent(p.picked / max(p.predicted, 1))} of them picked;"
            f" {p.prefetched:,} background reads"
        )
    if summary.substitution:
        c = summary.substitution
        yield (
            f"Cache-aware routing: {c.replaced:,} experts replaced"
            f" ({_percent(c.replaced / c.picks) if c.picks else NONE} of the picks),"
            f" {c.moved / c.replaced:.4f} of probability moved by each"
        )
    if summary.copies:
        d = summary.copies
        yield (
            f"Copies to devices: {d.experts:,} experts, {d.ahead:,} of them ahead,"
            f" {d.bytes / 1e9:.3f} GB"
        )


def _layers(phase: Phase, rows: Sequence[LayerTimes]) -> Iterator[str]:
    if not rows:
        return
    table = []
    for row in rows:
        tokens = max(phase.tokens, 1)
        overhead = max(0, row.wall_ns - row.compute_ns - row.stalled_ns)
        table.append(
            [
                str(row.layer),
                _number(row.wall_ns / 1e6 / tokens, 3),
                _number(row.compute_ns / 1e6 / tokens, 3),
                _number(row.stalled_ns / 1e6 / tokens, 3),
                _number(overhead / 1e6 / tokens, 3),
                _percent(row.hits / row.picks) if row.picks else NONE,
                _number(row.read_bytes / 2**20 / tokens, 2) if phase.reading.reads else NONE,
            ]
        )
    title = ["layer", "ms/token", "computing", "stalled", "overhead", "hit rate", "MiB/token"]
    yield f"Layers, {phase.name}"
    yield from _table(title, table)


def _table(
    title: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = (0,)
) -> Iterator[str]:
    lines = [list(title), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(title))]
    for line in lines:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _number(value: float, digits: int) -> str:
    return NONE if math.isnan(value) else f"{value:,.{digits}f}"


def _percent(share: float) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.1f} %"


def _pair(values: F64) -> str:
    return f"{_number(values[0], 0)} / {_number(values[1], 0)}"


def _id(value: int) -> str:
    return str(value) if value >= 0 else NONE
