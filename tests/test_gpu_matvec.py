"""Products of quantised matrices and few tokens: Triton kernels against the plain reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_quant import HALF_FIELDS, nmse, random_tensor

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


@pytest.mark.parametrize("tokens", [2, 3, 8])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "F32"])
def test_matvec_of_several_tokens(name: str, tokens: int) -> None:
    type_ = next(t for t in TYPES if t.name == name)
    weight, values = make_weight(type_, 3, 256)
    x, out = activations(tokens, 256), torch.empty(tokens, 3, device=DEVICE)
    matvec(x, [weight], [out])
    assert nmse(out.cpu().numpy(), x.cpu().numpy().astype(np.float64) @ values.T) < LIMIT


def test_matvec_of_matrices_that_share_an_input() -> None:
    """Six matrices, two types, one with a single row; into columns of a wider buffer."""
    types = {t.name: t for t in TYPES}
    shapes = [("Q8_0", 1), ("Q8_0", 9), ("F16", 2), ("Q8_0", 4), ("Q8_0", 5), ("Q8_0", 3)]
    made = [make_weight(types[name], rows, 96, seed) for seed, (name, rows) in enumerate(shapes)]
    x = activations(2, 96)
    wide = torch.full((2, 100), 7.0, device=DEVICE)
    outs, start = [], 10
    for _, rows in shapes:
        outs.append(wide[:, start : start + rows])
        start += rows
    matvec(x, [weight for weight, _ in made], outs)
    matvec(x, [weight for weight, _ in made], outs, add=True)
    got = wide.cpu().numpy()
    want = np.concatenate([x.cpu().numpy().astype(np.float64) @ w.T for _, w in made], 1)
    assert nmse(got[:, 10:start] / 2, want) < LIMIT
    assert (got[:, :10] == 7).all()
    assert (got[:, start:] == 7).all()


def test_a_row_longer_than_a_program_reads_at_once() -> None:
    type_ = next(t for t in TYPES if t.name == "Q8_0")
    weight, values = make_weight(type_, 2, 2048 + 160)
    x, out = activations(1, 2048 + 160), torch.empty(1, 2, device=DEVICE)
    matvec(x, [weight], [out])
    assert nmse(out.cpu().numpy(), x.cpu().numpy().astype(np.float64) @ values.T) < LIMIT


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_every_scale_and_alignment(type_: QuantType) -> None:
    """Single blocks with zero, denormal, largest and negative scales, each column by itself."""
    size = max(type_.block_size, 32)
    rng = np.random.default_rng(1)
    rows = 7
    data = random_tensor(type_, rows, size, rng).reshape(-1, type_.block_bytes)
    halves = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF], np.uint16)
    for offset in HALF_FIELDS.get(type_.name, []):
        data[:, offset : offset + 2] = np.resize(halves, len(data)).view(np.uint8).reshape(-1, 2)
    if type_.name == "MXFP4":
        data[:, 0] = np.resize(np.array([0, 1, 2, 100, 127, 200, 240], np.uint8), len(data))
    tensor = Tensor(name="w", type=type_, shape=(rows, size), data=data.reshape(-1))
    weight = upload(tensor, DEVICE)
    values = dequantise(type_, (rows, size), tensor.data)
    for column in range(0, size, 59):
        x = torch.zeros(1, size, device=DEVICE)
        x[0, column] = 1.0
        out = torch.empty(1, rows, device=DEVICE)
        matvec(x, [weight], [out])
        # Rounded to the largest value that the scale could give, not to this one.
        largest = np.abs(values).max(axis=1)
        assert (np.abs(out.cpu().numpy()[0] - values[:, column]) <= 2e-6 * largest).all()
