"""The routed experts of a layer by Triton kernels, against the plain reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_gpu_matvec import DEVICE
from test_quant import nmse, random_tensor

from fomoe.kernels.gpu import moe
from fomoe.kernels.ops import MoeSpec, Routing
from fomoe.kernels.reference import ReferenceOps
from fomoe.kernels.table import F32, Q4_K, Q6_K, Q8_0, QuantType

# Weights are exact to float32, sums are float32; silu passes an error on.
LIMIT = 1e-11
EXPERTS, TOP_K = 5, 2


class Layer:
    """Random experts in device memory, a routing, and the table of those that are there."""

    def __init__(self, types: tuple[QuantType, QuantType, QuantType], tokens: int) -> None:
        gate, up, down = types
        self.spec = MoeSpec(
            num_experts=EXPERTS, top_k=TOP_K, hidden=256, ff=256, gate_type=gate, up_type=up,
            down_type=down,
        )  # fmt: skip
        rng = np.random.default_rng(tokens)
        self.host = [[random_tensor(t, 256, 256, rng).reshape(-1) for t in types]
                     for _ in range(EXPERTS)]  # fmt: skip
        self.device = [[torch.from_numpy(m).to(DEVICE) for m in expert] for expert in self.host]
        self.h = (rng.standard_normal((tokens, 256)) / 8).astype(np.float32)
        self.x = rng.standard_normal((tokens, 256)).astype(np.float32)
        self.ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
        self.ids = self.ids.astype(np.int32)
        self.weights = rng.random((tokens, TOP_K), np.float32)

    def table(self, experts: list[int]) -> torch.Tensor:
        rows = np.zeros((EXPERTS, 3), np.int64)
        for e in experts:
            rows[e] = [m.data_ptr() for m in self.device[e]]
        return torch.from_numpy(rows).to(DEVICE)

    def reference(self) -> Any:
        routing = Routing(
            h=self.h, logits=np.zeros((len(self.h), EXPERTS), np.float32), ids=self.ids,
            weights=self.weights,
        )  # fmt: skip
        call = ReferenceOps().moe(self.spec, routing, None)
        call.run([(e, *(m.ctypes.data for m in self.host[e])) for e in range(EXPERTS)])
        x = self.x.copy()
        call.finish(x)
        return x - self.x

    def few(self, groups: list[list[int]]) -> Any:
        """The kernels for few tokens, with the experts launched group by group."""
        h, ids, weights = (torch.from_numpy(a).to(DEVICE) for a in (self.h, self.ids, self.weights))
        act = torch.full((ids.numel(), 256), torch.nan, device=DEVICE)
        out = torch.full((ids.numel(), 256), torch.nan, device=DEVICE)
        for group in groups:
            table = self.table(group)
            moe.gate_up(self.spec, h, ids, table, act)
            moe.down(self.spec, act, ids, table, out)
        x = torch.zeros(self.x.shape, device=DEVICE)
        moe.combine(x, out, weights)
        return x.cpu().numpy()


@pytest.mark.parametrize("types", [(Q4_K, Q4_K, Q6_K), (Q8_0, F32, Q8_0)], ids=["k", "mixed"])
def test_few_tokens(types: tuple[QuantType, QuantType, QuantType]) -> None:
    layer = Layer(types, 1)
    got = layer.few([list(range(EXPERTS))])
    assert nmse(got, layer.reference()) < LIMIT


def test_the_order_of_arrival_does_not_matter() -> None:
    layer = Layer((Q8_0, Q8_0, Q8_0), 2)
    got = layer.few([list(range(EXPERTS))])
    assert nmse(got, layer.reference()) < LIMIT
    np.testing.assert_array_equal(got, layer.few([[3, 1], [], [0, 4, 2]]))


@pytest.mark.parametrize("gated", [False, True])
def test_combine_adds_the_shared_expert(gated: bool) -> None:
    rng = np.random.default_rng(3)
    x, shared = (rng.standard_normal((3, 40)).astype(np.float32) for _ in range(2))
    out, weights = rng.standard_normal((6, 40), np.float32), rng.random((3, 2), np.float32)
    gate = rng.standard_normal((3, 1), np.float32)
    want = x + np.einsum("tr,trh->th", weights, out.reshape(3, 2, 40), dtype=np.float64)
    want = want + shared * (1 / (1 + np.exp(-gate)) if gated else 1.0)
    on_device = [torch.from_numpy(a).to(DEVICE) for a in (x, out, weights, shared, gate)]
    moe.combine(*on_device[:4], on_device[4] if gated else None)
    assert nmse(on_device[0].cpu().numpy(), want) < LIMIT
