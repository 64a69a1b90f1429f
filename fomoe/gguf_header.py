"""The header of one GGUF file: bytes -> metadata and tensor table.

Owns: the container format, versions 2 and 3, and every check against a hostile or truncated file.
Does not know: splits, architectures, what a key or a tensor is for. Format: ggml's gguf.h.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from fomoe.errors import FormatError, UnsupportedError
from fomoe.gguf_arrays import DTYPES, STRING, ArrayRef
from fomoe.kernels.table import QUANT_TYPES, QuantType
from fomoe.native import ffi, lib

# Far above any real header (a vocabulary of 248,320 with its merges is 11 MB), low enough that a
# hostile one can take neither much memory nor much time.
MAX_HEADER_BYTES = 128 << 20
MAX_TENSORS = 1 << 18
MAX_KEYS = 1 << 16
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 16 << 20
DEFAULT_ALIGNMENT = 32
_WINDOW = 1 << 20

_ARRAY = 9
_STRUCTS = {id_: struct.Struct("<" + code) for id_, code in zip(DTYPES, "BbHhIif?Qqd", strict=True)}
_U32, _U64, _I32 = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<i")

# Types of ggml that fomoe cannot compute yet: named, so that the refusal says what the file holds.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` is row-major (ggml's `ne` reversed, trailing ones trimmed)."""

    name: str
    type: QuantType
    shape: tuple[int, ...]
    shard: int
    offset: int  # in that shard's file, from its first byte
    nbytes: int


Scalar = bool | int | float | str
Value = Scalar | ArrayRef


@dataclass(frozen=True, slots=True)
class Header:
    """One file: its metadata (arrays unread), its tensors in file order, and its size in bytes."""

    path: Path
    size: int
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path, shard: int = 0) -> Header:
    """Read the header of one file; tensors are marked as lying in `shard`.

    Raises FormatError when the file is damaged or no GGUF, UnsupportedError when it is sound but of
    a version, byte order or tensor type that fomoe lacks, OSError when it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
        raise FormatError(f"{path}: not a file; give the model's .gguf file, or any of its shards")
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return _Parser(path, file.fileno(), size, shard).parse()


class _Parser:
    """A cursor over the file's bytes through a window that moves forward only."""

    def __init__(self, path: Path, fd: int, size: int, shard: int) -> None:
        self._path, self._fd, self._size, self._shard = path, fd, size, shard
        self._buf = b""
        self._base = 0  # file offset of the window
        self._pos = 0  # position within the window

    def parse(self) -> Header:
        num_tensors, num_keys = self._preamble()
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._name("key")
            if not key or key in metadata:
                raise self._error(f"key {key!r} occurs twice" if key else "a key is empty")
            metadata[key] = self._value(key, self._unpack(_U32))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int):
            raise self._error("general.alignment is not a whole number")
        if alignment <= 0 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment}, not a power of two")
        raw = [self._tensor(alignment) for _ in range(num_tensors)]
        data_start = -(-self._offset // alignment) * alignment
        tensors = [self._place(data_start, *fields) for fields in raw]
        self._check_tensors(tensors)
        return Header(self._path, self._size, metadata, tuple(tensors))

    def _preamble(self) -> tuple[int, int]:
        if self._size < 4 or self._bytes(4) != b"GGUF":
            raise FormatError(f"{self._path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self._unpack(_U32)
        if version & 0xFFFF == 0 and version:
            raise UnsupportedError(f"{self._path}: big-endian GGUF; fomoe reads little-endian only")
        if version not in (2, 3):
            raise UnsupportedError(f"{self._path}: GGUF version {version}; supported: 2, 3")
        num_tensors, num_keys = self._unpack(_U64), self._unpack(_U64)
        # A tensor takes at least 32 bytes of header, a key at least 14.
        left = self._size - self._offset
        if num_tensors > MAX_TENSORS or num_tensors * 32 > left:
            raise self._error(f"absurd number of tensors: {num_tensors}")
        if num_keys > MAX_KEYS or num_keys * 14 > left:
            raise self._error(f"absurd number of keys: {num_keys}")
        return num_tensors, num_keys

    def _value(self, key: str, kind: int) -> Value:
        if kind == STRING:
            # Not strict: a badly encoded author's name must not make a model unusable.
            return self._string(f"the value of {key}", MAX_STRING_BYTES).decode(errors="replace")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _STRUCTS:
            raise self._error(f"key {key}: unknown value type {kind}")
        value: Scalar = _STRUCTS[kind].unpack(self._bytes(_STRUCTS[kind].size))[0]
        return value

    def _array(self, key: str) -> ArrayRef:
        element, count = self._unpack(_U32), self._unpack(_U64)
        start = self._offset
        if element == _ARRAY:
            raise UnsupportedError(f"{self._path}: key {key}: an array of arrays")
        if element != STRING and element not in DTYPES:
            raise self._error(f"key {key}: unknown element type {element}")
        smallest = 8 if element == STRING else DTYPES[element].itemsize
        if count * smallest > min(self._size, MAX_HEADER_BYTES) - start:
            raise self._error(f"key {key}: absurd or truncated array of {count} elements")
        if element == STRING:
            self._skip_strings(count)
        else:
            self._pos += count * smallest
        self._need(0)
        return ArrayRef(self._path, key, element, count, start, self._offset - start)

    def _skip_strings(self, count: int) -> None:
        pos = ffi.new("uint64_t *")
        while count:
            self._need(8)
            pos[0] = self._pos
            count -= lib.fomoe_strings_skip(
                ffi.from_buffer("uint8_t[]", self._buf), len(self._buf), count, pos
            )
            self._pos = pos[0]

    def _tensor(self, alignment: int) -> tuple[str, QuantType, tuple[int, ...], int]:
        name = self._name("tensor name")
        num_dims = self._unpack(_U32)
        if not 1 <= num_dims <= 4:
            raise self._error(f"tensor {name}: {num_dims} dimensions; 1 to 4 are allowed")
        ne = [self._unpack(_U64) for _ in range(num_dims)]
        type_id, offset = self._unpack(_I32), self._unpack(_U64)
        quant = QUANT_TYPES.get(type_id)
        if quant is None:
            raise UnsupportedError(
                f"{self._path}: tensor {name} has type {_OTHER_TYPES.get(type_id, '?')} (ggml type "
                f"{type_id}); supported: {', '.join(t.name for t in QUANT_TYPES.values())}"
            )
        if 0 in ne or ne[0] % quant.block_size:
            raise self._error(f"tensor {name}: shape {ne} is not possible for {quant.name}")
        if offset % alignment:
            raise self._error(f"tensor {name}: offset {offset} is not a multiple of {alignment}")
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        return name, quant, tuple(reversed(ne)), offset

    def _place(
        self, data_start: int, name: str, quant: QuantType, shape: tuple[int, ...], offset: int
    ) -> TensorInfo:
        nbytes = prod(shape[:-1]) * quant.row_bytes(shape[-1])
        start = data_start + offset
        if start + nbytes > self._size:
            raise FormatError(
                f"{self._path}: tensor {name} ends at byte {start + nbytes}, the file at "
                f"{self._size}: truncated (an incomplete download?) or damaged"
            )
        return TensorInfo(name, quant, shape, self._shard, start, nbytes)

    def _check_tensors(self, tensors: list[TensorInfo]) -> None:
        names: set[str] = set()
        for tensor in tensors:
            if tensor.name in names:
                raise FormatError(f"{self._path}: tensor {tensor.name} occurs twice")
            names.add(tensor.name)
        by_offset = sorted(tensors, key=lambda tensor: tensor.offset)
        for left, right in pairwise(by_offset):
            if left.offset + left.nbytes > right.offset:
                raise FormatError(f"{self._path}: {left.name} and {right.name} overlap")

    def _name(self, what: str) -> str:
        try:
            return self._string(f"a {what}", MAX_NAME_BYTES).decode()
        except UnicodeDecodeError:
            raise self._error(f"a {what} is not UTF-8") from None

    def _string(self, what: str, limit: int) -> bytes:
        length = self._unpack(_U64)
        if length > limit:
            raise self._error(f"{what} has an absurd length: {length}")
        return self._bytes(length)

    def _unpack(self, field: struct.Struct) -> int:
        value: int = field.unpack(self._bytes(field.size))[0]
        return value

    def _bytes(self, count: int) -> bytes:
        if self._pos + count > len(self._buf):
            self._need(count)
        start = self._pos
        self._pos = start + count
        return self._buf[start : self._pos]

    def _need(self, count: int) -> None:
        """Make the window hold the next `count` bytes, or say why it cannot."""
        if self._pos + count <= len(self._buf):
            return
        offset = self._offset
        if offset + count > self._size:
            raise self._error(
                f"truncated: the header needs more than the file's {self._size} bytes"
            )
        if offset + count > MAX_HEADER_BYTES:
            raise self._error(f"absurd header: longer than {MAX_HEADER_BYTES >> 20} MiB")
        self._buf = os.pread(self._fd, max(count, min(_WINDOW, self._size - offset)), offset)
        self._base, self._pos = offset, 0
        if len(self._buf) < count:
            raise self._error("truncated while being read")

    @property
    def _offset(self) -> int:
        return self._base + self._pos

    def _error(self, reason: str) -> FormatError:
        return FormatError(f"{self._path}: {reason} (at byte {self._offset} of the header)")
