"""Quantised tensors on the CPU, launched from Python.

Owns: dequantisation, and products of single matrices for tests and benchmarks; the error limits of
the types. Does not know: layers, experts. A model's forward calls the C functions itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fomoe.errors import UnsupportedError
from fomoe.kernels.table import QUANT_TYPES, QuantType
from fomoe.native import check, ffi, lib

F32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


class Isa(IntEnum):
    """Instruction sets that kernels are written for; each includes the ones before it."""

    SCALAR = 0
    AVX2 = 1
    AVX512 = 2
    AMX = 3


# Largest NMSE of a product against float64 with exactly dequantised weights and the given float32
# activations. Float types only round; the others carry the 8-bit rounding of the activations: one
# scale per 32 columns, or per 256. Measured on normal activations: 2e-14, 2.5e-5, 5e-5.
_ROUNDED, _PER_32, _PER_256 = 1e-12, 6e-5, 1.2e-4
LIMITS: dict[str, float] = {
    t.name: {1: _ROUNDED, 32: _PER_32, 256: _PER_256}[t.block_size] for t in QUANT_TYPES.values()
}


def best_isa() -> Isa:
    """The best instruction set that this processor has."""
    return Isa(lib.fomoe_isa_best())


def current_isa() -> Isa:
    """The instruction set in use: the best one, unless `set_isa` chose another."""
    return Isa(lib.fomoe_isa_get())


def set_isa(isa: Isa) -> None:
    """Use the kernels of `isa` from now on; UnsupportedError where the processor lacks it."""
    if lib.fomoe_isa_set(int(isa)) < 0:
        raise UnsupportedError(
            f"this processor has no {isa.name}; the best it has is {best_isa().name}"
        )


def dequantize(type_: QuantType, data: ByteArray, shape: Sequence[int]) -> F32Array:
    """The values of a tensor as float32 [*shape], bit-equal to `gguf.quants.dequantize`.

    `data` is the tensor's bytes, uint8 and contiguous; the last dimension is the quantised one.
    """
    out = np.empty(tuple(shape), np.float32)
    assert data.flags.c_contiguous, "tensor bytes must be contiguous"
    assert data.nbytes * type_.block_size == out.size * type_.block_bytes, (data.nbytes, shape)
    source = ffi.cast("void *", data.ctypes.data)
    check(
        lib.fomoe_dequantize(type_.id, source, ffi.cast("float *", out.ctypes.data), out.size),
        f"dequantize {type_.name}",
    )
    return out


def dequantize_reference(type_: QuantType, data: ByteArray, shape: Sequence[int]) -> F32Array:
    """What `dequantize` must return, by the gguf package."""
    import gguf

    rows = np.ascontiguousarray(data).reshape(-1, type_.row_bytes(shape[-1]))
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(type_.id))
    return np.asarray(values, np.float32).reshape(tuple(shape))


class Matmul:
    """x @ w.T for one matrix [rows, cols], as the engine computes it, on one thread.

    Holds what the C structures point to. `prepare` quantises activations; `run` multiplies.
    """

    def __init__(self, type_: QuantType, data: ByteArray, rows: int, cols: int) -> None:
        assert data.flags.c_contiguous, "tensor bytes must be contiguous"
        assert data.nbytes == rows * type_.row_bytes(cols), (data.nbytes, rows, cols)
        self.type = type_
        self.rows = rows
        self.cols = cols
        self._data = data
        self._pool = ffi.gc(lib.fomoe_pool_create(1), lib.fomoe_pool_destroy)
        self._matrix = ffi.new("fomoe_matrix *")
        self._matrix.data = ffi.cast("void *", data.ctypes.data)
        self._matrix.row_bytes = type_.row_bytes(cols)
        self._matrix.type = type_.id
        self._matrix.rows = rows
        self._matrix.cols = cols
        self._act = ffi.new("fomoe_act *")

    def prepare(self, x: F32Array) -> None:
        """Take activations [tokens, cols], float32 and contiguous."""
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        assert x.shape[1] == self.cols, x.shape
        self._x = x
        tokens = x.shape[0]
        scratch_bytes = lib.fomoe_act_bytes(tokens, self.cols)
        self._scratch = np.empty(scratch_bytes + 64, np.uint8)
        start = -self._scratch.ctypes.data % 64
        lib.fomoe_act_prepare(
            self._pool,
            self._act,
            ffi.cast("float *", x.ctypes.data),
            self.cols,
            tokens,
            self.cols,
            [self.type.id],
            1,
            ffi.cast("void *", self._scratch.ctypes.data + start),
        )

    def run(
        self,
        y: F32Array,
        *,
        rows: npt.NDArray[np.int32] | None = None,
        row_begin: int = 0,
        row_end: int | None = None,
    ) -> None:
        """y[t, r] for weight rows [row_begin, row_end) and the activation rows picked by `rows`."""
        assert y.dtype == np.float32
        assert y.shape[1] == self.rows, y.shape
        picked = ffi.NULL if rows is None else ffi.cast("int32_t *", rows.ctypes.data)
        lib.fomoe_matmul_rows(
            self._matrix,
            self._act,
            picked,
            y.shape[0],
            row_begin,
            self.rows if row_end is None else row_end,
            ffi.cast("float *", y.ctypes.data),
            self.rows,
        )


def matmul(type_: QuantType, data: ByteArray, rows: int, x: F32Array) -> F32Array:
    """x [tokens, cols] @ w.T for w [rows, cols] of `type_`, float32 [tokens, rows]."""
    y = np.empty((x.shape[0], rows), np.float32)
    product = Matmul(type_, data, rows, x.shape[1])
    product.prepare(x)
    product.run(y)
    return y
