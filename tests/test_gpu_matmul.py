"""Products of quantised matrices and many tokens: Triton kernels against the plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_gpu_matvec import DEVICE, TYPES, activations, make_weight
from test_gpu_moe import EXPERTS, Layer
from test_quant import nmse

from fomoe.kernels.gpu import matmul, moe
from fomoe.kernels.table import Q4_K, Q6_K, Q8_0, QuantType

# Both operands rounded to bfloat16: 2^-9 at most, 2e-6 to 5e-6 measured.
LIMIT = 1e-5


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_matmul_of_every_type(type_: QuantType) -> None:
    weight, values = make_weight(type_, 70, 256)
    x, out = activations(17, 256), torch.empty(17, 70, device=DEVICE)
    matmul.matmul(x, weight, out)
    want = x.cpu().numpy().astype(np.float64) @ values.T
    assert nmse(out.cpu().numpy(), want) < LIMIT


def test_columns_that_fill_no_tile() -> None:
    """96 columns; out is a part of a wider buffer and is added to."""
    weight, values = make_weight(Q8_0, 5, 96)
    x, wide = activations(70, 96), torch.full((70, 9), 3.0, device=DEVICE)
    out = wide[:, 2:7]
    out.zero_()
    matmul.matmul(x, weight, out)
    matmul.matmul(x, weight, out, add=True)
    want = 2 * (x.cpu().numpy().astype(np.float64) @ values.T)
    assert nmse(out.cpu().numpy(), want) < LIMIT
    assert (wide[:, :2] == 3).all()
    assert (wide[:, 7:] == 3).all()


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_groups_hold_every_pick_once(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(40)[:6] for _ in range(tokens)]).astype(np.int32)
    groups = matmul.group(torch.from_numpy(ids).to(DEVICE), 40)
    order, ends, tiles = (t.cpu().numpy() for t in (groups.order, groups.ends, groups.tiles))
    seen = []
    for expert, first in tiles[tiles[:, 0] >= 0]:
        picks = order[first : min(first + matmul.EXPERT_TOKENS, ends[expert])]
        assert (ids.reshape(-1)[picks] == expert).all()
        seen += picks.tolist()
    assert sorted(seen) == list(range(ids.size))
    assert len(tiles) <= ids.size // matmul.EXPERT_TOKENS + 40


def many(layer: Layer, experts: list[list[int]]) -> np.ndarray:
    h, ids, weights = (torch.from_numpy(a).to(DEVICE) for a in (layer.h, layer.ids, layer.weights))
    act = torch.full((ids.numel(), 256), torch.nan, device=DEVICE)
    out = torch.full((ids.numel(), 256), torch.nan, device=DEVICE)
    groups = matmul.group(ids, EXPERTS)
    for present in experts:
        table = layer.table(present)
        matmul.grouped_gate_up(layer.spec, h, groups, table, act)
        matmul.grouped_down(layer.spec, act, groups, table, out)
    x = torch.zeros(layer.x.shape, device=DEVICE)
    moe.combine(x, out, weights)
    return x.cpu().numpy()


def test_experts_of_many_tokens() -> None:
    """Two tiles of one expert, one of two others, none of the rest; and each when it is there."""
    layer = Layer((Q4_K, Q4_K, Q6_K), 33)
    layer.ids[:, 0], layer.ids[:, 1] = 3, np.arange(33) % 2
    got = many(layer, [list(range(EXPERTS))])
    assert nmse(got, layer.reference()) < 2 * LIMIT
    np.testing.assert_array_equal(got, many(layer, [[4], [0, 2], [3, 1]]))
