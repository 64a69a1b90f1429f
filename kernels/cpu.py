"""CpuOps: the operations of models on the CPU, numpy arrays over the C steps of fomoe.native.

Owns: the compute threads, and what varies from call to call: activations and segments. One C call
per operation, a few microseconds of Python. Does not know: models, files, caches of experts.

Scratch is sized by `reserve` (or, without it, at the first use of each shape) for `max_tokens`, so
nothing is allocated while tokens flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.errors import UnsupportedError
from fomoe.kernels.cpu_arrays import HUGE_PAGE, CpuWeight, F32Array, Views, aligned_array
from fomoe.kernels.cpu_moe import CpuMoeCall, MoeEngine, MoePlan, SharedExpert, moe_shape
from fomoe.kernels.cpu_plans import Plan, Plans, attention_scratch, delta_scratch
from fomoe.kernels.ops import (
    AttentionSpec,
    DeltaSpec,
    KvCache,
    MoeSpec,
    Routing,
    Segment,
    Tensor,
)
from fomoe.kernels.table import QuantType
from fomoe.native import check, ffi, lib

ISA_NAMES = ("scalar", "avx2", "avx512", "amx")  # by number: enum fomoe_isa
_FLOATS = ffi.typeof("float[]")
_IDS = ffi.typeof("int32_t[]")


class CpuOps:
    """fomoe.kernels.ops.Ops on `num_threads` threads (the caller is one of them), for steps of up
    to `max_tokens` tokens. `isa`: "auto", or one of ISA_NAMES, process-wide; UnsupportedError when
    the processor lacks it."""

    name = "cpu"

    def __init__(self, num_threads: int, max_tokens: int, isa: str = "auto") -> None:
        _set_isa(isa)
        self.num_threads = num_threads
        self.max_tokens = max_tokens
        self._pool = lib.fomoe_pool_create(num_threads)
        self._serial = lib.fomoe_pool_create(1)
        if not self._pool or not self._serial:
            raise MemoryError(f"could not start {num_threads} compute threads")
        self._views = Views()
        self._plans = Plans(self._pool, self._views, num_threads, max_tokens)
        self._moe = MoeEngine(self._pool, self._serial, self._views, max_tokens)
        self._h = np.empty((0, 0), np.float32)
        self._linear_plans: dict[tuple[float | CpuWeight, ...], Plan] = {}
        self._add_plans: dict[CpuWeight, Plan] = {}
        self._attention_plans: dict[int, Plan] = {}  # by id of the layer's cache
        self._delta_plans: dict[int, Plan] = {}  # by id of the layer's convolution weight
        self._route_plans: dict[CpuWeight, Plan] = {}
        self._moe_plans: dict[tuple[int, int], MoePlan] = {}

    @property
    def isa(self) -> str:
        return ISA_NAMES[lib.fomoe_isa_get()]

    def close(self) -> None:
        """Stop the threads and let go of all arrays. No call may be running, none may follow."""
        for pool in (self._pool, self._serial):
            lib.fomoe_pool_destroy(pool)
        self._pool = self._serial = ffi.NULL
        self._views.clear()
        self._moe.live = None
        self._linear_plans.clear()
        self._add_plans.clear()
        self._attention_plans.clear()
        self._delta_plans.clear()
        self._route_plans.clear()
        self._moe_plans.clear()

    # ---- memory ----

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch held now; at most workspace_bytes of what was used."""
        scratch = self._plans.scratch.num_bytes + self._moe.memory.num_bytes
        return scratch + self._h.nbytes

    @staticmethod
    def workspace_bytes(
        num_threads: int,
        max_tokens: int,
        *,
        widths: Sequence[int],
        attention: Sequence[AttentionSpec] = (),
        delta: Sequence[DeltaSpec] = (),
        moe: Sequence[MoeSpec] = (),
        shared_ff: int = 0,
    ) -> int:
        """Scratch that a model needs: `widths` are the columns of its dense weights."""
        t = (num_threads, max_tokens)
        common = [lib.fomoe_linear_scratch(*t, cols) for cols in widths]
        common += [attention_scratch(*t, spec) for spec in attention]
        common += [delta_scratch(num_threads, spec) for spec in delta]
        common += [lib.fomoe_route_scratch(*t, s.hidden, s.num_experts) for s in moe]
        experts = [lib.fomoe_moe_bytes(*t, moe_shape(spec), shared_ff) for spec in moe]
        h_bytes = 4 * max_tokens * max((spec.hidden for spec in moe), default=0)
        return max(common, default=0) + max(experts, default=0) + h_bytes + 2 * HUGE_PAGE

    def reserve(
        self,
        *,
        widths: Sequence[int],
        attention: Sequence[AttentionSpec] = (),
        delta: Sequence[DeltaSpec] = (),
        moe: Sequence[MoeSpec] = (),
        shared_ff: int = 0,
    ) -> None:
        """Allocate what workspace_bytes counted, so that no later call allocates."""
        t = (self.num_threads, self.max_tokens)
        for cols in widths:
            self._plans.reserve(lib.fomoe_linear_scratch(*t, cols))
        for attention_spec in attention:
            self._plans.reserve(attention_scratch(*t, attention_spec))
        for delta_spec in delta:
            self._plans.reserve(delta_scratch(self.num_threads, delta_spec))
        for spec in moe:
            self._plans.reserve(lib.fomoe_route_scratch(*t, spec.hidden, spec.num_experts))
            self._moe.memory.reserve(lib.fomoe_moe_bytes(*t, moe_shape(spec), shared_ff))
            self._reserve_h(spec.hidden)

    def _reserve_h(self, hidden: int) -> None:
        if self._h.shape[1] < hidden:
            self._h = self.buffer(self.max_tokens, hidden)

    # ---- weights and activations ----

    def weight(self, tensor: Tensor) -> CpuWeight:
        return CpuWeight(tensor)

    def vector(self, tensor: Tensor) -> F32Array:
        out = np.empty(tensor.shape, np.float32)
        data, pointer = ffi.from_buffer(tensor.data), ffi.from_buffer(_FLOATS, out)
        rc = lib.fomoe_dequantize(tensor.type.id, data, pointer, out.size)
        check(rc, f"dequantise {tensor.name} ({tensor.type.name})")
        return out

    def buffer(self, rows: int, cols: int) -> F32Array:
        return aligned_array(rows, cols)

    # ---- operations ----

    def embed(self, tensor_type: QuantType, rows: npt.NDArray[np.uint8], out: F32Array) -> None:
        num_rows, row_bytes = rows.shape
        view = self._views.of(out)
        assert view.rows == num_rows
        assert row_bytes == tensor_type.row_bytes(view.cols)
        data = ffi.from_buffer(rows)
        rc = lib.fomoe_embed_rows(
            self._pool, tensor_type.id, data, row_bytes, num_rows, view.cols, view.pointer, view.ld
        )
        check(rc, f"embedding of type {tensor_type.name}")

    def linear(
        self,
        x: F32Array,
        weights: Sequence[CpuWeight],
        outs: Sequence[F32Array],
        *,
        norm: F32Array | None = None,
        eps: float = 0.0,
    ) -> None:
        key: tuple[float | CpuWeight, ...] = (eps, *weights)
        plan = self._linear_plans.get(key)
        if plan is None:
            plan = self._linear_plans[key] = self._plans.linear(weights, eps, add=False)
        self._set_outs(plan, weights, outs)
        view = self._views.of(x)
        assert view.rows == plan.tokens
        vector = ffi.NULL if norm is None else self._views.of(norm).pointer
        lib.fomoe_linear_run(plan.c, view.pointer, view.ld, plan.tokens, vector)

    def linear_add(self, x: F32Array, weight: CpuWeight, out: F32Array) -> None:
        plan = self._add_plans.get(weight)
        if plan is None:
            plan = self._add_plans[weight] = self._plans.linear((weight,), 0.0, add=True)
        self._set_outs(plan, (weight,), (out,))
        view = self._views.of(x)
        assert view.rows == plan.tokens
        lib.fomoe_linear_run(plan.c, view.pointer, view.ld, plan.tokens, ffi.NULL)

    def _set_outs(self, plan: Plan, weights: Sequence[CpuWeight], outs: Sequence[F32Array]) -> None:
        if _same(outs, plan.arrays):
            return
        views = [self._views.of(out) for out in outs]
        plan.tokens = self._checked(views[0].rows)
        for product, weight, view in zip(plan.parts, weights, views, strict=True):
            assert (view.rows, view.cols) == (plan.tokens, weight.rows)
            product.y, product.ldy = view.pointer, view.ld
        plan.arrays = tuple(outs)

    def _checked(self, tokens: int) -> int:
        assert tokens <= self.max_tokens, (tokens, self.max_tokens)
        return tokens

    def attention(
        self,
        spec: AttentionSpec,
        q: F32Array,
        k: F32Array,
        v: F32Array,
        q_norm: F32Array | None,
        k_norm: F32Array | None,
        cache: KvCache,
        segments: Sequence[Segment],
        out: F32Array,
    ) -> None:
        plan = self._attention_plans.get(id(cache))
        if plan is None or not _same((spec, cache, q_norm, k_norm), plan.owners):
            plan = self._plans.attention(spec, cache, q_norm, k_norm)
            self._attention_plans[id(cache)] = plan
        a = plan.c
        arrays = (q, k, v, out)
        if not _same(arrays, plan.arrays):
            views = [self._views.of(array) for array in arrays]
            self._checked(views[0].rows)
            a.q, a.k, a.v, a.out = (view.pointer for view in views)
            a.ldq, a.ldk, a.ldv, a.ldo = (view.ld for view in views)
            plan.arrays = arrays
        if len(plan.parts) != len(segments):
            _make_parts(plan, "fomoe_segment[]", len(segments))
        for c, s in zip(plan.parts, segments, strict=True):
            c.start, c.length, c.position = s.start, s.length, s.position
            c.pages = ffi.from_buffer(_IDS, s.pages)
        lib.fomoe_attention_run(a)

    def delta_net(
        self,
        spec: DeltaSpec,
        layer: int,
        qkv: F32Array,
        z: F32Array,
        beta: F32Array,
        alpha: F32Array,
        conv_weight: F32Array,
        dt_bias: F32Array,
        a: F32Array,
        norm: F32Array,
        segments: Sequence[Segment],
        out: F32Array,
    ) -> None:
        plan = self._delta_plans.get(id(conv_weight))
        if plan is None or not _same((spec, conv_weight, dt_bias, a, norm), plan.owners):
            plan = self._plans.delta(spec, conv_weight, dt_bias, a, norm)
            self._delta_plans[id(conv_weight)] = plan
        d = plan.c
        arrays = (qkv, z, beta, alpha, out)
        if not _same(arrays, plan.arrays):
            views = [self._views.of(array) for array in arrays]
            self._checked(views[0].rows)
            d.qkv, d.z, d.beta, d.alpha, d.out = (view.pointer for view in views)
            d.ld_qkv, d.ld_z, d.ld_beta, d.ld_alpha, d.ld_out = (view.ld for view in views)
            plan.arrays = arrays
        if len(plan.parts) != len(segments):
            _make_parts(plan, "fomoe_delta_segment[]", len(segments))
        for c, s in zip(plan.parts, segments, strict=True):
            state = s.delta[layer]
            assert state is not None, layer
            c.start, c.length = s.start, s.length
            c.conv, c.s = self._views.of(state.conv).pointer, self._views.of(state.s).pointer
        lib.fomoe_delta_run(d)

    def route(
        self, spec: MoeSpec, x: F32Array, norm: F32Array, eps: float, router: CpuWeight
    ) -> Routing:
        """As in Ops. `h` of the result is valid until the next call of route."""
        plan = self._route_plans.get(router)
        if plan is None or plan.owners[0] is not spec or plan.owners[1] != eps:
            plan = self._route_plans[router] = self._plans.route(spec, router, eps)
            self._reserve_h(spec.hidden)
        view = self._views.of(x)
        tokens = view.rows
        if plan.tokens != tokens:
            plan.arrays = (self._h[: self._checked(tokens), : spec.hidden],)
            plan.tokens = tokens
        h = plan.arrays[0]
        h_view = self._views.of(h)
        logits = np.empty((tokens, spec.num_experts), np.float32)
        ids = np.empty((tokens, spec.top_k), np.int32)
        weights = np.empty((tokens, spec.top_k), np.float32)
        picks = ffi.from_buffer(_IDS, ids), ffi.from_buffer(_FLOATS, weights)
        self._moe.routed = (ids, weights, *picks)
        lib.fomoe_route_run(
            plan.c,
            view.pointer,
            view.ld,
            tokens,
            self._views.of(norm).pointer,
            h_view.pointer,
            h_view.ld,
            ffi.from_buffer(_FLOATS, logits),
            *picks,
        )
        return Routing(h=h, logits=logits, ids=ids, weights=weights)

    def moe(self, spec: MoeSpec, routing: Routing, shared: SharedExpert | None) -> CpuMoeCall:
        """As in Ops; one call may be live at a time, and no route may come before its finish."""
        key = (id(spec), id(shared))
        plan = self._moe_plans.get(key)
        if plan is None:
            plan = self._moe_plans[key] = MoePlan(spec, shared)
            t = (self.num_threads, self.max_tokens)
            self._moe.memory.reserve(lib.fomoe_moe_bytes(*t, plan.shape, plan.shared_ff))
        return CpuMoeCall(self._moe, plan, routing)


def _same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """The very same objects."""
    return len(now) == len(before) and all(map(is_, now, before))


def _make_parts(plan: Plan, ctype: str, count: int) -> None:
    pointer = ffi.new(ctype, count)
    plan.c.segments, plan.c.num_segments = pointer, count
    plan.parts = [pointer[i] for i in range(count)]
    plan.keep.append(pointer)


def _set_isa(isa: str) -> None:
    if isa == "auto":
        check(lib.fomoe_isa_set(lib.fomoe_isa_best()), "fomoe_isa_set")
    elif isa not in ISA_NAMES:
        raise UnsupportedError(f"unknown CPU ISA {isa!r}: choose auto, {', '.join(ISA_NAMES)}")
    elif lib.fomoe_isa_set(ISA_NAMES.index(isa)) < 0:
        best = ISA_NAMES[lib.fomoe_isa_best()]
        raise UnsupportedError(f"this processor has no {isa}: the best it has is {best}")
