"""Layers of large models' shapes with random weights, for tools/bench_ops.

Owns: shapes, weights, and the operations of a layer as calls to be measured. Does not know: clocks.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fomoe.kernels.cpu import CpuOps
from fomoe.kernels.cpu_arrays import HUGE_PAGE, CpuWeight
from fomoe.kernels.cpu_moe import CpuMoeCall, SharedExpert
from fomoe.kernels.ops import (
    AttentionSpec,
    AttentionWeights,
    DeltaSpec,
    DeltaState,
    DeltaWeights,
    KvCache,
    MoeSpec,
    Routing,
    Segment,
    Tensor,
)
from fomoe.kernels.table import F32, Q4_K, Q6_K, Q8_0, QuantType

SCALES_AT = {"Q4_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,)}  # fp16 fields of a block
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes of one model; delta is None where every layer attends."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_dims: int
    v_heads: int  # 0: attention only
    experts: int
    resident: int  # experts with weights here
    top_k: int
    ff: int
    shared_ff: int


SHAPES = {
    "35b": Shape(2048, 16, 2, 256, 64, 32, 256, 256, 8, 512, 512),
    "397b": Shape(4096, 32, 2, 256, 64, 64, 512, 64, 10, 1024, 1024),
    "30b": Shape(2048, 32, 4, 128, 128, 0, 128, 128, 8, 768, 0),
    "tiny": Shape(64, 4, 2, 32, 16, 4, 8, 8, 2, 32, 32),
}


class Memory:
    """Random weights in huge pages, as the engine's are."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.tensors: list[np.ndarray] = []

    def tensor(self, type_: QuantType, rows: int, cols: int, count: int = 1) -> list[Tensor]:
        if cols % type_.block_size:
            type_ = F32
        row_bytes = type_.row_bytes(cols)
        total = rows * row_bytes * count
        room = (total // HUGE_PAGE + 2) * HUGE_PAGE  # whole pages, as in the engine's arena
        pages = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        data = np.frombuffer(pages, np.uint8)
        data = data[-data.ctypes.data % HUGE_PAGE :][:total]
        block = self._blocks(type_)
        for at in range(0, total, block.size):
            data[at : at + block.size] = block[: total - at]
        self.tensors.append(data)
        size = rows * row_bytes
        return [
            Tensor(name="w", type=type_, shape=(rows, cols), data=data[i * size : (i + 1) * size])
            for i in range(count)
        ]

    def _blocks(self, type_: QuantType) -> np.ndarray:
        if type_ is F32:
            return self.random.standard_normal(1 << 16, np.float32).view(np.uint8)
        blocks = self.random.integers(0, 256, (4096, type_.block_bytes), np.uint8)
        for at in SCALES_AT[type_.name]:
            blocks[:, at : at + 2] = np.array([0.0001], np.float16).view(np.uint8)
        return blocks.reshape(-1)


Call = tuple[str, int, Callable[[], object]]  # operation, bytes it touches, what runs it


class Layer:
    """One layer, delta-net or attention and then experts: `calls` gives its operations."""

    def __init__(
        self, shape: Shape, ops: CpuOps, memory: Memory, recurrent: bool, tokens: int, context: int
    ) -> None:
        self.shape, self.ops, self.memory, self.tokens = shape, ops, memory, tokens
        self.norm = np.ones(shape.hidden, np.float32)
        if recurrent:
            self.mixer_call = self._delta()
        else:
            self.mixer_call = self._attention(context)
        self._make_experts()

    def calls(self, x: np.ndarray) -> list[Call]:
        """Of one step; moe's parts depend on each other."""
        o, s = self.ops, self.shape
        ids = [self.memory.random.permutation(s.resident)[: s.top_k] for _ in range(self.tokens)]
        picked = sorted({int(i) for row in ids for i in row})
        experts = [self.addresses[i] for i in picked]
        routing: Routing
        moe: CpuMoeCall

        def route() -> None:
            nonlocal routing
            routing = o.route(self.moe, x, self.norm, EPS, self.router)
            routing.ids = np.array(ids, np.int32)

        def begin() -> None:
            nonlocal moe
            moe = o.moe(self.moe, routing, self.shared)

        return [
            self.mixer_call(x),
            ("route", self.router.data.nbytes, route),
            ("moe begin", sum(w.data.nbytes for w in self.shared or () if w), begin),
            ("moe run", self.expert_bytes * len(picked), lambda: moe.run(experts)),
            ("moe finish", 0, lambda: moe.finish(x)),
        ]

    def _delta(self) -> Callable[[np.ndarray], Call]:
        s = self.shape
        spec = DeltaSpec(
            k_heads=s.v_heads // 2,
            v_heads=s.v_heads,
            head_dim=s.head_dim // 2,
            conv_kernel=4,
            eps=EPS,
            tiled=True,
        )
        rows = (spec.conv_dim, spec.value_dim, spec.v_heads, spec.v_heads)
        mixer = DeltaWeights(
            layer=0,
            spec=spec,
            eps=EPS,
            norm=self.norm,
            inputs=self._inputs(rows, (Q4_K, Q4_K, Q8_0, Q8_0)),
            conv=self.memory.random.standard_normal((spec.conv_dim, 4), np.float32),
            dt_bias=np.zeros(spec.v_heads, np.float32),
            a=-np.ones(spec.v_heads, np.float32),
            out_norm=np.ones(spec.head_dim, np.float32),
            output=self._weight(s.hidden, spec.value_dim),
        )
        state = DeltaState(
            conv=np.zeros((3, spec.conv_dim), np.float32),
            s=np.zeros((spec.v_heads, spec.head_dim, spec.head_dim), np.float32),
        )
        segment = Segment(0, self.tokens, 0, np.zeros(1, np.int32), [state])
        buffers = self._buffers((*rows, spec.value_dim))
        touched = _nbytes(mixer) + 2 * state.s.nbytes

        def call(x: np.ndarray) -> Call:
            # A list of its own: the next round's steps look like steps.
            run = partial(self.ops.mix_delta, mixer, x, buffers, [segment])
            return "delta mixer", touched, run

        return call

    def _attention(self, context: int) -> Callable[[np.ndarray], Call]:
        s = self.shape
        spec = AttentionSpec(
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            rope_dims=s.rope_dims,
            rope_base=1e7,
            scale=s.head_dim**-0.5,
            eps=EPS,
            gated=s.v_heads > 0,
        )
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        rows = (q * (2 if spec.gated else 1), kv, kv)
        head_norm = np.ones(s.head_dim, np.float32)
        mixer = AttentionWeights(
            spec=spec,
            eps=EPS,
            norm=self.norm,
            inputs=self._inputs(rows, (Q4_K, Q4_K, Q6_K)),
            q_norm=head_norm,
            k_norm=head_norm,
            output=self._weight(s.hidden, q),
        )
        pages = -(-(context + self.tokens) // 64)
        page = (pages, s.kv_heads, 64, s.head_dim)
        cache = KvCache(np.zeros(page, np.float16), np.zeros(page, np.float16), 64)
        segment = Segment(0, self.tokens, context, np.arange(pages, dtype=np.int32), [None])
        buffers = self._buffers((*rows, q))
        touched = _nbytes(mixer) + 2 * 2 * (context + self.tokens) * kv

        def call(x: np.ndarray) -> Call:
            run = partial(self.ops.mix_attention, mixer, x, buffers, cache, [segment])
            return "attention mixer", touched, run

        return call

    def _make_experts(self) -> None:
        s = self.shape
        self.router = self._weight(s.experts, s.hidden, F32)
        self.shared: SharedExpert | None = None
        if s.shared_ff:
            self.shared = (
                self._weight(s.shared_ff, s.hidden),
                self._weight(s.shared_ff, s.hidden),
                self._weight(s.hidden, s.shared_ff),
                self._weight(1, s.hidden, F32),
            )
        gates = self.memory.tensor(Q4_K, s.ff, s.hidden, s.resident)
        ups = self.memory.tensor(Q4_K, s.ff, s.hidden, s.resident)
        downs = self.memory.tensor(Q4_K, s.hidden, s.ff, s.resident)
        self.moe = MoeSpec(
            num_experts=s.experts,
            top_k=s.top_k,
            hidden=s.hidden,
            ff=s.ff,
            gate_type=gates[0].type,
            up_type=ups[0].type,
            down_type=downs[0].type,
        )
        self.expert_bytes = sum(t[0].data.nbytes for t in (gates, ups, downs))
        self.addresses = [
            (i, *(t[i].data.ctypes.data for t in (gates, ups, downs))) for i in range(s.resident)
        ]

    def _weight(self, rows: int, cols: int, type_: QuantType = Q4_K) -> CpuWeight:
        return self.ops.weight(self.memory.tensor(type_, rows, cols)[0])

    def _inputs(self, rows: Sequence[int], types: Sequence[QuantType]) -> list[CpuWeight]:
        hidden = self.shape.hidden
        return [self._weight(r, hidden, t) for r, t in zip(rows, types, strict=True)]

    def _buffers(self, widths: Sequence[int]) -> list[np.ndarray]:
        return [self.ops.buffer(self.tokens, width) for width in widths]


def _nbytes(mixer: AttentionWeights | DeltaWeights) -> int:
    return sum(w.data.nbytes for w in (*mixer.inputs, mixer.output))
