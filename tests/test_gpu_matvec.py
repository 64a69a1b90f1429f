"""Products of quantised matrices and few tokens: Triton kernels against the plain reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_quant import nmse, random_tensor

from fomoe.kernels.gpu.matvec import matvec
from fomoe.kernels.gpu.weights import SUPPORTED, GpuWeight, upload
from fomoe.kernels.ops import Tensor
from fomoe.kernels.reference import dequantise
from fomoe.kernels.table import QUANT_TYPES, QuantType

TYPES = [t for t in QUANT_TYPES.values() if t.name in SUPPORTED]
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
# Weights are exact to float32, sums are float32.
LIMIT = 1e-12


def make_weight(type_: QuantType, rows: int, cols: int, seed: int = 0) -> tuple[GpuWeight, Any]:
    data = random_tensor(type_, rows, cols, np.random.default_rng(seed))
    tensor = Tensor(name="w", type=type_, shape=(rows, cols), data=data.reshape(-1))
    return upload(tensor, DEVICE), dequantise(type_, (rows, cols), tensor.data)


def activations(tokens: int, cols: int) -> torch.Tensor:
    values = np.random.default_rng(7).standard_normal((tokens, cols), np.float32)
    return torch.from_numpy(values).to(DEVICE)


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_matvec_of_every_type(type_: QuantType) -> None:
    weight, values = make_weight(type_, 5, 512)
    x, out = activations(1, 512), torch.empty(1, 5, device=DEVICE)
    matvec(x, [weight], [out])
    want = x.cpu().numpy().astype(np.float64) @ values.T
    assert nmse(out.cpu().numpy(), want) < LIMIT
