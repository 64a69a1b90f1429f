"""Cases of every operation for the backends' tests: weights, inputs, and the reference's answer.

Owns: shapes and random data, all numpy. Does not know: which backend is tested, how exact it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels.ops import (
    AttentionSpec,
    DeltaSpec,
    DeltaState,
    KvCache,
    MoeSpec,
    Routing,
    Segment,
    Tensor,
)
from fomoe.kernels.reference import ReferenceOps
from fomoe.kernels.table import F16, F32, QuantType

Floats = npt.NDArray[np.float32]
REFERENCE = ReferenceOps()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(random: np.random.Generator, *shape: int) -> Floats:
    return random.standard_normal(shape, dtype=np.float32)


def tensor(values: Floats, type_: QuantType = F32) -> Tensor:
    if type_ is F32:
        data = values.view(np.uint8).reshape(-1)
    elif type_ is F16:
        data = values.astype(np.float16).view(np.uint8).reshape(-1)
    else:
        import gguf

        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType(type_.id)).reshape(-1)
    return Tensor(name="w", type=type_, shape=values.shape, data=np.ascontiguousarray(data))


def matrix(random: np.random.Generator, rows: int, cols: int, type_: QuantType = F32) -> Tensor:
    return tensor(normal(random, rows, cols) / np.float32(np.sqrt(cols)), type_)


def nmse(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return float(np.sum((got - want) ** 2) / np.sum(want**2))


def moe_spec(**changes: Any) -> MoeSpec:
    made: dict[str, Any] = dict(
        num_experts=12, top_k=3, hidden=96, ff=64, gate_type=F32, up_type=F32, down_type=F32
    )
    return MoeSpec(**(made | changes))


class Layer:
    """A MoE layer's weights, and its output from either backend."""

    def __init__(
        self, spec: MoeSpec, tokens: int, shared_gate: bool | None = None, shared_ff: int = 40
    ) -> None:
        random = rng(tokens)
        self.spec = spec
        self.experts = [
            (
                matrix(random, spec.ff, spec.hidden, spec.gate_type),
                matrix(random, spec.ff, spec.hidden, spec.up_type),
                matrix(random, spec.hidden, spec.ff, spec.down_type),
            )
            for _ in range(spec.num_experts)
        ]
        self.shared: Any = None
        if shared_gate is not None:
            gate_inp = matrix(random, 1, spec.hidden) if shared_gate else None
            shapes = ((shared_ff, spec.hidden), (shared_ff, spec.hidden), (spec.hidden, shared_ff))
            self.shared = (*(matrix(random, *shape) for shape in shapes), gate_inp)
        self.x = normal(random, tokens, spec.hidden)
        ids = [random.permutation(spec.num_experts)[: spec.top_k] for _ in range(tokens)]
        self.routing = Routing(
            h=normal(random, tokens, spec.hidden),
            logits=np.zeros((tokens, spec.num_experts), np.float32),
            ids=np.array(ids, np.int32),
            weights=random.random((tokens, spec.top_k), dtype=np.float32),
        )

    def addresses(self, expert: int) -> tuple[int, int, int, int]:
        gate, up, down = (t.data.ctypes.data for t in self.experts[expert])
        return expert, gate, up, down

    def begin(self, ops: Any) -> Any:
        shared = self.shared and tuple(t and ops.weight(t) for t in self.shared)
        return ops.moe(self.spec, self.routing, shared)

    def output(self, ops: Any, groups: list[list[int]]) -> Floats:
        """The layer's output with the experts run group by group."""
        call = self.begin(ops)
        for group in groups:
            call.run([self.addresses(e) for e in group])
        x = self.x.copy()
        call.finish(x)
        return x


ALL = list(range(12))


def attention_spec(**changes: Any) -> AttentionSpec:
    made: dict[str, Any] = dict(
        heads=8, kv_heads=2, head_dim=48, rope_dims=24, rope_base=1e6, scale=0.2, eps=1e-6,
        gated=True,
    )  # fmt: skip
    return AttentionSpec(**(made | changes))


class Sequences:
    """Sequences with what both backends need to attend: their own caches, and the same inputs."""

    def __init__(self, spec: AttentionSpec, lengths: list[int], dtype: Any = np.float32) -> None:
        self.spec, self.lengths = spec, lengths
        page_tokens, total = 16, max(lengths)
        each = -(-total // page_tokens)
        order = rng(1).permutation(each * len(lengths)).astype(np.int32)
        self.pages = order.reshape(len(lengths), each)
        shape = (order.size, spec.kv_heads, page_tokens, spec.head_dim)
        self.caches = [
            KvCache(np.full(shape, np.nan, dtype), np.full(shape, np.nan, dtype), page_tokens)
            for _ in range(2)
        ]
        random = rng(2)
        q_width = spec.heads * spec.head_dim * (2 if spec.gated else 1)
        kv_width = spec.kv_heads * spec.head_dim
        self.q = [normal(random, n, q_width) for n in lengths]
        self.k = [normal(random, n, kv_width) for n in lengths]
        self.v = [normal(random, n, kv_width) for n in lengths]
        self.norms = normal(random, 2, spec.head_dim)
        self.done = [0] * len(lengths)

    def step(self, ops: Any, counts: list[int], normed: bool = True) -> float:
        """Attend the next counts[i] tokens of every sequence; the NMSE against the reference."""
        segments, rows, start = [], [], 0
        for i, count in enumerate(counts):
            if not count:
                continue
            at = self.done[i]
            segments.append(Segment(start, count, at, self.pages[i], ()))
            rows.append((i, slice(at, at + count)))
            start += count
            self.done[i] += count
        outs = []
        q_norm, k_norm = self.norms if normed else (None, None)
        for o, cache in zip((ops, REFERENCE), self.caches, strict=True):
            q, k, v = (np.concatenate([x[i][r] for i, r in rows]) for x in (self.q, self.k, self.v))
            out = np.full((start, self.spec.heads * self.spec.head_dim), np.nan, np.float32)
            o.attention(self.spec, q, k, v, q_norm, k_norm, cache, segments, out)
            outs.append(out)
        return nmse(*outs)


SPECS = {
    "gated": attention_spec(),
    "plain": attention_spec(gated=False, head_dim=32, rope_dims=32),
    "many heads a kv head": attention_spec(heads=20, kv_heads=1, head_dim=16, rope_dims=4),
    "one each": attention_spec(heads=3, kv_heads=3, head_dim=20, rope_dims=20),
}


def delta_spec(**changes: Any) -> DeltaSpec:
    made: dict[str, Any] = dict(
        k_heads=2, v_heads=6, head_dim=24, conv_kernel=4, eps=1e-6, tiled=True
    )
    return DeltaSpec(**(made | changes))


class Recurrence:
    """One delta-net layer with its states for both backends."""

    def __init__(self, spec: DeltaSpec, num_sequences: int = 1) -> None:
        random = rng(3)
        self.spec = spec
        self.vectors = (
            normal(random, spec.conv_dim, spec.conv_kernel),
            normal(random, spec.v_heads),
            -np.exp(normal(random, spec.v_heads)),
            normal(random, spec.head_dim),
        )
        square = (spec.v_heads, spec.head_dim, spec.head_dim)
        self.states = [
            [
                DeltaState(
                    np.zeros((spec.conv_kernel - 1, spec.conv_dim), np.float32),
                    np.zeros(square, np.float32),
                )
                for _ in range(num_sequences)
            ]
            for _ in range(2)
        ]
        self.random = random

    def step(self, ops: Any, lengths: list[int]) -> float:
        """The larger of the NMSE of the outputs and that of the states."""
        spec, total = self.spec, sum(lengths)
        widths = (spec.conv_dim, spec.value_dim, spec.v_heads, spec.v_heads)
        inputs = [normal(self.random, total, width) for width in widths]
        outs = []
        for o, states in zip((ops, REFERENCE), self.states, strict=True):
            starts = np.cumsum([0, *lengths]).tolist()
            segments = [
                Segment(start, length, 0, np.zeros(1, np.int32), [None, state])
                for start, length, state in zip(starts, lengths, states, strict=False)
            ]
            out = np.full((total, spec.value_dim), np.nan, np.float32)
            o.delta_net(spec, 1, *inputs, *self.vectors, segments, out)
            outs.append(out)
        errors = [nmse(*outs)]
        for mine, reference in zip(*self.states, strict=True):
            errors += [nmse(mine.s, reference.s), nmse(mine.conv, reference.conv)]
        return max(errors)
