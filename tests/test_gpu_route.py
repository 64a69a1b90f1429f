"""Picks and stand-ins on the device, against the reference's router and fomoe.experts.car."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpu_face import DEVICE, wait
from op_cases import moe_spec

from fomoe.experts.car import CacheAwareRouter
from fomoe.experts.car_options import CarOptions
from fomoe.experts.device_rule import device_rule
from fomoe.kernels.device import LIMIT_BYTES
from fomoe.kernels.gpu.routing import GpuRouting, StandIns, choose, room
from fomoe.kernels.ops import MoeSpec
from fomoe.kernels.reference import softmax

EXPERTS, TOP_K = 40, 6
SPEC = moe_spec(num_experts=EXPERTS, top_k=TOP_K)


def chosen(spec: MoeSpec, logits: Any, stand_ins: StandIns | None = None) -> GpuRouting:
    on_device = torch.from_numpy(logits).to(DEVICE)
    words = torch.empty(room(spec, len(logits)), dtype=torch.int32, device=DEVICE)
    routing = choose(spec, on_device, on_device, stand_ins, words)
    wait()
    return routing


def logits_of(seed: int, tokens: int = 1) -> Any:
    return np.random.default_rng(seed).normal(0, 1.5, (tokens, EXPERTS)).astype(np.float32)


@pytest.mark.parametrize("renormalise", [True, False])
def test_picks(renormalise: bool) -> None:
    spec = moe_spec(num_experts=EXPERTS, top_k=TOP_K, renormalise=renormalise, weights_scale=2.5)
    logits = logits_of(0, 5)
    p = softmax(logits.astype(np.float64))
    ids = np.argsort(-p, axis=1, kind="stable")[:, :TOP_K]
    weights = np.take_along_axis(p, ids, 1)
    if renormalise:
        weights /= weights.sum(1, keepdims=True)
    found = chosen(spec, logits)
    assert np.array_equal(found.ids, ids)
    assert np.allclose(found.weights, 2.5 * weights, rtol=1e-5, atol=0)
    assert np.array_equal(found.logits, logits)
    assert found.picked is None


def test_ties_go_to_the_lower_id() -> None:
    found = chosen(SPEC, np.zeros((1, EXPERTS), np.float32))
    assert found.ids.tolist() == [list(range(TOP_K))]
    assert np.allclose(found.weights, 1 / TOP_K)


RULES = {
    "light": ("light:1", {}),
    "light of few, renormalised": ("light:1.5", {"max_mass": 0.2, "weights": "renorm"}),
    "ratio": ("ratio:0.35", {}),
    "ratio of few, renormalised": ("ratio:0.2", {"top_j": 0, "max_mass": 0.3, "weights": "renorm"}),
    "prior": ("prior:0.2", {"top_j": 1}),
    "prior of little mass": ("prior:0.4", {"max_mass": 0.25, "weights": "renorm"}),
    "max-rank": ("max-rank:2,14", {}),
    "max-rank of little mass": ("max-rank:1,9", {"max_mass": 0.2}),
}


@pytest.mark.parametrize("name", RULES)
def test_stand_ins_are_those_of_the_policy(name: str) -> None:
    rule, changes = RULES[name]
    options = CarOptions.parse(rule, **changes)
    policy = CacheAwareRouter(options, 1, TOP_K)
    offered = torch.zeros(LIMIT_BYTES + EXPERTS, dtype=torch.uint8, device=DEVICE)
    offered[:LIMIT_BYTES].view(torch.float64)[0] = options.limit
    stand_ins = StandIns(device_rule(options, TOP_K), offered)
    substitutions = 0
    for seed, share in enumerate((0.5, 0.2, 0.9, 0.0, 1.0, 0.5, 0.5)):
        # The last step is of three sequences.
        logits = logits_of(seed, 3 if seed == 6 else 1)
        there = np.random.default_rng(seed).random(EXPERTS) < share
        offered[LIMIT_BYTES:].copy_(torch.from_numpy(there.astype(np.uint8)))
        found = chosen(SPEC, logits, stand_ins)
        want = policy.select(0, logits, *found.picked, there)
        assert np.array_equal(found.ids, want.ids), seed
        assert np.allclose(found.weights, want.weights, rtol=1e-6, atol=0), seed
        assert np.array_equal(found.device_ids.cpu(), want.ids), seed
        substitutions += len(want.displaced)
    assert substitutions > 3
