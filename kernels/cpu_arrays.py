"""Arrays as C sees them: weights, activations, scratch memory.

Owns: pointers of numpy arrays, looked up rather than made on every call, and scratch in huge pages.
Does not know: which operation uses them.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels.ops import Tensor
from fomoe.native import ffi

F32Array = npt.NDArray[np.float32]

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


def aligned_array(rows: int, cols: int) -> F32Array:
    """Uninitialised [rows, cols] that starts at a cache line."""
    memory = np.empty(rows * cols * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + rows * cols * 4].view(np.float32).reshape(rows, cols)
