"""Quantised types: dequantisation, and the products of every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from fomoe.errors import UnsupportedError
from fomoe.kernels import quant
from fomoe.kernels.quant import LIMITS, Isa, Matmul
from fomoe.kernels.table import QUANT_TYPES, QuantType

TYPES = list(QUANT_TYPES.values())
ISAS = [isa for isa in Isa if isa <= quant.best_isa()]

# Where the float16 scales lie in a block, so that random blocks get sane ones.
HALF_FIELDS = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def random_tensor(
    type_: QuantType, rows: int, cols: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Bytes of a [rows, cols] tensor: every code and scale is random, the values are of order 1."""
    if type_.block_size == 1:
        values = rng.standard_normal((rows, cols), np.float32)
        if type_.name == "F16":
            return values.astype(np.float16).view(np.uint8)
        if type_.name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.view(np.uint8)
    blocks = rng.integers(0, 256, (rows * cols // type_.block_size, type_.block_bytes), np.uint8)
    for offset in HALF_FIELDS.get(type_.name, []):
        scales = rng.uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    if type_.name == "MXFP4":
        blocks[:, 0] = rng.integers(120, 130, len(blocks))
    return blocks.reshape(rows, -1)


@pytest.fixture
def restore_isa() -> Iterator[None]:
    before = quant.current_isa()
    yield
    quant.set_isa(before)


def nmse(y: npt.NDArray[np.float32], reference: npt.NDArray[np.float64]) -> float:
    return float(((y - reference) ** 2).sum() / (reference**2).sum())


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_dequantize_equals_gguf(type_: QuantType) -> None:
    rng = np.random.default_rng(type_.id)
    data = random_tensor(type_, 5, 512, rng)
    ours = quant.dequantize(type_, data, (5, 512))
    reference = quant.dequantize_reference(type_, data, (5, 512))
    np.testing.assert_array_equal(ours.view(np.uint32), reference.view(np.uint32))


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_dequantize_equals_gguf_at_every_scale(type_: QuantType) -> None:
    """Zero, denormal, largest and negative scales, and for MXFP4 all exponents."""
    rng = np.random.default_rng(1)
    data = random_tensor(type_, 1, 256 * 256, rng).reshape(-1, type_.block_bytes)
    halves = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF], np.uint16)
    for offset in HALF_FIELDS.get(type_.name, []):
        picked = np.resize(halves, len(data)).view(np.uint8).reshape(-1, 2)
        data[:, offset : offset + 2] = picked
    if type_.name == "MXFP4":
        data[:, 0] = np.resize(np.arange(255, dtype=np.uint8), len(data))
    shape = (1, len(data) * type_.block_size)
    ours = quant.dequantize(type_, data, shape)
    with np.errstate(over="ignore"):
        reference = quant.dequantize_reference(type_, data, shape)
    np.testing.assert_array_equal(ours.view(np.uint32), reference.view(np.uint32))


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_product_within_limit(type_: QuantType) -> None:
    rng = np.random.default_rng(7)
    rows, cols = 24, 1024
    data = random_tensor(type_, rows, cols, rng)
    x = rng.standard_normal((3, cols), np.float32)
    w = quant.dequantize(type_, data, (rows, cols)).astype(np.float64)
    error = nmse(quant.matmul(type_, data, rows, x), x.astype(np.float64) @ w.T)
    assert error < LIMITS[type_.name], f"{type_.name}: NMSE {error:.2e}"


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", ISAS[1:], ids=lambda i: i.name)
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_every_isa_gives_the_same_bits(type_: QuantType, isa: Isa) -> None:
    """For any number of tokens and rows, at odd addresses, with rows picked, split or repeated."""
    rng = np.random.default_rng(11)
    for rows, cols, tokens in [(37, 512, 21), (16, 256, 1), (5, 768, 3), (33, 1024, 70)]:
        exact = random_tensor(type_, rows, cols, rng).reshape(-1)
        shifted = np.empty(exact.size + 1, np.uint8)[1:]
        shifted[:] = exact
        x = rng.standard_normal((tokens, cols), np.float32) * np.float32(3)
        x[0, :256] = 0
        picked = rng.integers(0, tokens, tokens).astype(np.int32)
        quant.set_isa(Isa.SCALAR)
        truth = quant.matmul(type_, exact, rows, x)
        quant.set_isa(isa)
        product = Matmul(type_, shifted, rows, cols)
        product.prepare(x)
        for count in {1, min(2, tokens), tokens // 2 + 1, tokens}:
            y = np.full((count, rows), np.nan, np.float32)
            cut = rows // 3
            product.run(y, rows=picked, row_begin=0, row_end=cut)
            product.run(y, rows=picked, row_begin=cut)
            np.testing.assert_array_equal(y, truth[picked[:count]])


@pytest.mark.usefixtures("restore_isa")
def test_extreme_codes_do_not_saturate() -> None:
    """The largest codes, scales and activations at once: integer sums must stay exact."""
    for type_ in TYPES:
        if type_.block_size == 1:
            continue
        for fill in (0x00, 0x7F, 0x80, 0xFF, 0x88, 0x77):
            data = np.full((16, 1024 // type_.block_size, type_.block_bytes), fill, np.uint8)
            for offset in HALF_FIELDS.get(type_.name, []):
                data[..., offset : offset + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            if type_.name == "MXFP4":
                data[..., 0] = 120
            x = np.ones((2, 1024), np.float32)
            x[1, ::2] = -1
            quant.set_isa(Isa.SCALAR)
            truth = quant.matmul(type_, data.reshape(16, -1), 16, x)
            for isa in ISAS[1:]:
                quant.set_isa(isa)
                np.testing.assert_array_equal(
                    quant.matmul(type_, data.reshape(16, -1), 16, x), truth, err_msg=type_.name
                )


@pytest.mark.usefixtures("restore_isa")
def test_float32_handles_any_width() -> None:
    rng = np.random.default_rng(3)
    for cols in (1, 3, 15, 16, 17, 100):
        w = rng.standard_normal((19, cols), np.float32)
        x = rng.standard_normal((5, cols), np.float32)
        reference = x.astype(np.float64) @ w.astype(np.float64).T
        for isa in ISAS:
            quant.set_isa(isa)
            y = quant.matmul(QUANT_TYPES[0], w.view(np.uint8), 19, x)
            assert nmse(y, reference) < LIMITS["F32"]


def test_missing_isa_is_refused() -> None:
    if quant.best_isa() == Isa.AMX:
        pytest.skip("this processor has everything")
    with pytest.raises(UnsupportedError, match="has no AMX"):
        quant.set_isa(Isa.AMX)
