"""RoPE NEOX: the angles of a step's positions, and the rotation of one pair of half-vectors.

Owns: the formula. Does not know: heads, caches, who rotates what.

The angles are computed on the host in float64, once a step for all layers: at positions of some
hundred thousand a float32 product of position and frequency would be off by hundredths of a radian.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

F32Array = npt.NDArray[np.float32]


def rope_table(
    positions: npt.NDArray[np.int32], dims: int, base: float
) -> tuple[F32Array, F32Array]:
    """cos and sin [T, dims // 2] of positions [T] for pairs (i, i + dims // 2)."""
    half = dims // 2
    angles = positions[:, None] * base ** (-2.0 * np.arange(half) / dims)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@triton.jit
def rotate(first, second, cos, sin, pair, inside):
    """The rotated halves of a vector's first `dims` values, by a row of the table."""
    c = tl.load(cos + pair, mask=inside, other=0.0)
    s = tl.load(sin + pair, mask=inside, other=0.0)
    return first * c - second * s, first * s + second * c
