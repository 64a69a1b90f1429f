"""Quantised matrices in device memory.

Owns: their bytes, as they lie in the file, and the address that kernels take. Does not know: what
is computed with them, memory budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fomoe.kernels.ops import Tensor
from fomoe.kernels.table import QuantType

# What a kernel may read at once; allocations of torch and slots of the expert tiers are aligned so.
ALIGNMENT = 16

# Those that the kernels read; no file gets as far as here with others.
SUPPORTED = frozenset(
    (
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
        "IQ4_NL", "IQ4_XS", "MXFP4",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuWeight:
    """A matrix [rows, cols]: `data` is uint8 [rows * row bytes] on the device, 16-byte aligned."""

    rows: int
    cols: int
    type: QuantType
    data: Any

    def __post_init__(self) -> None:
        assert self.data.numel() == self.rows * self.type.row_bytes(self.cols)
        assert self.data.data_ptr() % ALIGNMENT == 0


def upload(tensor: Tensor, device: str) -> GpuWeight:
    """A matrix on `device`: as it is where it lies there already (and is aligned), else copied, in
    the caller's stream."""
    assert tensor.type.name in SUPPORTED, tensor.name
    rows, cols = tensor.shape
    data = tensor.data.reshape(-1)
    if not isinstance(data, torch.Tensor):
        data = torch.from_numpy(data).to(device, copy=True)
    elif data.data_ptr() % ALIGNMENT:
        data = data.clone()
    return GpuWeight(rows=rows, cols=cols, type=tensor.type, data=data)


def host_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes in host memory, wherever it lies."""
    data: npt.NDArray[np.uint8] = tensor.data
    return tensor.data.cpu().numpy() if isinstance(data, torch.Tensor) else data
