"""RMS norms of rows, and the delta-net's gated norm of heads.

Owns: the kernels and their launches. Does not know: where rows come from.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def rms_norm_kernel(x, weight, out, ld_x, ld_out, cols, eps, BLOCK: tl.constexpr):
    """out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * ld_x + at, mask=at < cols, other=0.0)
    factor = 1.0 / tl.sqrt(tl.sum(value * value) / cols + eps)
    scale = tl.load(weight + at, mask=at < cols, other=0.0)
    tl.store(out + row * ld_out + at, value * factor * scale, mask=at < cols)


@triton.jit
def gated_norm_kernel(o, z, weight, ld_o, ld_z, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """o = RMS(o) * weight * silu(z) for one head of one row, in place. Grid: rows, heads."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < D
    to = o + row * ld_o + head * D + at
    value = tl.load(to, mask=inside, other=0.0)
    gate = tl.load(z + row * ld_z + head * D + at, mask=inside, other=0.0)
    factor = 1.0 / tl.sqrt(tl.sum(value * value) / D + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(to, value * factor * scale * gate * sigmoid(gate), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float) -> None:
    """out [T, cols] = RMS(x) * weight [cols], all float32, rows contiguous."""
    rows, cols = x.shape
    assert out.shape == x.shape
    assert weight.numel() == cols
    block = triton.next_power_of_2(cols)
    rms_norm_kernel[(rows,)](
        x, weight, out, x.stride(0), out.stride(0), cols, eps,
        BLOCK=block, num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip


def gated_norm(
    o: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, heads: int, eps: float
) -> None:
    """o [T, heads * D] = RMS of each head * weight [D] * silu(z), in place."""
    dim = weight.numel()
    gated_norm_kernel[(len(o), heads)](
        o, z, weight, o.stride(0), z.stride(0), eps,
        D=dim, BLOCK=triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
