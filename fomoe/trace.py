"""The recorder: what happened when, as fixed-size records in a ring of bounded size.

Owns: writing a recording. The ring is a file mapped shared, so that a run which is killed leaves
what it recorded. Does not know: the engine, or how recordings are read (`fomoe.tracing`).
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from fomoe.errors import RequestError
from fomoe.trace_format import (
    HEAD,
    HEADER_BYTES,
    MAGIC,
    NO_PICK,
    PARTS,
    PICKS,
    RECORD,
    RECORD_BYTES,
    VERSION,
    Kind,
    Part,
)

_NO_PICKS: Final = (NO_PICK,) * 8
# An enum's member costs a look-up each time it is named.
_LAYER, _COMPUTE, _LAYER_PARTS, _PICKS = map(
    int, (Kind.LAYER, Kind.COMPUTE, Kind.LAYER_PARTS, Kind.PICKS)
)
_MAX_COMPACT_NS: Final = 2**31
_FLUSH_NS: Final = 10_000_000
_pack_picks, _pack_parts = PICKS.pack_into, PARTS.pack_into

# Part, layer, begin, end, number of experts
Stretch = tuple[int, int, int, int, int]


class Tracer:
    """Records events of one run. `event` may be called from any thread; it costs 0.4 microseconds
    (2-core AVX-512 server; storing a numpy record instead costs a fifth more)."""

    __slots__ = (
        "_capacity",
        "_description",
        "_flushed_ns",
        "_layers",
        "_map",
        "_next",
        "_pack",
        "_picks",
        "path",
    )

    def __init__(self, path: Path, ring: mmap.mmap, capacity: int) -> None:
        self.path = path
        self._map = ring
        self._capacity = capacity
        self._next = itertools.count().__next__  # atomic: threads never share a slot
        self._pack = RECORD.pack_into
        self._description: dict[str, Any] = {}
        self._layers: list[tuple[int, int, int, int, list[Stretch]]] = []
        self._picks: list[tuple[int, int, int, list[int]]] = []
        self._flushed_ns = 0

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, capacity: int = 1 << 20, info: Mapping[str, Any]
    ) -> Tracer:
        """Start a recording at `path`, replacing an earlier recording but no other file.

        `capacity` records of 48 bytes are allocated at once, so a full drive shows here and not in
        the middle of the run; when they are used up the oldest are overwritten. `info` is kept as
        JSON; these keys are understood: model, fingerprint, layers, experts, top_k, expert_bytes,
        threads, options (a mapping), drive_gbps (the drive's ceiling; leave out or NaN: not
        measured). Raises RequestError when the file cannot be made.
        """
        path = Path(path)
        if capacity < 1:
            raise RequestError(f"a recording needs room for at least one record, not {capacity}")
        size = HEADER_BYTES + capacity * RECORD.size
        try:
            _remove_recording(path)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.posix_fallocate(file, 0, size)
                ring = mmap.mmap(file, size)
            except OSError:
                path.unlink()
                raise
            finally:
                os.close(file)
        except OSError as error:
            raise RequestError(
                f"cannot record to {path}: {error.strerror or error}"
                f" (a recording takes {size / 2**20:.0f} MiB); choose another path for --trace"
            ) from error
        tracer = cls(path, ring, capacity)
        clock = {"perf_counter_ns": time.perf_counter_ns(), "unix_ns": time.time_ns()}
        tracer.describe({**info, "clock": clock})
        return tracer

    def describe(self, info: Mapping[str, Any]) -> None:
        """Add to the description: facts that are known only later, such as a measured ceiling."""
        self._description.update(info)
        text = json.dumps(_plain(self._description), allow_nan=False).encode()
        if HEAD.size + len(text) > HEADER_BYTES:
            raise RequestError(
                f"the description of a recording takes {len(text)} bytes, more than the"
                f" {HEADER_BYTES - HEAD.size} there is room for; record fewer options"
            )
        self._map[HEAD.size : HEAD.size + len(text)] = text
        self._write_head(len(text), 0)

    def event(
        self,
        kind: int,
        begin_ns: int,
        end_ns: int,
        layer: int = -1,
        expert: int = -1,
        token: int = -1,
        a: int = 0,
        b: int = 0,
    ) -> None:
        """Record one event; times are of time.perf_counter_ns, `a` and `b` as `Kind` says."""
        n = self._next()
        # The serial is packed last: a record cut short by a kill keeps the serial of the old one.
        at = HEADER_BYTES + n % self._capacity * RECORD_BYTES
        serial = n + 1 & 0xFFFFFFFF
        self._pack(self._map, at, begin_ns, end_ns, a, b, token, expert, layer, kind, serial)

    def layer(
        self, begin_ns: int, end_ns: int, layer: int, token: int, stretches: list[Stretch]
    ) -> None:
        """Record a LAYER and its stretches of COMPUTE (the list is the tracer's from here on): one
        record where nothing was waited for.

        Written at the end of the step, or 10 ms later: in the midst of a step a record meets cold
        caches and costs 3 to 10 microseconds, among its like 0.4 to 1. For the same reason a layer
        without stalls is one record, not seven.
        """
        self._layers.append((begin_ns, end_ns, layer, token, stretches))
        if end_ns - self._flushed_ns > _FLUSH_NS:
            self.flush()
            self._flushed_ns = end_ns

    def picks(self, at_ns: int, layer: int, token: int, picks: list[int]) -> None:
        """Record the USEs of one token, each given as expert * 4 + Source (experts < 16383)."""
        self._picks.append((at_ns, layer, token, picks))

    def flush(self) -> None:
        """Write what layer() and picks() noted. Before a STEP is recorded: what is deferred stays
        within its step, so that a reader can tell which steps are complete."""
        for at, layer, token, picks in self._picks:
            for i in range(0, len(picks), 8):
                eight = picks[i : i + 8]
                eight += _NO_PICKS[len(eight) :]
                n = self._next()
                place = HEADER_BYTES + n % self._capacity * RECORD_BYTES
                serial = n + 1 & 0xFFFFFFFF
                _pack_picks(self._map, place, at, at, *eight, token, -1, layer, _PICKS, serial)
        self._picks.clear()
        for noted in self._layers:
            self._write_layer(*noted)
        self._layers.clear()

    def _write_layer(
        self, begin: int, end: int, layer: int, token: int, stretches: list[Stretch]
    ) -> None:
        parts = [0] * (Part.DENSE + 1)
        for part, _, since, until, _ in stretches:
            parts[part] += until - since
        _, embed, mix, route, resident, landed, shared, finish, head, sample, dense = parts
        if embed or landed or head or sample or dense or end - begin >= _MAX_COMPACT_NS:
            for part, of, since, until, experts in stretches:
                self.event(_COMPUTE, since, until, of, -1, token, part, experts)
            self.event(_LAYER, begin, end, layer, -1, token)
            return
        n = self._next()
        place = HEADER_BYTES + n % self._capacity * RECORD_BYTES
        five = (mix, route, resident, shared, token, finish)
        serial = n + 1 & 0xFFFFFFFF
        _pack_parts(self._map, place, begin, end, *five, layer, _LAYER_PARTS, serial)

    def close(self) -> None:
        """Finish the recording. Idempotent; no event may follow."""
        if self._map.closed:
            return
        self.flush()
        json_bytes = HEAD.unpack_from(self._map)[4]
        self._write_head(json_bytes, self._next())
        self._map.close()

    def _write_head(self, json_bytes: int, total: int) -> None:
        head = (MAGIC, VERSION, HEADER_BYTES, RECORD.size, json_bytes, self._capacity, total)
        HEAD.pack_into(self._map, 0, *head)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove_recording(path: Path) -> None:
    """Unlink, not truncate: another process may still have the old recording mapped."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except FileNotFoundError:
        return
    if start and start != MAGIC:
        raise FileExistsError(errno.EEXIST, "the file exists and is not a recording", str(path))
    path.unlink()


def _plain(value: Any) -> Any:
    """`value` as JSON has it: NaN is not a number there, and means not measured here."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
