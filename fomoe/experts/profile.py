"""A profile of expert use: counts from earlier runs that seed the cache at start.

Owns: the file format, the order in which experts are worth loading, and the atomic write. Does not
know: slots, reads, the cache that is seeded.

Format, little-endian: magic "fomoeuse", version u32, layers u32, experts u32, CRC-32 of what
follows u32; the model's fingerprint (32 bytes); uses float32 [layers, experts].
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.errors import FormatError

F32Array = npt.NDArray[np.float32]

_MAGIC = b"fomoeuse"
_VERSION = 1
_HEADER = struct.Struct("<8sIIII")
_FINGERPRINT_BYTES = 32


def serialise(uses: npt.NDArray[np.floating], fingerprint: bytes) -> bytes:
    """A profile file's bytes. `uses` [layers, experts]: how often each expert was picked, aged as
    the writer likes; `fingerprint`: 32 bytes that tell models apart."""
    assert len(fingerprint) == _FINGERPRINT_BYTES
    assert uses.ndim == 2
    body = fingerprint + np.ascontiguousarray(uses, "<f4").tobytes()
    return _HEADER.pack(_MAGIC, _VERSION, *uses.shape, zlib.crc32(body)) + body


def is_profile(data: bytes) -> bool:
    """Whether a file of these bytes is a profile, of whatever model, damaged or not."""
    return data.startswith(_MAGIC)


def parse(data: bytes, fingerprint: bytes, num_layers: int, num_experts: int) -> F32Array:
    """The uses [layers, experts] of a profile file. Raises FormatError, with one line that says why
    it cannot serve, for a damaged profile or one of another model."""
    if len(data) < _HEADER.size or not is_profile(data):
        raise FormatError("not a profile of expert use")
    _, version, layers, experts, checksum = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise FormatError(f"the profile has version {version}; this fomoe reads {_VERSION}")
    body = data[_HEADER.size :]
    if len(body) != _FINGERPRINT_BYTES + 4 * layers * experts or zlib.crc32(body) != checksum:
        raise FormatError("the profile is damaged; delete it")
    if body[:_FINGERPRINT_BYTES] != fingerprint or (layers, experts) != (num_layers, num_experts):
        raise FormatError("the profile belongs to another model")
    uses = np.frombuffer(body, "<f4", offset=_FINGERPRINT_BYTES).reshape(layers, experts)
    if not (np.isfinite(uses).all() and (uses >= 0).all()):
        raise FormatError("the profile is damaged; delete it")
    return uses.astype(np.float32)


def seed_order(
    uses: F32Array, capacities: npt.NDArray[np.integer] | list[int]
) -> list[tuple[int, int]]:
    """(layer, expert) in the order in which loading them pays most: by share of the layer's uses,
    at most `capacities[layer]` of a layer, none that was never used."""
    share = uses / np.maximum(uses.sum(axis=1, keepdims=True), 1e-30)
    ranked = np.argsort(-share, axis=1, kind="stable")
    chosen = [
        (-float(share[layer, expert]), rank, layer, int(expert))
        for layer, capacity in enumerate(capacities)
        for rank, expert in enumerate(ranked[layer, : int(capacity)])
        if share[layer, expert] > 0
    ]
    return [(layer, expert) for _, _, layer, expert in sorted(chosen)]


def write_atomically(path: Path, data: bytes) -> None:
    """Put the bytes at `path` so that a crash leaves the old file or the new one, never a part.
    Raises OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
