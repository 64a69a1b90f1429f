"""Recordings as they are read back: plain records, whatever became of the run or the file.

Owns: reading the format that `fomoe.trace` writes, and telling what is broken. Does not know: what
the records add up to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.errors import FormatError, RequestError
from fomoe.trace_format import (
    COMPACT_PARTS,
    HEAD,
    HEADER_BYTES,
    MAGIC,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_NS,
    NO_PICK,
    RECORD,
    RECORD_TYPE,
    VERSION,
    Kind,
    Records,
)


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
    records = written[_sensible(written, info)]
    serial = records["serial"].astype(np.int64)
    if serial.size and serial.max() - serial.min() > capacity:  # passed 2**32 on the way
        serial[serial < 2**31] += 2**32
    order = np.argsort(serial)
    last = total or (int(serial[order[-1]]) if serial.size else 0)
    return Recording(
        path=path,
        info=info,
        records=plain_records(records[order]),
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
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the description of the recording is damaged") from error
    if not isinstance(info, dict):
        raise FormatError(f"{path}: the description of the recording is damaged")
    return info, capacity, total


def told(info: Mapping[str, Any], key: str, most: int) -> int | None:
    """A number of the description, None where there is no sensible one."""
    value = info.get(key)
    return value if isinstance(value, int) and 0 < value <= most else None


def _sensible(records: Records, info: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Which records may be what was written. What is made of them is as large as the largest layer
    and expert that they name, so these must be of the model."""
    kind, layer, expert = records["kind"], records["layer"], records["expert"].copy()
    expert[kind == Kind.LAYER_PARTS] = -1  # a duration there
    picks = kind == Kind.PICKS
    codes = _codes(records[picks])
    expert[picks] = np.where(codes == NO_PICK, 0, codes >> 2).max(axis=1, initial=0)
    good: npt.NDArray[np.bool_] = np.isin(kind, np.array(list(Kind), dtype=np.uint16))
    good &= (records["begin"] >= 0) & (records["begin"] <= records["end"])
    good &= records["end"] < MAX_NS
    good &= (layer >= -1) & (layer < (told(info, "layers", MAX_LAYERS) or MAX_LAYERS))
    good &= (expert >= -1) & (expert < (told(info, "experts", MAX_EXPERTS) or MAX_EXPERTS))
    return good


def plain_records(records: Records) -> Records:
    """The records with compact ones replaced, in their place, by what they stand for."""
    kind = records["kind"]
    layers, picks = np.flatnonzero(kind == Kind.LAYER_PARTS), np.flatnonzero(kind == Kind.PICKS)
    others = np.flatnonzero((kind != Kind.LAYER_PARTS) & (kind != Kind.PICKS))
    stretches, of_layer = _stretches(records[layers])
    uses, of_picks = _uses(records[picks])
    whole = records[layers]
    whole["kind"], whole["a"], whole["b"], whole["expert"] = Kind.LAYER, 0, 0, -1
    place = np.concatenate((others, layers[of_layer], layers, picks[of_picks]))
    everything = np.concatenate((records[others], stretches, whole, uses))
    result: Records = everything[np.argsort(place, kind="stable")]
    return result


def _stretches(layers: Records) -> tuple[Records, npt.NDArray[np.intp]]:
    """COMPUTE records of LAYER_PARTS, and which layer each is of. Their lengths are exact; what was
    between them is spread evenly, since only its sum is known."""
    words = np.stack((layers["a"], layers["b"]), axis=1).view(np.uint32).reshape(-1, 4)
    lengths = np.concatenate((words, layers["expert"][:, None]), axis=1).astype(np.int64)
    number = (lengths > 0).sum(axis=1)
    slack = np.maximum(layers["end"] - layers["begin"] - lengths.sum(axis=1), 0) // (number + 1)
    before = np.cumsum(lengths, axis=1) - lengths + slack[:, None] * np.cumsum(lengths > 0, axis=1)
    of, part = np.nonzero(lengths)
    result = layers[of]
    result["begin"] += before[of, part]
    result["end"] = result["begin"] + lengths[of, part]
    result["kind"], result["expert"], result["b"] = Kind.COMPUTE, -1, 0
    result["a"] = np.array(COMPACT_PARTS)[part]
    return result, of


def _uses(picks: Records) -> tuple[Records, npt.NDArray[np.intp]]:
    """USE records of PICKS, and which record each is of."""
    codes = _codes(picks)
    of, place = np.nonzero(codes != NO_PICK)
    result = picks[of]
    code = codes[of, place]
    result["kind"], result["expert"] = Kind.USE, code >> 2
    result["a"], result["b"] = 1, code & 3
    return result, of


def _codes(picks: Records) -> npt.NDArray[np.uint16]:
    """The eight picks of each record, uint16 [n, 8]."""
    return np.stack((picks["a"], picks["b"]), axis=1).view(np.uint16).reshape(-1, 8)
