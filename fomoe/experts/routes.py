"""Recorded routing: what the router picked, token by token, so that policies can be judged alone.

Owns: the format of `--record-routes FILE`, its writer and reader. Does not know: caches, policies,
the engine; a record is what the router said, before cache-aware routing.

Format, little-endian: one line of JSON that ends with a newline, padded with blanks to a multiple
of 64 bytes, then records of one fixed size, a token each, in the order they were computed. A file
cut short loses its last record only. JSON keys: "fomoe-routes" (version 1), layers, experts, top_k,
predicted (experts predicted per layer, may be 0), logits (bool), and, to describe the model: model,
fingerprint (hex), expert_bytes (a list, one per layer). A record:

    sequence u32, position u32, phase u8 (0 prompt, 1 decode), 7 bytes zero
    ids u16 [layers, top_k], best first          weights f16 [layers, top_k]
    predicted u16 [layers, predicted], best first; 65535 where nothing was predicted
    logits f16 [layers, experts], if recorded: the router's, before softmax
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fomoe.errors import FormatError, RequestError

PROMPT, DECODE = 0, 1
NOTHING = 65535  # in `predicted`

_ALIGNMENT = 64
_MAX_HEADER = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteShape:
    """What every record of a recording has in common."""

    layers: int
    experts: int
    top_k: int
    predicted: int = 0
    logits: bool = False
    model: str = ""
    fingerprint: str = ""
    expert_bytes: Sequence[int] = field(default=())  # one per layer, or empty where unknown

    def record(self) -> np.dtype[np.void]:
        """The dtype of one token."""
        fields: list[Any] = [
            ("sequence", "<u4"),
            ("position", "<u4"),
            ("phase", "u1"),
            ("zero", "u1", 7),
            ("ids", "<u2", (self.layers, self.top_k)),
            ("weights", "<f2", (self.layers, self.top_k)),
        ]
        if self.predicted:
            fields.append(("predicted", "<u2", (self.layers, self.predicted)))
        if self.logits:
            fields.append(("logits", "<f2", (self.layers, self.experts)))
        return np.dtype(fields)


class RouteWriter:
    """Collects one step (a prompt chunk, or a token of each sequence) layer by layer, then appends
    it to the file, which is made anew. Raises RequestError when that cannot be written."""

    def __init__(self, path: Path, shape: RouteShape) -> None:
        self._path = path
        self._shape = shape
        self._step: npt.NDArray[np.void] = np.zeros(0, shape.record())
        with self._named():
            self._file = path.open("wb")
            self._file.write(_header(shape))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(f"cannot record routes to {self._path}: {error.strerror}") from error

    def begin(self, sequences: Sequence[int], positions: Sequence[int], phase: int) -> None:
        """A step of len(positions) tokens starts."""
        self._step = np.zeros(len(positions), self._shape.record())
        self._step["sequence"], self._step["position"] = sequences, positions
        self._step["phase"] = phase
        if self._shape.predicted:
            self._step["predicted"] = NOTHING

    def layer(
        self,
        layer: int,
        ids: npt.NDArray[np.integer],
        weights: npt.NDArray[np.floating],
        logits: npt.NDArray[np.floating] | None = None,
    ) -> None:
        """The router's picks and their weights [T, k], and its logits [T, experts], at a layer."""
        self._step["ids"][:, layer] = ids
        self._step["weights"][:, layer] = weights
        if self._shape.logits:
            assert logits is not None, "the recording's shape promises logits"
            self._step["logits"][:, layer] = logits

    def prediction(self, layer: int, experts: npt.NDArray[np.integer]) -> None:
        """What was predicted for `layer`, [T, m], best first; what the shape has no room for is
        left out."""
        kept = experts[:, : self._shape.predicted]
        if self._shape.predicted:
            self._step["predicted"][:, layer, : kept.shape[1]] = kept

    def end(self) -> None:
        """All layers of the step were told: append it."""
        with self._named():
            self._file.write(self._step.tobytes())

    def close(self) -> None:
        """Finish the recording. Idempotent; no step may follow."""
        with self._named():
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_routes(path: Path) -> tuple[RouteShape, npt.NDArray[np.void]]:
    """A recording's shape and its records (memory-mapped, read-only). Raises FormatError."""
    with path.open("rb") as file:
        head = file.readline(_MAX_HEADER)
    try:
        keys = json.loads(head)
        version = keys.pop("fomoe-routes")
        if version != 1:
            raise FormatError(f"{path}: routes of version {version}; this fomoe reads 1")
        shape = RouteShape(**keys)
        record = shape.record()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: not a recording of routes ({error})") from error
    tokens = (path.stat().st_size - len(head)) // record.itemsize
    if tokens <= 0:
        return shape, np.zeros(0, record)
    records: npt.NDArray[np.void] = np.memmap(
        path, record, mode="r", offset=len(head), shape=(tokens,)
    )
    if records["ids"].max() >= shape.experts:
        raise FormatError(f"{path}: a pick beyond the model's {shape.experts} experts")
    return shape, records


def _header(shape: RouteShape) -> bytes:
    keys = {"fomoe-routes": 1}
    keys |= {name: getattr(shape, name) for name in shape.__slots__}
    keys["expert_bytes"] = list(shape.expert_bytes)  # type: ignore[assignment]
    text = json.dumps(keys)
    length = -(-(len(text) + 1) // _ALIGNMENT) * _ALIGNMENT
    return text.ljust(length - 1).encode() + b"\n"
