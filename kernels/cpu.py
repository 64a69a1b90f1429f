"""CpuOps: the operations of models on the CPU, numpy arrays over the C steps of fomoe.native.

Owns: the compute threads, their scratch memory, and turning arrays into C arguments: one C call per
operation, a few microseconds of Python. Does not know: models, files, caches of experts.

Scratch is one private huge-page mapping per purpose, sized by `reserve` (or, without it, at the
first use of each shape) for `max_tokens`, so nothing is allocated while tokens flow.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.errors import UnsupportedError
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

F32 = npt.NDArray[np.float32]

ISA_NAMES = ("scalar", "avx2", "avx512", "amx")  # by number: enum fomoe_isa
HUGE_PAGE = 2 << 20
MAX_TOP_K = 64  # native/moe.c


class CpuWeight:
    """A matrix [rows, cols] in host memory, as it lies in the file."""

    __slots__ = ("address", "cols", "data", "row_bytes", "rows", "type_id")

    def __init__(self, tensor: Tensor) -> None:
        self.rows, self.cols = tensor.shape
        self.type_id = tensor.type.id
        self.row_bytes = tensor.type.row_bytes(self.cols)
        self.data = tensor.data
        assert tensor.data.size == self.rows * self.row_bytes, tensor.name
        self.address = ffi.from_buffer("char[]", tensor.data)

    def fill(self, product: Any) -> None:
        """Set the weight's fields of a C fomoe_product."""
        product.data = self.address
        product.row_bytes = self.row_bytes
        product.type = self.type_id
        product.rows = self.rows


class Scratch:
    """Huge-page memory that grows only when asked for more than ever before."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.pointer: Any = ffi.NULL
        self._map: mmap.mmap | None = None

    def reserve(self, num_bytes: int) -> bool:
        """Make room for num_bytes, 64-byte aligned; True when the pointer changed."""
        if num_bytes <= self.num_bytes:
            return False
        size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self.num_bytes, self._map = size, memory
        self.pointer = ffi.from_buffer("char[]", memory)
        return True


def _floats(array: F32) -> Any:
    """The C pointer of a float32 array whose rows are contiguous."""
    if array.flags.c_contiguous:
        return ffi.from_buffer("float[]", array)
    assert array.strides[-1] == 4
    return ffi.cast("float *", array.ctypes.data)


class CpuOps:
    """fomoe.kernels.ops.Ops on `num_threads` threads (the caller is one of them), for steps of up
    to `max_tokens` tokens. `isa`: "auto", or one of ISA_NAMES, process-wide; UnsupportedError when
    the processor lacks it."""

    name = "cpu"

    def __init__(self, num_threads: int, max_tokens: int, isa: str = "auto") -> None:
        self._set_isa(isa)
        self.num_threads = num_threads
        self.max_tokens = max_tokens
        self._pool = lib.fomoe_pool_create(num_threads)
        self._serial = lib.fomoe_pool_create(1)
        if not self._pool or not self._serial:
            raise MemoryError(f"could not start {num_threads} compute threads")
        self._scratch = Scratch()
        self._moe_memory = Scratch()
        self._h = np.empty((0, 0), np.float32)
        self._plans: list[Any] = []  # C structs that hold the scratch pointer
        self._linear_plans: dict[tuple[CpuWeight, ...], tuple[Any, list[Any]]] = {}
        self._add_plans: dict[CpuWeight, tuple[Any, list[Any]]] = {}
        self._route_plans: dict[tuple[int, int], tuple[Any, MoeSpec, CpuWeight]] = {}
        self._attention_plans: dict[AttentionSpec, tuple[Any, Any]] = {}
        self._delta_plans: dict[DeltaSpec, Any] = {}
        self._moe_plans: dict[tuple[int, int], MoePlan] = {}
        self._vectors: dict[int, tuple[F32, Any]] = {}
        self._taps: dict[int, tuple[F32, F32, Any]] = {}
        self._live: CpuMoeCall | None = None

    @staticmethod
    def _set_isa(isa: str) -> None:
        if isa == "auto":
            check(lib.fomoe_isa_set(lib.fomoe_isa_best()), "fomoe_isa_set")
        elif isa not in ISA_NAMES:
            raise UnsupportedError(f"unknown CPU ISA {isa!r}: choose auto, {', '.join(ISA_NAMES)}")
        elif lib.fomoe_isa_set(ISA_NAMES.index(isa)) < 0:
            best = ISA_NAMES[lib.fomoe_isa_best()]
            raise UnsupportedError(f"this processor has no {isa}: the best it has is {best}")

    @property
    def isa(self) -> str:
        return ISA_NAMES[lib.fomoe_isa_get()]

    def close(self) -> None:
        """Stop the threads. No call may be running, none may follow."""
        for pool in (self._pool, self._serial):
            lib.fomoe_pool_destroy(pool)
        self._pool = self._serial = ffi.NULL

    # ---- memory ----

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch held now; at most workspace_bytes of what was used."""
        return self._scratch.num_bytes + self._moe_memory.num_bytes + self._h.nbytes

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
        common += [_attention_scratch(*t, spec) for spec in attention]
        common += [_delta_scratch(num_threads, spec) for spec in delta]
        common += [lib.fomoe_route_scratch(*t, s.hidden, s.num_experts) for s in moe]
        experts = [lib.fomoe_moe_bytes(*t, _moe_shape(spec), shared_ff) for spec in moe]
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
            self._reserve(lib.fomoe_linear_scratch(*t, cols))
        for attention_spec in attention:
            self._reserve(_attention_scratch(*t, attention_spec))
        for delta_spec in delta:
            self._reserve(_delta_scratch(self.num_threads, delta_spec))
        for spec in moe:
            self._reserve(lib.fomoe_route_scratch(*t, spec.hidden, spec.num_experts))
            self._moe_memory.reserve(lib.fomoe_moe_bytes(*t, _moe_shape(spec), shared_ff))
            self._reserve_h(spec.hidden)

    def _reserve(self, num_bytes: int) -> None:
        if self._scratch.reserve(num_bytes):
            for plan in self._plans:
                plan.scratch = self._scratch.pointer

    def _reserve_h(self, hidden: int) -> None:
        if self._h.shape[1] < hidden:
            self._h = self.buffer(self.max_tokens, hidden)

    def _plan(self, ctype: str, scratch_bytes: int) -> Any:
        self._reserve(scratch_bytes)
        plan = ffi.new(ctype)
        plan.pool = self._pool
        plan.scratch = self._scratch.pointer
        self._plans.append(plan)
        return plan

    # ---- weights and activations ----

    def weight(self, tensor: Tensor) -> CpuWeight:
        return CpuWeight(tensor)

    def vector(self, tensor: Tensor) -> F32:
        out = np.empty(tensor.shape, np.float32)
        rc = lib.fomoe_dequantize(
            tensor.type.id, ffi.from_buffer(tensor.data), _floats(out), out.size
        )
        check(rc, f"dequantise {tensor.name} ({tensor.type.name})")
        return out

    def buffer(self, rows: int, cols: int) -> F32:
        memory = np.empty(rows * cols * 4 + 64, np.uint8)
        start = -memory.ctypes.data % 64
        return memory[start : start + rows * cols * 4].view(np.float32).reshape(rows, cols)

    def _vector(self, array: F32) -> Any:
        """The C pointer of a weight vector, which models keep for as long as they live."""
        found = self._vectors.get(id(array))
        if found is None:
            found = self._vectors[id(array)] = (array, _floats(array))
        return found[1]

    # ---- operations ----

    def embed(self, tensor_type: QuantType, rows: npt.NDArray[np.uint8], out: F32) -> None:
        num_rows, row_bytes = rows.shape
        assert out.shape[0] == num_rows
        assert rows.flags.c_contiguous
        rc = lib.fomoe_embed_rows(
            self._pool,
            tensor_type.id,
            ffi.from_buffer(rows),
            row_bytes,
            num_rows,
            out.shape[1],
            _floats(out),
            out.strides[0] >> 2,
        )
        check(rc, f"embedding of type {tensor_type.name}")

    def _linear_plan(self, weights: tuple[CpuWeight, ...], add: bool) -> tuple[Any, list[Any]]:
        cols = weights[0].cols
        assert len(weights) <= lib.FOMOE_LINEAR_MAX_PRODUCTS
        assert all(w.cols == cols for w in weights)
        scratch = lib.fomoe_linear_scratch(self.num_threads, self.max_tokens, cols)
        plan = self._plan("fomoe_linear *", scratch)
        plan.cols = cols
        plan.num_products = len(weights)
        plan.add = add
        products = [plan.products[i] for i in range(len(weights))]
        for w, product in zip(weights, products, strict=True):
            w.fill(product)
        return plan, products

    def linear(
        self,
        x: F32,
        weights: Sequence[CpuWeight],
        outs: Sequence[F32],
        *,
        norm: F32 | None = None,
        eps: float = 0.0,
    ) -> None:
        key = tuple(weights)
        found = self._linear_plans.get(key)
        if found is None:
            found = self._linear_plans[key] = self._linear_plan(key, False)
        plan, products = found
        tokens = x.shape[0]
        assert tokens <= self.max_tokens, (tokens, self.max_tokens)
        for product, out in zip(products, outs, strict=True):
            assert out.shape == (tokens, product.rows), (out.shape, tokens, product.rows)
            product.y = _floats(out)
            product.ldy = out.strides[0] >> 2
        plan.eps = eps
        vector = ffi.NULL if norm is None else self._vector(norm)
        lib.fomoe_linear_run(plan, _floats(x), x.strides[0] >> 2, tokens, vector)

    def linear_add(self, x: F32, weight: CpuWeight, out: F32) -> None:
        found = self._add_plans.get(weight)
        if found is None:
            found = self._add_plans[weight] = self._linear_plan((weight,), True)
        plan, (product,) = found
        tokens = x.shape[0]
        assert tokens <= self.max_tokens, (tokens, self.max_tokens)
        assert out.shape == (tokens, weight.rows), (out.shape, tokens, weight.rows)
        product.y = _floats(out)
        product.ldy = out.strides[0] >> 2
        lib.fomoe_linear_run(plan, _floats(x), x.strides[0] >> 2, tokens, ffi.NULL)

    def attention(
        self,
        spec: AttentionSpec,
        q: F32,
        k: F32,
        v: F32,
        q_norm: F32 | None,
        k_norm: F32 | None,
        cache: KvCache,
        segments: Sequence[Segment],
        out: F32,
    ) -> None:
        found = self._attention_plans.get(spec)
        if found is None:
            found = self._attention_plans[spec] = self._attention_plan(spec)
        a = found[0]
        assert q.shape[0] <= self.max_tokens, (q.shape[0], self.max_tokens)
        a.cache_f16 = cache.k.dtype == np.float16
        a.page_tokens = cache.page_tokens
        a.k_cache = ffi.from_buffer(cache.k)
        a.v_cache = ffi.from_buffer(cache.v)
        a.q_norm = ffi.NULL if q_norm is None else self._vector(q_norm)
        a.k_norm = ffi.NULL if k_norm is None else self._vector(k_norm)
        a.q, a.ldq = _floats(q), q.strides[0] >> 2
        a.k, a.ldk = _floats(k), k.strides[0] >> 2
        a.v, a.ldv = _floats(v), v.strides[0] >> 2
        a.out, a.ldo = _floats(out), out.strides[0] >> 2
        a.num_segments = len(segments)
        a.segments = c_segments = ffi.new("fomoe_segment[]", len(segments))
        for c, s in zip(c_segments, segments, strict=True):
            c.start, c.length, c.position = s.start, s.length, s.position
            c.pages = ffi.from_buffer("int32_t[]", s.pages)
        lib.fomoe_attention_run(a)

    def _attention_plan(self, spec: AttentionSpec) -> tuple[Any, Any]:
        scratch = _attention_scratch(self.num_threads, self.max_tokens, spec)
        plan = self._plan("fomoe_attention *", scratch)
        plan.heads, plan.kv_heads, plan.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        plan.rope_dims, plan.gated = spec.rope_dims, spec.gated
        plan.scale, plan.eps = spec.scale, spec.eps
        pairs = np.arange(spec.rope_dims // 2, dtype=np.float64)
        frequencies = spec.rope_base ** (-2.0 * pairs / spec.rope_dims)
        plan.rope_frequencies = pointer = ffi.from_buffer("double[]", frequencies)
        return plan, pointer

    def delta_net(
        self,
        spec: DeltaSpec,
        layer: int,
        qkv: F32,
        z: F32,
        beta: F32,
        alpha: F32,
        conv_weight: F32,
        dt_bias: F32,
        a: F32,
        norm: F32,
        segments: Sequence[Segment],
        out: F32,
    ) -> None:
        d = self._delta_plans.get(spec)
        if d is None:
            d = self._delta_plans[spec] = self._delta_plan(spec)
        d.qkv, d.ld_qkv = _floats(qkv), qkv.strides[0] >> 2
        d.z, d.ld_z = _floats(z), z.strides[0] >> 2
        d.beta, d.ld_beta = _floats(beta), beta.strides[0] >> 2
        d.alpha, d.ld_alpha = _floats(alpha), alpha.strides[0] >> 2
        d.conv_weight = self._transposed_taps(conv_weight)
        d.dt_bias, d.a, d.norm = self._vector(dt_bias), self._vector(a), self._vector(norm)
        d.out, d.ld_out = _floats(out), out.strides[0] >> 2
        d.num_segments = len(segments)
        d.segments = c_segments = ffi.new("fomoe_delta_segment[]", len(segments))
        for c, s in zip(c_segments, segments, strict=True):
            state = s.delta[layer]
            assert state is not None, layer
            c.start, c.length = s.start, s.length
            c.conv, c.s = _floats(state.conv), _floats(state.s)
        lib.fomoe_delta_run(d)

    def _delta_plan(self, spec: DeltaSpec) -> Any:
        plan = self._plan("fomoe_delta *", _delta_scratch(self.num_threads, spec))
        plan.k_heads, plan.v_heads, plan.head_dim = spec.k_heads, spec.v_heads, spec.head_dim
        plan.conv_kernel, plan.tiled, plan.eps = spec.conv_kernel, spec.tiled, spec.eps
        return plan

    def _transposed_taps(self, conv_weight: F32) -> Any:
        """[conv_dim, taps] -> the pointer of a copy [taps, conv_dim], made once per layer."""
        found = self._taps.get(id(conv_weight))
        if found is None:
            taps = np.ascontiguousarray(conv_weight.T)
            found = self._taps[id(conv_weight)] = (conv_weight, taps, _floats(taps))
        return found[2]

    def route(self, spec: MoeSpec, x: F32, norm: F32, eps: float, router: CpuWeight) -> Routing:
        """As in Ops. `h` of the result is valid until the next call of route."""
        found = self._route_plans.get((id(spec), id(router)))
        if found is None:
            found = self._route_plan(spec, router)
            self._route_plans[id(spec), id(router)] = found
        plan = found[0]
        tokens = x.shape[0]
        assert tokens <= self.max_tokens, (tokens, self.max_tokens)
        h = self._h[:tokens, : spec.hidden]
        logits = np.empty((tokens, spec.num_experts), np.float32)
        ids = np.empty((tokens, spec.top_k), np.int32)
        weights = np.empty((tokens, spec.top_k), np.float32)
        plan.eps = eps
        lib.fomoe_route_run(
            plan,
            _floats(x),
            x.strides[0] >> 2,
            tokens,
            self._vector(norm),
            _floats(h),
            h.strides[0] >> 2,
            ffi.from_buffer("float[]", logits),
            ffi.from_buffer("int32_t[]", ids),
            ffi.from_buffer("float[]", weights),
        )
        return Routing(h=h, logits=logits, ids=ids, weights=weights)

    def _route_plan(self, spec: MoeSpec, router: CpuWeight) -> tuple[Any, MoeSpec, CpuWeight]:
        assert spec.top_k <= min(MAX_TOP_K, spec.num_experts), spec.top_k
        assert (router.rows, router.cols) == (spec.num_experts, spec.hidden)
        self._reserve_h(spec.hidden)
        t = (self.num_threads, self.max_tokens)
        plan = self._plan(
            "fomoe_route *", lib.fomoe_route_scratch(*t, spec.hidden, spec.num_experts)
        )
        plan.router, plan.router_row_bytes = router.address, router.row_bytes
        plan.router_type = router.type_id
        plan.hidden, plan.num_experts, plan.top_k = spec.hidden, spec.num_experts, spec.top_k
        plan.renormalise, plan.weights_scale = spec.renormalise, spec.weights_scale
        return plan, spec, router

    def moe(
        self,
        spec: MoeSpec,
        routing: Routing,
        shared: tuple[CpuWeight, CpuWeight, CpuWeight, CpuWeight | None] | None,
    ) -> CpuMoeCall:
        """As in Ops; one call may be live at a time, and no route may come before its finish."""
        key = (id(spec), 0 if shared is None else id(shared[0]))
        plan = self._moe_plans.get(key)
        if plan is None:
            plan = self._moe_plans[key] = MoePlan(spec, shared)
            t = (self.num_threads, self.max_tokens)
            self._moe_memory.reserve(lib.fomoe_moe_bytes(*t, plan.shape, plan.shared_ff))
        self._live = call = CpuMoeCall(self, plan, routing)
        return call


class MoePlan:
    """What stays the same from step to step for the experts of one layer."""

    __slots__ = ("experts", "keep", "num_types", "shape", "shared_ff", "shared_products", "types")

    def __init__(
        self,
        spec: MoeSpec,
        shared: tuple[CpuWeight, CpuWeight, CpuWeight, CpuWeight | None] | None,
    ) -> None:
        self.keep = (spec, shared)  # ids of these are the key
        self.shape = _moe_shape(spec)
        self.experts = ffi.new("int64_t[]", 4 * spec.num_experts)
        self.shared_ff = 0
        self.types = ffi.new("int32_t[3]")
        self.num_types = 0
        self.shared_products: Any = None
        if shared is not None:
            self.shared_products = ffi.new("fomoe_product[4]")
            self.shared_ff = shared[0].rows
            for product, weight in zip(self.shared_products, shared, strict=True):
                if weight is not None:
                    weight.fill(product)
            by_h = [w.type_id for w in (shared[0], shared[1], shared[3]) if w is not None]
            self.num_types = len(by_h)
            self.types[0 : len(by_h)] = by_h


class CpuMoeCall:
    """fomoe.kernels.ops.MoeCall over native/moe.c."""

    __slots__ = ("_keep", "_moe", "_ops", "_plan", "_shared_left")

    def __init__(self, ops: CpuOps, plan: MoePlan, routing: Routing) -> None:
        self._ops = ops
        self._plan = plan
        tokens, hidden = routing.h.shape
        top_k = plan.shape.top_k
        assert hidden == plan.shape.hidden
        assert routing.ids.shape == routing.weights.shape == (tokens, top_k)
        assert tokens <= ops.max_tokens, (tokens, ops.max_tokens)
        ids = np.ascontiguousarray(routing.ids, np.int32)
        weights = np.ascontiguousarray(routing.weights, np.float32)
        self._keep = (routing.h, ids, weights)
        self._shared_left = plan.shared_products is not None
        self._moe = lib.fomoe_moe_begin(
            ops._moe_memory.pointer,
            ops._pool,
            ops._serial,
            plan.shape,
            plan.shared_ff,
            plan.types,
            plan.num_types,
            _floats(routing.h),
            routing.h.strides[0] >> 2,
            tokens,
            ffi.from_buffer("int32_t[]", ids),
            ffi.from_buffer("float[]", weights),
        )

    def shared(self) -> None:
        assert self._ops._live is self
        if self._shared_left:
            products = self._plan.shared_products
            lib.fomoe_moe_shared(self._moe, products, products + 1, products + 2, products + 3)
            self._shared_left = False

    def run(self, experts: Sequence[tuple[int, int, int, int]]) -> None:
        assert self._ops._live is self
        array, num = self._plan.experts, len(experts)
        array[0 : 4 * num] = list(chain.from_iterable(experts))
        rc = lib.fomoe_moe_run(self._moe, array, num)
        assert rc == 0, f"an expert was given twice or does not exist: {experts}"

    def finish(self, x: F32) -> None:
        assert self._ops._live is self
        assert not self._shared_left, "finish before the shared expert has run"
        missing = lib.fomoe_moe_finish(self._moe, _floats(x), x.strides[0] >> 2)
        assert missing == 0, f"{missing} picks have no output: an expert never ran"
        self._ops._live = None


def _moe_shape(spec: MoeSpec) -> Any:
    shape = ffi.new("fomoe_moe_shape *")
    shape.num_experts, shape.top_k = spec.num_experts, spec.top_k
    shape.hidden, shape.ff = spec.hidden, spec.ff
    shape.gate_type, shape.up_type = spec.gate_type.id, spec.up_type.id
    shape.down_type = spec.down_type.id
    shape.gate_row_bytes = spec.gate_type.row_bytes(spec.hidden)
    shape.up_row_bytes = spec.up_type.row_bytes(spec.hidden)
    shape.down_row_bytes = spec.down_type.row_bytes(spec.ff)
    return shape


def _attention_scratch(num_threads: int, max_tokens: int, spec: AttentionSpec) -> int:
    size: int = lib.fomoe_attention_scratch(
        num_threads, max_tokens, spec.heads, spec.kv_heads, spec.head_dim
    )
    return size


def _delta_scratch(num_threads: int, spec: DeltaSpec) -> int:
    size: int = lib.fomoe_delta_scratch(num_threads, spec.k_heads, spec.v_heads, spec.head_dim)
    return size
