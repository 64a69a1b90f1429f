"""The CPU steps against the plain float64 reference, for every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from op_cases import (
    ALL,
    REFERENCE,
    SPECS,
    Floats,
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
    tensor,
)

from fomoe.errors import UnsupportedError
from fomoe.kernels import cpu_moe, cpu_plans
from fomoe.kernels.cpu import ISA_NAMES, CpuOps
from fomoe.kernels.cpu_arrays import Scratch
from fomoe.kernels.cpu_layer import CpuLayer
from fomoe.kernels.ops import (
    AttentionSpec,
    AttentionWeights,
    DeltaState,
    DeltaWeights,
    KvCache,
    LayerParts,
    Segment,
)
from fomoe.kernels.table import F16, F32, Q8_0
from fomoe.kernels.unfused import UnfusedLayer, UnfusedMixers
from fomoe.native import ffi, lib

MAX_TOKENS = 256
ISAS = [name for i, name in enumerate(ISA_NAMES) if i <= lib.fomoe_isa_best()]


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Iterator[CpuOps]:
    made = CpuOps(2, MAX_TOKENS, request.param)
    yield made
    made.close()


# ---- dense ----


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("normed", [True, False])
def test_linear(ops: CpuOps, tokens: int, normed: bool) -> None:
    random = rng()
    x, norm = normal(random, tokens, 96), normal(random, 96)
    tensors = [matrix(random, rows, 96) for rows in (1, 77, 300)]
    outs = {}
    for o in (ops, REFERENCE):
        outs[o.name] = [o.buffer(tokens, t.shape[0]) for t in tensors]
        weights = [o.weight(t) for t in tensors]
        o.linear(x, weights, outs[o.name], norm=norm if normed else None, eps=1e-6)
    for got, want in zip(outs["cpu"], outs["reference"], strict=True):
        assert nmse(got, want) < 1e-12


def test_linear_into_columns_of_a_wider_buffer(ops: CpuOps) -> None:
    random = rng()
    x, t = normal(random, 5, 64), matrix(random, 32, 64)
    wide = np.zeros((5, 100), np.float32)
    ops.linear(x, [ops.weight(t)], [wide[:, 10:42]])
    want = REFERENCE.buffer(5, 32)
    REFERENCE.linear(x, [REFERENCE.weight(t)], [want])
    assert nmse(wide[:, 10:42], want) < 1e-12
    assert not wide[:, :10].any()
    assert not wide[:, 42:].any()


@pytest.mark.parametrize("tokens", [1, 40])
def test_linear_add(ops: CpuOps, tokens: int) -> None:
    random = rng()
    x, out, t = normal(random, tokens, 96), normal(random, tokens, 150), matrix(random, 150, 96)
    want = out.copy()
    ops.linear_add(x, ops.weight(t), out)
    REFERENCE.linear_add(x, REFERENCE.weight(t), want)
    assert nmse(out, want) < 1e-12


def test_embed_and_vector(ops: CpuOps) -> None:
    t = matrix(rng(), 37, 64, Q8_0)
    want = REFERENCE.vector(t)
    assert np.array_equal(ops.vector(t), want)
    out = ops.buffer(37, 64)
    ops.embed(t.type, t.data.reshape(37, -1), out)
    assert np.array_equal(out, want)


# ---- experts ----


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("renormalise", [True, False])
def test_route(ops: CpuOps, tokens: int, renormalise: bool) -> None:
    random = rng()
    spec = moe_spec(num_experts=50, top_k=6, renormalise=renormalise, weights_scale=2.5)
    x, norm, router = normal(random, tokens, 96), normal(random, 96), matrix(random, 50, 96)
    got = ops.route(spec, x, norm, 1e-6, ops.weight(router))
    want = REFERENCE.route(spec, x, norm, 1e-6, REFERENCE.weight(router))
    assert np.array_equal(got.ids, want.ids)
    assert nmse(got.h, want.h) < 1e-12
    assert nmse(got.logits, want.logits) < 1e-12
    assert nmse(got.weights, want.weights) < 1e-12


def test_route_ties_go_to_the_lower_id(ops: CpuOps) -> None:
    spec = moe_spec(num_experts=40, top_k=4)
    x, norm = np.ones((1, 96), np.float32), np.ones(96, np.float32)
    router = ops.weight(tensor(np.zeros((40, 96), np.float32)))
    got = ops.route(spec, x, norm, 1e-6, router)
    assert got.ids.tolist() == [[0, 1, 2, 3]]
    assert np.allclose(got.weights, 0.25)


@pytest.mark.parametrize("tokens", [1, 2, 50, 256])
@pytest.mark.parametrize("shared_gate", [None, False, True])
def test_moe(ops: CpuOps, tokens: int, shared_gate: bool | None) -> None:
    layer = Layer(moe_spec(), tokens, shared_gate)
    want = layer.output(REFERENCE, [ALL])
    assert nmse(layer.output(ops, [ALL]), want) < 1e-12


def test_moe_of_quantised_experts(ops: CpuOps) -> None:
    layer = Layer(moe_spec(gate_type=Q8_0, up_type=F16, down_type=Q8_0), 9)
    want = layer.output(REFERENCE, [ALL])
    assert nmse(layer.output(ops, [ALL]), want) < 1e-4


@pytest.mark.parametrize("tokens", [1, 50])
def test_moe_does_not_depend_on_the_order_of_arrival(ops: CpuOps, tokens: int) -> None:
    layer = Layer(moe_spec(gate_type=Q8_0, up_type=Q8_0, down_type=Q8_0), tokens, True)
    want = layer.output(ops, [ALL])
    for seed in range(5):
        random = rng(seed)
        order = random.permutation(12).tolist()
        cuts = sorted(random.integers(0, 12, 3))
        groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        got = layer.output(ops, groups)
        assert np.array_equal(got, want)


def test_moe_follows_replaced_ids(ops: CpuOps) -> None:
    layer = Layer(moe_spec(), 7)
    layer.routing.ids = layer.routing.ids[:, ::-1]  # not contiguous, as a policy may leave it
    layer.routing.weights = np.asfortranarray(layer.routing.weights)
    assert nmse(layer.output(ops, [ALL]), layer.output(REFERENCE, [ALL])) < 1e-12


def test_moe_that_lacks_an_expert_is_an_error_of_ours(ops: CpuOps) -> None:
    layer = Layer(moe_spec(), 1)
    missing = int(layer.routing.ids[0, 0])
    x = layer.x.copy()
    call = layer.begin(ops)
    call.run([layer.addresses(e) for e in ALL if e != missing])
    with pytest.raises(AssertionError, match="never ran"):
        call.finish(x)
    assert np.array_equal(x, layer.x)
    with pytest.raises(AssertionError, match="given twice"):
        call.run([layer.addresses(e) for e in ALL])


def test_moe_given_up_while_the_shared_expert_is_under_way(ops: CpuOps) -> None:
    layer, other = Layer(moe_spec(), 50, True), Layer(moe_spec(), 1, True)
    want = layer.output(ops, [ALL])
    for _ in range(20):
        other.begin(ops)
        layer.begin(ops)
        assert np.array_equal(layer.output(ops, [ALL]), want)
    layer.begin(ops)  # and close


# ---- attention ----


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-11), (np.float16, 1e-6)])
def test_attention(ops: CpuOps, spec: AttentionSpec, dtype: Any, limit: float) -> None:
    sequences = Sequences(spec, [150, 40], dtype)
    for counts in ([70, 0], [1, 17], [1, 1], [78, 1], [0, 21]):
        assert sequences.step(ops, counts) < limit


def test_attention_without_norms(ops: CpuOps) -> None:
    assert Sequences(attention_spec(), [30]).step(ops, [30], normed=False) < 1e-11


def test_attention_over_many_keys(ops: CpuOps) -> None:
    """Long contexts of few queries are split by keys, and the parts combined."""
    spec = attention_spec(head_dim=16, rope_dims=8)
    sequences = Sequences(spec, [1200, 30])
    for _ in range(4):
        sequences.step(ops, [256, 0])
    for counts in ([1, 29], [3, 1], [8, 0]):
        assert sequences.step(ops, counts) < 1e-11


# ---- mixers ----


def attention_weights(random: np.random.Generator, o: Any) -> AttentionWeights:
    spec = attention_spec()
    inner, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return AttentionWeights(
        spec=spec,
        eps=1e-6,
        norm=normal(random, 96),
        inputs=[o.weight(matrix(random, n, 96)) for n in (2 * inner, kv, kv)],
        q_norm=normal(random, spec.head_dim),
        k_norm=None,
        output=o.weight(matrix(random, 96, inner)),
    )


def delta_weights(random: np.random.Generator, o: Any) -> DeltaWeights:
    spec = delta_spec()
    widths = (spec.conv_dim, spec.value_dim, spec.v_heads, spec.v_heads)
    return DeltaWeights(
        layer=1,
        spec=spec,
        eps=1e-6,
        norm=normal(random, 96),
        inputs=[o.weight(matrix(random, n, 96)) for n in widths],
        conv=normal(random, spec.conv_dim, spec.conv_kernel),
        dt_bias=normal(random, spec.v_heads),
        a=-np.exp(normal(random, spec.v_heads)),
        out_norm=normal(random, spec.head_dim),
        output=o.weight(matrix(random, 96, spec.value_dim)),
    )


class MixedSequences:
    """Two sequences with a cache and a state each, for one backend or way of mixing."""

    def __init__(self, o: Any, mixers: Any) -> None:
        self.o, self.mixers = o, mixers
        self.attention = attention_weights(rng(5), o)
        self.delta = delta_weights(rng(6), o)
        attention, delta = self.attention.spec, self.delta.spec
        shape = (6, attention.kv_heads, 16, attention.head_dim)
        self.cache = KvCache(np.zeros(shape, np.float32), np.zeros(shape, np.float32), 16)
        self.pages = [np.array(p, np.int32) for p in ([4, 0, 5], [1, 3, 2])]
        square = (delta.v_heads, delta.head_dim, delta.head_dim)
        past = (delta.conv_kernel - 1, delta.conv_dim)
        self.states = [
            [None, DeltaState(np.zeros(past, np.float32), np.zeros(square, np.float32))]
            for _ in range(2)
        ]
        self.done = [0, 0]

    def step(self, x: Floats, counts: list[int]) -> Floats:
        x = x.copy()
        segments, start = [], 0
        for i, count in enumerate(counts):
            if count:
                at = self.done[i]
                segments.append(Segment(start, count, at, self.pages[i], self.states[i]))
                self.done[i] += count
                start += count
        a, d = self.attention, self.delta
        qkv = [self.o.buffer(len(x), w.rows) for w in a.inputs]
        qkv.append(self.o.buffer(len(x), a.output.cols))
        ins = [self.o.buffer(len(x), w.rows) for w in d.inputs]
        ins.append(self.o.buffer(len(x), d.output.cols))
        self.mixers.mix_delta(self.o, d, x, ins, segments)
        self.mixers.mix_attention(self.o, a, x, qkv, self.cache, segments)
        self.mixers.mix_attention(self.o, a, x, qkv, self.cache, segments)
        return x


def test_mixers_in_one_call_are_those_in_three(ops: CpuOps) -> None:
    fused, unfused = MixedSequences(ops, CpuOps), MixedSequences(ops, UnfusedMixers)
    for counts in ([9, 0], [1, 4], [1, 1], [1, 1], [0, 1], [0, 1], [20, 1]):
        x = normal(rng(sum(counts)), sum(counts), 96)
        got = fused.step(x, counts)
        assert np.array_equal(got, unfused.step(x, counts))
        assert not np.array_equal(got, x)


class WholeLayers:
    """Layers of attention and delta-net in turn, with experts, for one way of computing them."""

    def __init__(self, o: Any, make_layer: Any) -> None:
        random = rng(7)
        self.o, self.mixed = o, MixedSequences(o, o)
        self.experts = [Layer(moe_spec(), 1, shared_gate) for shared_gate in (True, None, False)]
        mixers = (self.mixed.delta, self.mixed.attention, self.mixed.delta)
        self.rooms: dict[tuple[int, int], Any] = {}
        self.layers = [
            make_layer(
                LayerParts(
                    mixer=mixer,
                    room=lambda n, mixer=mixer: self.room(mixer, n),
                    norm=normal(random, 96),
                    eps=1e-6,
                    router=o.weight(matrix(random, 12, 96)),
                    moe=experts.spec,
                    shared=experts.shared and tuple(t and o.weight(t) for t in experts.shared),
                )
            )
            for mixer, experts in zip(mixers, self.experts, strict=True)
        ]

    def room(self, mixer: Any, tokens: int) -> Any:
        widths = [w.rows for w in mixer.inputs] + [mixer.output.cols]
        made = [self.o.buffer(tokens, width) for width in widths]
        return self.rooms.setdefault((id(mixer), tokens), made)

    def step(self, x: Floats, position: int, absent: Sequence[int] = ()) -> Floats:
        """One layer after the other. Of one token, others stand in for picks that are `absent`;
        those that are there may be begun before that is said."""
        x = x.copy()
        m = self.mixed
        segments = [Segment(0, len(x), position, m.pages[0], m.states[0])]
        last = None
        for i, (layer, experts) in enumerate(zip(self.layers, self.experts, strict=True)):
            table = np.array([experts.addresses(e)[1:] for e in range(12)])
            table[list(absent)] = 0
            routing, call = layer.begin(x, segments, m.cache, last, table if absent else None)
            ids = routing.ids.copy()
            if isinstance(layer, CpuLayer):
                assert np.array_equal(layer.guess(x).ids, ids), "x has not changed since"
            assert np.array_equal(routing.ids, ids)
            if absent:
                others = iter([e for e in range(12) if e not in ids and e not in absent])
                routing.ids = np.array([[next(others) if e in absent else e for e in ids[0]]])
            picked = [experts.addresses(int(e)) for e in np.unique(routing.ids)]
            if i == 1:
                call.run(picked[:2])
                del picked[:2]
            last = call, picked
            assert list(layer.marks) == sorted(layer.marks)
        call.run(picked)
        call.finish(x)
        return x

    def walk(self, trunk: Any, x: Floats, position: int, absent: list[int], most_ns: int) -> Floats:
        """As step, by walks over tables that lack some experts."""
        x, m = x.copy(), self.mixed
        segments = [Segment(0, len(x), position, m.pages[0], m.states[0])]
        at, last, calls = 0, None, 0
        tables = [np.array([e.addresses(i)[1:] for i in range(12)]) for e in self.experts]
        for table in tables:
            table[absent] = 0
        caches = [m.cache] * 3
        while at < 3:
            at, begun = trunk.walk(x, segments, caches, tables, at, last, most_ns)
            calls += 1
            assert calls < 8
            last = None
            if begun:
                routing, call = begun
                ids = np.unique(routing.ids)
                assert np.isin(ids, absent).any()
                assert routing.ids is self.layers[at].routing.ids
                last = call, [self.experts[at].addresses(int(e)) for e in ids]
                at += 1
        if last:
            call.run(last[1])
            call.finish(x)
        return x


@pytest.mark.parametrize("absent", [[0, 2, 4, 6, 8, 10], [3, 7], []], ids=str)
@pytest.mark.parametrize("most_ns", [0, 1 << 40])
def test_a_walk_over_layers_is_one_step_after_the_other(
    ops: CpuOps, absent: list[int], most_ns: int
) -> None:
    walked = WholeLayers(ops, ops.layer)
    trunk = ops.trunk(walked.layers)
    other = CpuOps(2, MAX_TOKENS, ops.isa)
    stepped = WholeLayers(other, other.layer)
    for position, tokens in ((0, 8), (8, 1), (9, 1), (10, 3)):
        x = normal(rng(position), tokens, 96)
        got = walked.walk(trunk, x, position, absent, most_ns)
        assert np.array_equal(got, stepped.step(x, position))
    assert trunk.walk(np.zeros((9, 96), np.float32), [], [], [], 1, None, 0) == (1, None)
    other.close()


@pytest.mark.parametrize("absent", [[0, 5, 10], [2, 7]], ids=str)
def test_who_is_there_may_be_computed_before_others_stand_in(
    ops: CpuOps, absent: list[int]
) -> None:
    begun = WholeLayers(ops, ops.layer)
    later = CpuOps(2, MAX_TOKENS, ops.isa)
    told = WholeLayers(later, lambda parts: UnfusedLayer(later, parts))
    for position in range(12):
        x = normal(rng(position), 1, 96)
        assert np.array_equal(begun.step(x, position, absent), told.step(x, position, absent))
    later.close()


def test_what_was_begun_is_computed_once_settled(ops: CpuOps) -> None:
    begun, want = WholeLayers(ops, ops.layer), None
    layer, experts = begun.layers[1], begun.experts[1]
    table = np.array([experts.addresses(e)[1:] for e in range(12)])
    segments = [Segment(0, 1, 0, begun.mixed.pages[0], begun.mixed.states[0])]
    for _ in range(20):
        x = normal(rng(1), 1, 96)
        routing, call = layer.begin(x, segments, begun.mixed.cache, None, table)
        picked = [experts.addresses(int(e)) for e in routing.ids[0]]
        ops.trunk(begun.layers).settle()
        kept = [[t.data.copy() for t in matrices] for matrices in experts.experts]
        for matrices in experts.experts:  # other experts may be read there now
            for t in matrices:
                t.data[:] = 255
        call.run(picked)
        call.finish(x)
        for matrices, data in zip(experts.experts, kept, strict=True):
            for t, d in zip(matrices, data, strict=True):
                t.data[:] = d
        assert np.isfinite(x).all()
        want = x if want is None else want
        assert np.array_equal(x, want)


def test_layers_in_one_call_are_those_in_many(ops: CpuOps) -> None:
    fused = WholeLayers(ops, ops.layer)
    unfused = CpuOps(2, MAX_TOKENS, ops.isa)
    several = WholeLayers(unfused, lambda parts: UnfusedLayer(unfused, parts))
    for position, tokens in ((0, 9), (9, 1), (10, 1), (11, 5)):
        x = normal(rng(position), tokens, 96)
        assert np.array_equal(fused.step(x, position), several.step(x, position))
    unfused.close()


# ---- delta-net ----


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("head_dim", [24, 16, 5])
def test_delta_net(ops: CpuOps, tiled: bool, head_dim: int) -> None:
    layer = Recurrence(delta_spec(tiled=tiled, head_dim=head_dim))
    for length in (1, 1, 2, 16, 17, 64, 1, 150, 65):
        assert layer.step(ops, [length]) < 1e-10


def test_delta_net_of_several_sequences(ops: CpuOps) -> None:
    layer = Recurrence(delta_spec(), num_sequences=3)
    for lengths in ([40, 1, 2], [1, 1, 1], [1, 70, 1]):
        assert layer.step(ops, lengths) < 1e-10


# ---- the whole ----


@pytest.mark.parametrize("tokens", [1, 50])
def test_results_do_not_depend_on_the_number_of_threads(tokens: int) -> None:
    found = []
    for num_threads in (1, 2, 3):
        ops = CpuOps(num_threads, MAX_TOKENS)
        layer = Layer(moe_spec(gate_type=Q8_0, up_type=Q8_0, down_type=Q8_0), tokens, True)
        moe = layer.output(ops, [ALL])
        sequences = Sequences(attention_spec(), [60])
        sequences.step(ops, [tokens])
        recurrence = Recurrence(delta_spec())
        recurrence.step(ops, [tokens])
        out = ops.buffer(tokens, 77)
        ops.linear(layer.x, [ops.weight(matrix(rng(), 77, 96))], [out])
        found.append([moe, sequences.caches[0].k, recurrence.states[0][0].s, out])
        ops.close()
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert np.array_equal(got, want, equal_nan=True)


def test_scratch_stays_within_what_was_planned() -> None:
    shapes: dict[str, Any] = dict(
        widths=[96, 48 * 8], attention=[attention_spec()], delta=[delta_spec()], moe=[moe_spec()],
        shared_ff=40,
    )  # fmt: skip
    planned = CpuOps.workspace_bytes(2, MAX_TOKENS, **shapes)
    ops = CpuOps(2, MAX_TOKENS)
    ops.reserve(**shapes)
    reserved = ops.scratch_bytes
    assert 0 < reserved <= planned
    Layer(moe_spec(), MAX_TOKENS, True).output(ops, [ALL])
    Sequences(attention_spec(), [MAX_TOKENS]).step(ops, [MAX_TOKENS])
    Recurrence(delta_spec()).step(ops, [MAX_TOKENS])
    assert ops.scratch_bytes == reserved
    ops.close()


class GuardedScratch(Scratch):
    """Scratch of exactly the bytes that were asked for, with marked bytes behind it."""

    made: list[GuardedScratch]  # by the test that uses it

    def reserve(self, num_bytes: int) -> bool:
        if num_bytes <= self.num_bytes:
            return False
        self.num_bytes = num_bytes
        memory = np.full(num_bytes + 4096 + 64, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64
        self.guard = memory[start + num_bytes : start + num_bytes + 4096]
        self.pointer = ffi.from_buffer("char[]", memory[start:])
        self.made.append(self)
        return True


@pytest.mark.parametrize("tokens", [1, 9, 65])
def test_steps_stay_within_the_scratch_they_ask_for(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GuardedScratch, "made", [], raising=False)
    for module in (cpu_plans, cpu_moe):
        monkeypatch.setattr(module, "Scratch", GuardedScratch)
    ops = CpuOps(3, tokens)
    layer = Layer(moe_spec(gate_type=Q8_0, up_type=Q8_0, down_type=F32), tokens, True)
    layer.output(ops, [ALL[:5], ALL[5:]])
    for spec in SPECS.values():
        sequences = Sequences(spec, [tokens + 600])
        for _ in range(4):
            sequences.step(ops, [min(tokens, 150)])
    Recurrence(delta_spec()).step(ops, [tokens])
    weight = ops.weight(matrix(rng(), 500, 96, Q8_0))
    out = np.zeros((tokens, 500), np.float32)
    ops.linear(layer.x, [weight], [out], norm=np.ones(96, np.float32), eps=1e-6)
    ops.linear_add(layer.x, weight, out)
    ops.route(moe_spec(), layer.x, np.ones(96, np.float32), 0, ops.weight(matrix(rng(), 12, 96)))
    assert len(GuardedScratch.made) > 1
    assert all((scratch.guard == 0xA5).all() for scratch in GuardedScratch.made)
    ops.close()


def test_many_short_runs_on_more_threads_than_cores(ops: CpuOps) -> None:
    crowd = CpuOps(5, 1, ops.isa)
    random = rng()
    weight = crowd.weight(matrix(random, 400, 64))
    x, out, want = normal(random, 1, 64), crowd.buffer(1, 400), crowd.buffer(1, 400)
    ops.linear(x, [weight], [want])
    for _ in range(2000):
        out[:] = 0
        crowd.linear(x, [weight], [out])
        assert np.array_equal(out, want)
    crowd.close()


def test_unknown_isa_is_named() -> None:
    with pytest.raises(UnsupportedError, match="choose auto"):
        CpuOps(1, 1, "sse9")
