"""The shared expert of a layer, as wide as it is, on all tokens.

Owns: the order of its products, and the activation between them. Does not know: routed experts.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

from fomoe.kernels.gpu.norm import sigmoid
from fomoe.kernels.gpu.weights import GpuWeight

SharedExpert = tuple[GpuWeight, GpuWeight, GpuWeight, GpuWeight | None]
Multiply = Callable[[Any, Sequence[GpuWeight], Sequence[Any]], None]

_BLOCK = 1024


@triton.jit
def activate_kernel(gate, up, count, BLOCK: tl.constexpr):
    """gate = silu(gate) * up, of `count` values. Grid: blocks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0)
    u = tl.load(up + at, mask=at < count, other=0.0)
    tl.store(gate + at, g * sigmoid(g) * u, mask=at < count)


def shared_sizes(weights: SharedExpert, tokens: int) -> list[int]:
    """Floats of the parts of the memory that shared_expert works in."""
    gate, up, down, scalar = weights
    return [tokens * w.rows for w in (down, gate, up, scalar) if w is not None]


def shared_expert(
    h: Any, weights: SharedExpert, multiply: Multiply, memory: Sequence[Any]
) -> tuple[Any, Any | None]:
    """down @ (silu(gate @ h) * (up @ h)) for h float32 [T, hidden], and the scalar gate's product
    [T, 1] before its sigmoid, or None. `multiply` as Ops.linear without a norm; `memory`: float32
    of shared_sizes(), which both results are parts of."""
    gate, up, down, scalar = weights
    result, *outs = (part.view(len(h), -1) for part in memory)
    multiply(h, [w for w in (gate, up, scalar) if w is not None], outs)
    count = outs[0].numel()
    activate_kernel[(triton.cdiv(count, _BLOCK),)](outs[0], outs[1], count, BLOCK=_BLOCK)
    multiply(outs[0], [down], [result])
    return result, None if scalar is None else outs[2]
