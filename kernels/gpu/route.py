"""The router's pick: softmax over all experts, the top k and their weights.

Owns: the kernel and its launch. Does not know: the router's matrix, who may stand in (car.py).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fomoe.kernels.ops import MoeSpec


@triton.jit
def pick_kernel(
    logits, ids, weights, min_sum, weights_scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ids, weights [T, TOP_K] of logits [T, EXPERTS], by descending logit, ties to the lower id.
    Grid: tokens; one warp, so that none of the TOP_K reductions crosses warps."""
    token = tl.program_id(0)
    expert, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    z = tl.load(logits + token * EXPERTS + expert, mask=expert < EXPERTS, other=float("-inf"))
    highest = tl.max(z)
    total = tl.sum(tl.exp(z - highest))
    picked = tl.zeros((BLOCK_K,), tl.int32)
    values = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    for rank in range(TOP_K):
        best = tl.argmax(z, 0)
        picked = tl.where(slot == rank, best, picked)
        values = tl.where(slot == rank, tl.max(z), values)
        z = tl.where(expert == best, float("-inf"), z)
    p = tl.exp(values - highest) / total
    if RENORMALISE:
        p /= tl.maximum(tl.sum(p), min_sum)
    at = token * TOP_K + slot
    tl.store(ids + at, picked, mask=slot < TOP_K)
    tl.store(weights + at, p * weights_scale, mask=slot < TOP_K)


# The smallest sum of picked probabilities that the picks are divided by (llama.cpp: 2^-14).
_MIN_WEIGHT_SUM = 6.103515625e-5


def pick(spec: MoeSpec, logits: Any, ids: Any, weights: Any) -> None:
    """ids int32 and weights float32 [T, top_k] of logits float32 [T, experts], all contiguous."""
    pick_kernel[(len(logits),)](
        logits, ids, weights, _MIN_WEIGHT_SUM, spec.weights_scale,
        EXPERTS=spec.num_experts, TOP_K=spec.top_k, RENORMALISE=spec.renormalise,
        BLOCK_E=triton.next_power_of_2(spec.num_experts),
        BLOCK_K=triton.next_power_of_2(spec.top_k), num_warps=1,
    )  # fmt: skip
