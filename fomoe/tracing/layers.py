"""What each layer and each expert of it cost: the rows of the layer table, the cells of a heat map.
Does not know how they are shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe.trace_format import MAX_EXPERTS, MAX_LAYERS, Kind, Records, Source
from fomoe.tracing.intervals import I64
from fomoe.tracing.recording import told
from fomoe.tracing.timeline import Timeline, sums


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Sums of one layer over a phase; steps is how often it ran."""

    layer: int
    steps: int
    wall_ns: int
    compute_ns: int
    stalled_ns: int
    picks: int
    hits: int
    read_bytes: int


def layer_table(t: Timeline, phase: str) -> list[LayerTimes]:
    """One row per layer that ran, for the steps of the phase "decode" or "prompt"."""
    mask = np.concatenate(((t.steps["b"] == 1) == (phase == "prompt"), [False]))

    def of(records: Records, time: str) -> Records:
        return records[mask[t.step_at(records[time])] & (records["layer"] >= 0)]

    layers, uses, reads = of(t.layers, "begin"), of(t.uses, "begin"), of(t.reads, "end")
    size = int(layers["layer"].max()) + 1 if len(layers) else 0
    steps, wall = _count(layers, size), _lengths(layers, size)
    compute, stalled = (_lengths(of(records, "begin"), size) for records in (t.compute, t.stalls))
    picks, hits = _picks(uses, size), _picks(uses[uses["b"] == Source.RESIDENT], size)
    read_bytes = sums(reads["layer"].astype(np.intp), reads["a"], size)
    return [
        LayerTimes(
            layer=layer,
            steps=int(steps[layer]),
            wall_ns=int(wall[layer]),
            compute_ns=int(compute[layer]),
            stalled_ns=int(stalled[layer]),
            picks=int(picks[layer]),
            hits=int(hits[layer]),
            read_bytes=int(read_bytes[layer]),
        )
        for layer in np.flatnonzero(steps).tolist()
    ]


def _count(records: Records, size: int) -> I64:
    return sums(records["layer"].astype(np.intp), np.ones(len(records), np.int64), size)


def _picks(uses: Records, size: int) -> I64:
    return sums(uses["layer"].astype(np.intp), np.maximum(uses["a"], 1), size)


def _lengths(records: Records, size: int) -> I64:
    return sums(records["layer"].astype(np.intp), records["end"] - records["begin"], size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCounts:
    """How often each expert was used, missed (not resident when picked) and evicted: int64
    [layers, experts]."""

    uses: I64
    misses: I64
    evictions: I64


def expert_counts(t: Timeline) -> ExpertCounts:
    """Over the whole recording; as large as the records or the description say, whichever is
    more."""
    records = t.recording.records
    evicted = records[records["kind"] == Kind.EVICT]
    shape = tuple(
        max(
            told(t.recording.info, key, most) or 0,
            *(int(r[name].max()) + 1 if len(r) else 0 for r in (t.uses, evicted)),
        )
        for key, name, most in (
            ("layers", "layer", MAX_LAYERS),
            ("experts", "expert", MAX_EXPERTS),
        )
    )
    missed = t.uses[t.uses["b"] != Source.RESIDENT]
    counts = []
    for own in (t.uses, missed, evicted):
        own = own[(own["layer"] >= 0) & (own["expert"] >= 0)]
        count = np.zeros(shape, np.int64)
        np.add.at(count, (own["layer"], own["expert"]), 1)
        counts.append(count)
    return ExpertCounts(uses=counts[0], misses=counts[1], evictions=counts[2])
