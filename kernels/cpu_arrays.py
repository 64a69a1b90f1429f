"""Arrays as C sees them: weights, activations, scratch memory.

Owns: pointers of numpy arrays, looked up rather than made on every call, and scratch in huge pages.
Does not know: which operation uses them.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels.ops import MoeSpec, Tensor
from fomoe.native import ffi

F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]

HUGE_PAGE = 2 << 20
_FLOATS = ffi.typeof("float[]")
_MOST_VIEWS = 4096


class CpuWeight:
    """A matrix [rows, cols] in host memory, as it lies in the file."""

    __slots__ = ("address", "cols", "data", "row_bytes", "rows", "type_id")

    def __init__(self, tensor: Tensor) -> None:
        self.rows, self.cols = tensor.shape
        self.type_id = tensor.type.id
        self.row_bytes = tensor.type.row_bytes(self.cols)
        self.data = tensor.data
        assert tensor.data.size == self.rows * self.row_bytes, tensor.name
        self.address = ffi.from_buffer("char[]", tensor.data)

    def fill(self, product: Any) -> None:
        """Set the weight's fields of a C fomoe_product."""
        product.data = self.address
        product.row_bytes = self.row_bytes
        product.type = self.type_id
        product.rows = self.rows


class View:
    """A float32 array [rows, cols] for C: `ld` floats from row to row. Vectors have one row."""

    __slots__ = ("array", "cols", "ld", "pointer", "rows")

    def __init__(self, array: F32Array) -> None:
        assert array.dtype == np.float32
        assert array.strides[-1] == 4 or array.shape[-1] == 1, array.strides
        self.array = array
        if array.flags.c_contiguous:
            self.pointer = ffi.from_buffer(_FLOATS, array)
        else:
            self.pointer = ffi.cast("float *", array.ctypes.data)
        self.rows = array.shape[0] if array.ndim > 1 else 1
        self.cols = array.shape[-1]
        self.ld = array.strides[0] // 4 if array.ndim > 1 else self.cols


class Views:
    """The views of arrays that come again and again: a dictionary's look-up instead of a new one.

    An array that has a view is kept alive, so its id stays its own; when there are too many, all
    are forgotten.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, View] = {}

    def of(self, array: F32Array) -> View:
        view = self._by_id.get(id(array))
        if view is None:
            if len(self._by_id) >= _MOST_VIEWS:
                self._by_id.clear()
            view = self._by_id[id(array)] = View(array)
        return view

    def clear(self) -> None:
        self._by_id.clear()


class Scratch:
    """Huge-page memory that grows only when asked for more than ever before."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.pointer: Any = ffi.NULL

    def reserve(self, num_bytes: int) -> bool:
        """Make room for num_bytes, 64-byte aligned; True when the pointer changed."""
        if num_bytes <= self.num_bytes:
            return False
        self.num_bytes = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, self.num_bytes, flags=flags)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self.pointer = ffi.from_buffer("char[]", memory)  # keeps the mapping
        return True


class RoutedArrays:
    """What routers say: h, logits, ids and weights, for up to `max_tokens` tokens."""

    def __init__(self, max_tokens: int, *, with_h: bool = True) -> None:
        self._max_tokens = max_tokens
        self._with_h = with_h
        self._h = self._logits = self._weights = np.empty(0, np.float32)
        self._ids = np.empty(0, np.int32)

    @property
    def num_bytes(self) -> int:
        held = (self._h, self._logits, self._ids, self._weights)
        return sum(int(a.nbytes) for a in held)

    @staticmethod
    def bytes_needed(max_tokens: int, specs: Sequence[MoeSpec]) -> int:
        if not specs:
            return 0
        widest: list[int] = [max(w) for w in zip(*map(_routed_widths, specs), strict=True)]
        return 4 * max_tokens * sum(widest)

    def reserve(self, spec: MoeSpec) -> None:
        h, logits, ids, _ = (self._max_tokens * width for width in _routed_widths(spec))
        if self._with_h and h > self._h.size:
            self._h = aligned_array(1, h)[0]
        if logits > self._logits.size:
            self._logits = np.empty(logits, np.float32)
        if ids > self._ids.size:
            self._ids, self._weights = np.empty(ids, np.int32), np.empty(ids, np.float32)

    def take(self, spec: MoeSpec, tokens: int) -> tuple[F32Array, F32Array, I32Array, F32Array]:
        """h [tokens, hidden], if it is held, logits [tokens, experts], ids and weights [tokens,
        top_k]."""
        assert tokens <= self._max_tokens, (tokens, self._max_tokens)
        self.reserve(spec)
        hidden, experts, top_k, _ = _routed_widths(spec)
        return (
            self._h[: tokens * hidden].reshape(-1, hidden),
            self._logits[: tokens * experts].reshape(tokens, experts),
            self._ids[: tokens * top_k].reshape(tokens, top_k),
            self._weights[: tokens * top_k].reshape(tokens, top_k),
        )


def _routed_widths(spec: MoeSpec) -> tuple[int, int, int, int]:
    return spec.hidden, spec.num_experts, spec.top_k, spec.top_k


def aligned_array(rows: int, cols: int) -> F32Array:
    """Uninitialised [rows, cols] that starts at a cache line."""
    memory = np.empty(rows * cols * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + rows * cols * 4].view(np.float32).reshape(rows, cols)
