"""GpuOps against the plain float64 reference, in Triton's interpreter or on a GPU.

Few and small cases: the interpreter takes about 30 microseconds for every operation on a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_face import DEVICE, GpuFace
from op_cases import (
    ALL,
    REFERENCE,
    SPECS,
    Layer,
    Recurrence,
    Sequences,
    attention_spec,
    delta_spec,
    matrix,
    moe_spec,
    nmse,
    normal,
    rng,
)
from test_quant import random_tensor

from fomoe.kernels.table import F16, F32, Q8_0, QUANT_TYPES, QuantType

MAX_TOKENS = 160

# Largest NMSE against float64. Sums and weights are float32; half precision rounds what is cached,
# and queries and probabilities to it (measured: 1e-13, 2e-7).
EXACT, HALF = 1e-11, 2e-6
# On a GPU products of the delta rule's chunks take each factor as two bfloat16 (computed that way
# by torch: 6e-11).
CHUNKED = EXACT if DEVICE == "cpu" else 3e-10
# Products of more than eight tokens round both operands to bfloat16 (but for F32 matrices).
ROUNDED = 2e-5


@pytest.fixture
def ops() -> Iterator[GpuFace]:
    made = GpuFace(MAX_TOKENS)
    yield made
    made.close()


# ---- dense ----


@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize("normed", [True, False])
def test_linear(ops: GpuFace, tokens: int, normed: bool) -> None:
    random = rng()
    x, norm = normal(random, tokens, 96), normal(random, 96)
    types = {1: F32, 77: F32, 300: Q8_0}
    tensors = [matrix(random, rows, 96, type_) for rows, type_ in types.items()]
    outs: dict[str, list[Any]] = {}
    for o in (ops, REFERENCE):
        outs[o.name] = [o.buffer(tokens, t.shape[0]) for t in tensors]
        weights = [o.weight(t) for t in tensors]
        o.linear(x, weights, outs[o.name], norm=norm if normed else None, eps=1e-6)
    for got, want, t in zip(outs["gpu"], outs["reference"], tensors, strict=True):
        assert nmse(got, want) < (EXACT if tokens == 1 or t.type is F32 else ROUNDED)


@pytest.mark.parametrize(("tokens", "type_"), [(1, Q8_0), (11, F32), (11, Q8_0)])
def test_linear_add(ops: GpuFace, tokens: int, type_: QuantType) -> None:
    random = rng()
    x, out = normal(random, tokens, 96), normal(random, tokens, 150)
    t, want = matrix(random, 150, 96, type_), out.copy()
    ops.linear_add(x, ops.weight(t), out)
    REFERENCE.linear_add(x, REFERENCE.weight(t), want)
    assert nmse(out, want) < (EXACT if tokens == 1 or type_ is F32 else ROUNDED)


def test_vector(ops: GpuFace) -> None:
    t = matrix(rng(), 37, 64, Q8_0)
    assert np.array_equal(ops.vector(t), REFERENCE.vector(t))


@pytest.mark.parametrize(
    ("name", "cols"), [("Q8_0", 32), ("F16", 64), ("Q4_K", 512), ("Q6_K", 768)]
)
def test_embed(ops: GpuFace, name: str, cols: int) -> None:
    """More chunks than lanes, fewer, and not a multiple of them."""
    type_ = next(t for t in QUANT_TYPES.values() if t.name == name)
    data = random_tensor(type_, 3, cols, rng()).reshape(3, -1)
    out, want = ops.buffer(3, cols), REFERENCE.buffer(3, cols)
    ops.embed(type_, data, out)
    REFERENCE.embed(type_, data, want)
    assert nmse(out, want) < EXACT


# ---- experts ----


@pytest.mark.parametrize("tokens", [1, 11])
def test_route(ops: GpuFace, tokens: int) -> None:
    random = rng()
    spec = moe_spec(num_experts=50, top_k=6)
    x, norm, router = normal(random, tokens, 96), normal(random, 96), matrix(random, 50, 96)
    got = ops.route(spec, x, norm, 1e-6, ops.weight(router))
    want = REFERENCE.route(spec, x, norm, 1e-6, REFERENCE.weight(router))
    assert np.array_equal(got.ids, want.ids)
    assert nmse(got.h.cpu(), want.h) < EXACT
    assert nmse(got.logits, want.logits) < EXACT
    assert nmse(got.weights, want.weights) < EXACT


def quantised_layer(tokens: int, shared_gate: bool | None) -> Layer:
    spec = moe_spec(gate_type=Q8_0, up_type=F16, down_type=Q8_0)
    return Layer(spec, tokens, shared_gate, shared_ff=64)


@pytest.mark.parametrize(("tokens", "shared_gate"), [(1, True), (2, None), (11, False)])
def test_moe_in_any_order_of_arrival(ops: GpuFace, tokens: int, shared_gate: bool | None) -> None:
    layer = quantised_layer(tokens, shared_gate)
    got = layer.output(ops, [ALL])
    assert nmse(got, layer.output(REFERENCE, [ALL])) < (ROUNDED if tokens > 8 else EXACT)
    assert np.array_equal(layer.output(ops, [ALL[5:], ALL[1:5], ALL[:1]]), got)


def test_moe_of_residents_by_table_then_of_what_arrives(ops: GpuFace) -> None:
    layer = quantised_layer(2, True)
    call = layer.begin(ops)
    table = np.zeros((12, 3), np.int64)
    for expert in ALL[::2]:
        table[expert] = call.uploaded(layer.addresses(expert)[1:])
    call.run_table(table)
    call.run([layer.addresses(expert) for expert in ALL[1::2]])
    x = layer.x.copy()
    call.finish(x)
    assert np.array_equal(x, layer.output(ops, [ALL]))


def test_moe_of_some_picks(ops: GpuFace) -> None:
    """The others are the host's."""
    layer = quantised_layer(2, True)
    call = layer.begin(ops)
    call.run([layer.addresses(expert) for expert in ALL[::2]])
    x = layer.x.copy()
    call.finish_some(x)
    layer.routing.weights[layer.routing.ids % 2 == 1] = 0
    assert nmse(x, layer.output(REFERENCE, [ALL])) < EXACT


# ---- attention ----


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, EXACT), (np.float16, HALF)])
def test_attention(ops: GpuFace, dtype: Any, limit: float) -> None:
    sequences = Sequences(attention_spec(heads=4), [90, 20], dtype)
    for counts in ([70, 0], [1, 9], [1, 1], [8, 2]):
        assert sequences.step(ops, counts) < limit, counts


@pytest.mark.parametrize("name", ["plain", "many heads a kv head", "one each"])
def test_attention_of_other_shapes(ops: GpuFace, name: str) -> None:
    sequences = Sequences(SPECS[name], [20])
    for count in (9, 2):
        assert sequences.step(ops, [count]) < EXACT, count


def test_attention_without_norms(ops: GpuFace) -> None:
    assert Sequences(attention_spec(heads=2), [10]).step(ops, [10], normed=False) < EXACT


def test_attention_over_many_keys(ops: GpuFace) -> None:
    """Contexts of several blocks of keys a split."""
    spec = attention_spec(head_dim=16, rope_dims=8, heads=2, kv_heads=1)
    sequences = Sequences(spec, [470])
    for _ in range(3):
        sequences.step(REFERENCE, [150])
    sequences.caches[0] = sequences.caches[1]
    for count in (1, 3):
        assert sequences.step(ops, [count]) < EXACT, count


# ---- delta-net ----

# 4 V heads of 2 K heads: tiled and grouped differ.
FEW_HEADS: dict[str, Any] = dict(v_heads=4, k_heads=2)


@pytest.mark.parametrize(("tiled", "head_dim"), [(True, 24), (False, 5)])
def test_delta_net(ops: GpuFace, tiled: bool, head_dim: int) -> None:
    layer = Recurrence(delta_spec(tiled=tiled, head_dim=head_dim, **FEW_HEADS))
    for length in (1, 2, 9, 70, 8):
        assert layer.step(ops, [length]) < CHUNKED, length


def test_delta_net_of_several_sequences(ops: GpuFace) -> None:
    layer = Recurrence(delta_spec(head_dim=40, **FEW_HEADS), num_sequences=3)
    for lengths in ([33, 1, 2], [1, 1, 12]):
        assert layer.step(ops, lengths) < CHUNKED, lengths
