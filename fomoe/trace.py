"""The recorder: what happened when, as fixed-size records in a ring of bounded size.

Owns: the format of a recording, both ways. The ring is a file mapped shared, so that a run which is
killed leaves all it recorded. Does not know: the engine, or what the records add up to
(`fomoe.trace_report`).
"""

from __future__ import annotations

import enum
import errno
import itertools
import json
import math
import mmap
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fomoe.errors import FormatError, RequestError

MAGIC: Final = b"fomoeTRC"
VERSION: Final = 1
HEADER_BYTES: Final = 1 << 16  # fixed head, then the description as JSON
HEAD: Final = struct.Struct("<8sIIIIQQ")  # magic, version, header, record, json bytes, slots, total
RECORD: Final = struct.Struct("<qqqqiihHI")
RECORD_BYTES: Final = RECORD.size
RECORD_TYPE: Final = np.dtype(
    [
        ("begin", "<i8"),  # time.perf_counter_ns
        ("end", "<i8"),
        ("a", "<i8"),
        ("b", "<i8"),
        ("token", "<i4"),
        ("expert", "<i4"),
        ("layer", "<i2"),
        ("kind", "<u2"),
        ("serial", "<u4"),  # 1 for the first record, modulo 2**32; 0 marks a slot never written
    ]
)

Records = npt.NDArray[np.void]  # of RECORD_TYPE


class Kind(enum.IntEnum):
    """What a record tells. `token` is the number of tokens the engine had computed when the step
    began, so that differences count tokens. Whatever does not apply stays -1 (or 0 for a, b).

    Reads land when the event loop sees it: one that lands while the loop's own thread computes is
    seen when that ends, so times in flight are upper bounds there.
    """

    STEP = 1  # one forward of the model: a tokens, b = 1 prompt, 0 decode
    LAYER = 2  # one layer of a step, experts included
    COMPUTE = 3  # one stretch of computing: a = Part, b = number of experts in it
    STALL = 4  # nothing to compute until a read lands: expert = the one that ended it, a = Reason
    READ = (
        5  # compute waits for it: begin = queued, end = landed, a bytes, b ns queued to submitted
    )
    PREFETCH = 6  # like READ, in the background: predicted, displaced, or warm start
    USE = 7  # an expert computed in a step: a = tokens that picked it, b = Source
    EVICT = 8  # an expert left its slot
    PREDICT = 9  # begin = predicted, end = routed, a = experts predicted, b = of them picked
    SUBSTITUTE = 10  # `expert` was replaced by expert a; b = probability moved, in millionths


class Part(enum.IntEnum):
    """Which computing a COMPUTE record is about."""

    EMBED = 1
    MIX = 2  # attention or delta-net, with its norms and projections
    ROUTE = 3
    RESIDENT = 4  # experts that were in memory
    LANDED = 5  # experts computed as their reads landed
    SHARED = 6
    FINISH = 7
    HEAD = 8
    SAMPLE = 9
    DENSE = 10  # the feed-forward of a layer without experts


class Source(enum.IntEnum):
    """Where a used expert was when the router picked it."""

    RESIDENT = 0
    MISSING = 1
    IN_FLIGHT = 2  # being read already: predicted, but not in time to be resident


class Reason(enum.IntEnum):
    """Why compute had to wait, where the engine knows; UNKNOWN is worked out from the records."""

    UNKNOWN = 0
    COLD = 1  # never read before
    EVICTED = 2
    LATE = 3  # predicted, but the read was under way when it was needed
    QUEUED = 4  # most of the wait was behind other reads
    FILE = 5  # another read than an expert's, such as embedding rows


class Tracer:
    """Records events of one run. `event` may be called from any thread; it costs 0.4 microseconds
    (2-core AVX-512 server; storing a numpy record instead costs a fifth more)."""

    __slots__ = ("_capacity", "_description", "_map", "_next", "_pack", "path")

    def __init__(self, path: Path, ring: mmap.mmap, capacity: int) -> None:
        self.path = path
        self._map = ring
        self._capacity = capacity
        self._next = itertools.count().__next__  # atomic: threads never share a slot
        self._pack = RECORD.pack_into
        self._description: dict[str, Any] = {}

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

    def close(self) -> None:
        """Finish the recording. Idempotent; no event may follow."""
        if self._map.closed:
            return
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recording as read back: `records` of RECORD_TYPE in the order they were made.

    `dropped`: older records that the ring had no room for. `damaged`: slots that hold no sensible
    record and were left out. `closed`: the run ended by itself.
    """

    path: Path
    info: Mapping[str, Any]
    records: Records
    dropped: int
    damaged: int
    closed: bool


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Read a recording, also of a run that was killed or still goes on.

    Raises FormatError when it is no recording or is cut short, RequestError when it cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            info, capacity, total = _read_head(path, file.read(HEADER_BYTES), size)
            raw = np.fromfile(file, dtype=RECORD_TYPE, count=capacity)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error
    written = raw[raw["serial"] != 0]
    kinds = np.array(list(Kind), dtype=np.uint16)
    records = written[(written["end"] >= written["begin"]) & np.isin(written["kind"], kinds)]
    serial = records["serial"].astype(np.int64)
    if serial.size and serial.max() - serial.min() > capacity:  # passed 2**32 on the way
        serial[serial < 2**31] += 2**32
    order = np.argsort(serial)
    last = total or (int(serial[order[-1]]) if serial.size else 0)
    return Recording(
        path=path,
        info=info,
        records=records[order],
        dropped=max(0, last - written.size),
        damaged=written.size - records.size,
        closed=total > 0,
    )


def _read_head(path: Path, head: bytes, size: int) -> tuple[dict[str, Any], int, int]:
    """The description, the ring's capacity, and the number of records made (0: never closed)."""
    if len(head) < HEAD.size or head[:8] != MAGIC:
        raise FormatError(f"{path} is not a recording of fomoe (made with --trace FILE)")
    _, version, header_bytes, record_bytes, json_bytes, capacity, total = HEAD.unpack_from(head)
    if version != VERSION:
        raise FormatError(
            f"{path} is a recording of version {version}, and this fomoe reads {VERSION}:"
            " use the fomoe that made it, or record anew"
        )
    if (header_bytes, record_bytes) != (HEADER_BYTES, RECORD.size):
        raise FormatError(f"{path}: the head of the recording is damaged; record anew")
    needed = header_bytes + capacity * record_bytes
    if size < needed:
        raise FormatError(
            f"{path} is cut short: {size} of {needed} bytes; copy the whole file, or record anew"
        )
    try:
        info = json.loads(head[HEAD.size : HEAD.size + json_bytes])
    except ValueError as error:
        raise FormatError(f"{path}: the description of the recording is damaged") from error
    if not isinstance(info, dict):
        raise FormatError(f"{path}: the description of the recording is damaged")
    return info, capacity, total


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
