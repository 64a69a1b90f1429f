"""Cache-aware routing on the device: stand-ins are chosen where the picks are, without the host.

Owns: the kernel and its launch. Does not know: who is resident (it is given a mask), what the rules
are for. fomoe.experts.car is the reference: the same selection from the same numbers, decided in
float64 as there.

What the mask says of an expert is what the host knew when it queued the layer's turn: on the device
or in memory, or being read and expected in time. A device sees none of the last two by itself, and
need not: between that moment and the pick the host only learns more, which at worst makes a read
that could have been saved, or a stand-in where the read came in time after all.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,no-any-return"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fomoe.kernels.device import StandInRule
from fomoe.kernels.ops import MoeSpec

_INF = tl.constexpr(float("inf"))


@triton.jit
def _entry(values, place, index):
    """values[place == index], a scalar."""
    return tl.sum(tl.where(place == index, values, 0))


@triton.jit
def _pairs(
    z, there, picks, shares, expert, slot, limit, floor, heaviest,
    RULE: tl.constexpr, TOP_K: tl.constexpr, TOP_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For every rank [BLOCK_K] the stand-in that the rule allows, or -1, and the logit gap.

    Stand-ins by descending logit go to the absent picks (that are no heavier than `heaviest`):
    ratio, in rank order; else from the last rank on, until one is too far.
    """
    stand_ins = tl.full((BLOCK_K,), -1, tl.int32)
    gaps = tl.full((BLOCK_K,), _INF, tl.float64)
    worth = tl.where(there, z, -_INF)
    for rank in range(TOP_K):
        worth = tl.where(expert == _entry(picks, slot, rank), -_INF, worth)
    open_ = True
    for i in range(TOP_J, TOP_K):
        rank = i
        if RULE != "ratio":
            rank = TOP_K - 1 - i + TOP_J
        pick = _entry(picks, slot, rank)
        absent = _entry(there.to(tl.int32), expert, pick) == 0
        if RULE == "light":
            absent = absent & (_entry(shares, slot, rank).to(tl.float64) <= heaviest)
        value, best = tl.max(worth), tl.argmax(worth, 0)
        gap = _entry(z, expert, pick).to(tl.float64) - value.to(tl.float64)
        found = absent & (value > -_INF)
        if RULE == "ratio":
            allowed = found & (gap <= limit)
        else:
            too_far = (gap >= limit) | (value < floor)
            open_ = open_ & ((absent == 0) | (found & (too_far == 0)))
            allowed = found & open_
        here = slot == rank
        stand_ins = tl.where(here & allowed, best, stand_ins)
        gaps = tl.where(here & allowed, gap, gaps)
        worth = tl.where((expert == best) & found, -_INF, worth)
    return stand_ins, gaps


@triton.jit
def select_kernel(
    logits, ids, weights, available, limit_at, spread, terms, new_ids, new_weights, tokens,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RULE: tl.constexpr, TOP_J: tl.constexpr,
    MAX_RANK: tl.constexpr, RENORM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The selection for all tokens of a step, one after the other: what one of them reads anyway is
    no cost to the next ones. One program, one warp.

    available uint8 [EXPERTS]; float64: limit_at [1], the rule's limit; spread [1], the layer's
    running range of logits; terms [2], the share of weight that may move, and what a new range
    counts.
    """
    expert, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    there = tl.load(available + expert, mask=expert < EXPERTS, other=0) != 0
    width = tl.load(spread)
    value, max_mass, gain = tl.load(limit_at), tl.load(terms), tl.load(terms + 1)
    if RULE == "prior":
        for token in range(tokens):
            z = tl.load(logits + token * EXPERTS + expert, mask=expert < EXPERTS, other=-_INF)
            low = tl.min(tl.where(expert < EXPERTS, z, _INF))
            own = (tl.max(z) - low).to(tl.float64)
            width = tl.where(width == 0.0, own, width + gain * (own - width))
        tl.store(spread, width)
    # What a single token's sacred picks are is no news to itself.
    if tokens > 1:
        for token in range(tokens):
            for rank in range(TOP_J):
                there = there | (expert == tl.load(ids + token * TOP_K + rank))
    for token in range(tokens):
        at = token * TOP_K + slot
        z = tl.load(logits + token * EXPERTS + expert, mask=expert < EXPERTS, other=-_INF)
        picks = tl.load(ids + at, mask=slot < TOP_K, other=-1)
        shares = tl.load(weights + at, mask=slot < TOP_K, other=0.0)
        total = tl.sum(shares)
        limit, floor, heaviest = value, -_INF, value  # max-rank's value is infinite
        if RULE == "prior":
            limit = value * width
        if RULE == "light":
            limit, heaviest = _INF, value * total.to(tl.float64) / TOP_K
        if RULE == "max-rank":
            rest = z
            for _ in range(min(MAX_RANK, EXPERTS) - 1):
                rest = tl.where(expert == tl.argmax(rest, 0), -_INF, rest)
            floor = tl.max(rest)
        stand_ins, gaps = _pairs(
            z, there, picks, shares, expert, slot, limit, floor, heaviest,
            RULE, TOP_K, TOP_J, BLOCK_K,
        )  # fmt: skip
        room = max_mass * total.to(tl.float64) * (1.0 + 1e-6)
        # Which pair takes its room first: the smallest gap, or the last rank.
        left = stand_ins >= 0
        for _ in range(TOP_J, TOP_K):
            if RULE == "ratio":
                first = tl.argmin(tl.where(left, gaps, _INF), 0)
            else:
                first = tl.argmax(tl.where(left, slot, -1), 0)
            here = (slot == first) & left
            share = tl.sum(tl.where(here, shares, 0.0)).to(tl.float64)
            fits = share <= room
            room -= tl.where(fits, share, 0.0)
            stand_ins = tl.where(here & (fits == 0), -1, stand_ins)
            left = left & (slot != first)
        taken = stand_ins >= 0
        faded = shares.to(tl.float64) * tl.exp(-tl.where(taken, gaps, 0.0))
        used = tl.where(taken, faded.to(tl.float32), shares)
        if RENORM:
            used *= tl.where(tl.max(taken.to(tl.int32)) > 0, total / tl.sum(used), 1.0)
        chosen = tl.where(taken, stand_ins, picks)
        tl.store(new_ids + at, chosen, mask=slot < TOP_K)
        tl.store(new_weights + at, used, mask=slot < TOP_K)
        if tokens > 1:
            for rank in range(TOP_K):
                there = there | (expert == _entry(chosen, slot, rank))


def select(
    rule: StandInRule,
    spec: MoeSpec,
    logits: Any,
    ids: Any,
    weights: Any,
    available: Any,
    limit: Any,
    spread: Any,
    terms: Any,
    new_ids: Any,
    new_weights: Any,
) -> None:
    """CacheAwareRouter.select on the device: new_ids and new_weights [T, k] from the router's.

    available: uint8 [experts]. float64: limit [1]; spread [1], zero at first; terms [2], see the
    kernel.
    """
    assert rule.rule in ("light", "ratio", "prior", "max-rank")
    select_kernel[(1,)](
        logits, ids, weights, available, limit, spread, terms, new_ids, new_weights, len(ids),
        EXPERTS=spec.num_experts, TOP_K=spec.top_k, RULE=rule.rule, TOP_J=rule.top_j,
        MAX_RANK=rule.max_rank, RENORM=rule.renorm,
        BLOCK_E=triton.next_power_of_2(spec.num_experts),
        BLOCK_K=triton.next_power_of_2(spec.top_k), num_warps=1,
    )  # fmt: skip
