"""The quantisation types: one row per ggml type.

Owns: names, ids, block sizes, which code computes them. Does not know: files, tensors, models.
Ids and layouts are ggml's (ggml.h, ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantType:
    """One ggml type: `block_bytes` bytes hold `block_size` consecutive values of a row."""

    id: int
    name: str
    block_size: int
    block_bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` values; `cols` must be a multiple of the block size."""
        assert cols % self.block_size == 0, (self.name, cols)
        return cols // self.block_size * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size


def _row(id_: int, name: str, block_size: int, block_bytes: int) -> QuantType:
    return QuantType(id=id_, name=name, block_size=block_size, block_bytes=block_bytes)


F32 = _row(0, "F32", 1, 4)
F16 = _row(1, "F16", 1, 2)
Q4_0 = _row(2, "Q4_0", 32, 18)
Q4_1 = _row(3, "Q4_1", 32, 20)
Q5_0 = _row(6, "Q5_0", 32, 22)
Q5_1 = _row(7, "Q5_1", 32, 24)
Q8_0 = _row(8, "Q8_0", 32, 34)
Q2_K = _row(10, "Q2_K", 256, 84)
Q3_K = _row(11, "Q3_K", 256, 110)
Q4_K = _row(12, "Q4_K", 256, 144)
Q5_K = _row(13, "Q5_K", 256, 176)
Q6_K = _row(14, "Q6_K", 256, 210)
IQ4_NL = _row(20, "IQ4_NL", 32, 18)
IQ4_XS = _row(23, "IQ4_XS", 256, 136)
BF16 = _row(30, "BF16", 1, 2)
MXFP4 = _row(39, "MXFP4", 32, 17)

QUANT_TYPES: dict[int, QuantType] = {
    t.id: t
    for t in (
        F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K,
        IQ4_NL, IQ4_XS, MXFP4,
    )
}  # fmt: skip
