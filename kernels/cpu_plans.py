"""The C argument structs of CpuOps: one plan per operation and layer, filled once.

Owns: what of an operation stays the same from token to token, and the scratch that all of them
share. Does not know: what varies, which CpuOps sets on each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np

from fomoe.kernels.cpu_arrays import CpuWeight, F32Array, I32Array, Scratch, Views
from fomoe.kernels.cpu_segments import Segments
from fomoe.kernels.ops import AttentionSpec, DeltaSpec, KvCache, MoeSpec
from fomoe.native import ffi, lib

MAX_TOP_K = 64  # native/moe.c

# Attention's caches and norms, or a delta-net's vectors: what a plan of one layer belongs to.
Owners = tuple[Any, ...]


class Plan:
    """A C struct `c`; `arrays`, the activations that its fields point to, of `tokens` rows;
    `owners` and `keep`, what it belongs to and keeps alive."""

    __slots__ = ("arrays", "c", "keep", "owners", "tokens")

    def __init__(self, c: Any, owners: Owners = ()) -> None:
        self.c = c
        self.owners = owners
        self.keep: list[Any] = []
        self.arrays: Any = ()
        self.tokens = 0


class LinearPlan(Plan):
    """Products of `weights` with the same activations."""

    __slots__ = ("_max_tokens", "_products", "_weights")

    def __init__(self, c: Any, weights: Sequence[CpuWeight], max_tokens: int) -> None:
        super().__init__(c)
        self._weights = weights
        self._max_tokens = max_tokens
        self._products = [c.products[i] for i in range(len(weights))]
        for weight, product in zip(weights, self._products, strict=True):
            weight.fill(product)

    def set_outs(self, views: Views, outs: Sequence[F32Array]) -> None:
        """Point the results to `outs`, one a weight."""
        if same(outs, self.arrays):
            return
        found = [views.of(out) for out in outs]
        self.tokens = found[0].rows
        assert self.tokens <= self._max_tokens, (self.tokens, self._max_tokens)
        for product, weight, view in zip(self._products, self._weights, found, strict=True):
            assert (view.rows, view.cols) == (self.tokens, weight.rows)
            product.y, product.ldy = view.pointer, view.ld
        self.arrays = tuple(outs)


class AttentionPlan(Plan):
    """Attention of one layer and its cache."""

    __slots__ = ("_version",)

    def __init__(self, c: Any, owners: Owners) -> None:
        super().__init__(c, owners)
        self._version = 0

    def bind(self, views: Views, arrays: Sequence[F32Array]) -> None:
        """Point to q, k, v and the output."""
        if same(arrays, self.arrays):
            return
        q, k, v, out = (views.of(array) for array in arrays)
        a = self.c
        a.q, a.k, a.v, a.out = q.pointer, k.pointer, v.pointer, out.pointer
        a.ldq, a.ldk, a.ldv, a.ldo = q.ld, k.ld, v.ld, out.ld
        self.arrays = tuple(arrays)

    def follow(self, segments: Segments) -> None:
        """Compute for these segments from now on."""
        if segments.version != self._version:
            self.c.num_segments, self.c.segments = segments.count, segments.c
            self._version = segments.version


class DeltaPlan(Plan):
    """The delta-net of layer `layer`."""

    __slots__ = ("_layer", "_states", "_version")

    def __init__(self, c: Any, layer: int, owners: Owners) -> None:
        super().__init__(c, owners)
        self._layer = layer
        self._version = 0
        self._states: Any = None

    def bind(self, views: Views, arrays: Sequence[F32Array]) -> None:
        """Point to qkv, z, beta, alpha and the output."""
        if same(arrays, self.arrays):
            return
        qkv, z, beta, alpha, out = (views.of(array) for array in arrays)
        d = self.c
        d.qkv, d.z, d.beta, d.alpha = qkv.pointer, z.pointer, beta.pointer, alpha.pointer
        d.ld_qkv, d.ld_z, d.ld_beta, d.ld_alpha = qkv.ld, z.ld, beta.ld, alpha.ld
        d.out, d.ld_out = out.pointer, out.ld
        self.arrays = tuple(arrays)

    def follow(self, segments: Segments) -> None:
        """Compute for these segments from now on."""
        if segments.version != self._version:
            self._states = segments.states(self._layer)
            self.c.num_segments, self.c.segments = segments.count, self._states
            self._version = segments.version


class RoutePlan(Plan):
    """The router of one layer. `picks`: ids and weights, and their C pointers."""

    __slots__ = ("picks",)

    def set_outs(self, views: Views, outs: tuple[F32Array, F32Array, I32Array, F32Array]) -> None:
        """Write h, logits, ids and weights to these arrays."""
        h, logits, ids, weights = outs
        view = views.of(h)
        self.c.h, self.c.ldh, self.tokens = view.pointer, view.ld, view.rows
        self.c.logits, self.c.weights = views.of(logits).pointer, views.of(weights).pointer
        self.c.ids = ffi.from_buffer("int32_t[]", ids)
        self.arrays = outs
        self.picks = ids, weights, self.c.ids, self.c.weights


class Plans:
    """Makes plans for one pool of threads."""

    def __init__(self, pool: Any, views: Views, num_threads: int, max_tokens: int) -> None:
        self.scratch = Scratch()
        self._pool, self._views = pool, views
        self._sizes = (num_threads, max_tokens)
        self._structs: list[Any] = []  # those that hold the scratch pointer

    def reserve(self, num_bytes: int) -> None:
        """Scratch of at least num_bytes, for the plans that exist as well."""
        if self.scratch.reserve(num_bytes):
            for struct in self._structs:
                struct.scratch = self.scratch.pointer

    def _struct(self, ctype: str, scratch_bytes: int) -> Any:
        self.reserve(scratch_bytes)
        struct = ffi.new(ctype)
        struct.pool = self._pool
        struct.scratch = self.scratch.pointer
        self._structs.append(struct)
        return struct

    def linear(self, weights: Sequence[CpuWeight], eps: float, *, add: bool) -> LinearPlan:
        cols = weights[0].cols
        assert len(weights) <= lib.FOMOE_LINEAR_MAX_PRODUCTS
        assert all(w.cols == cols for w in weights)
        c = self._struct("fomoe_linear *", lib.fomoe_linear_scratch(*self._sizes, cols))
        c.cols, c.num_products, c.add, c.eps = cols, len(weights), add, eps
        return LinearPlan(c, weights, self._sizes[1])

    def attention(
        self, spec: AttentionSpec, cache: KvCache, q_norm: F32Array | None, k_norm: F32Array | None
    ) -> AttentionPlan:
        a = self._struct("fomoe_attention *", attention_scratch(*self._sizes, spec))
        plan = AttentionPlan(a, (spec, cache, q_norm, k_norm))
        a.heads, a.kv_heads, a.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        a.rope_dims, a.gated = spec.rope_dims, spec.gated
        a.scale, a.eps = spec.scale, spec.eps
        pairs = np.arange(spec.rope_dims // 2, dtype=np.float64)
        frequencies = spec.rope_base ** (-2.0 * pairs / spec.rope_dims)
        rope = ffi.from_buffer("double[]", frequencies)
        k, v = ffi.from_buffer(cache.k), ffi.from_buffer(cache.v)
        plan.keep = [rope, k, v]
        a.rope_frequencies, a.k_cache, a.v_cache = rope, k, v
        assert cache.k.dtype == cache.v.dtype
        a.cache_f16 = cache.k.dtype == np.float16
        a.page_tokens = cache.page_tokens
        a.q_norm, a.k_norm = self._optional(q_norm), self._optional(k_norm)
        return plan

    def _optional(self, vector: F32Array | None) -> Any:
        return ffi.NULL if vector is None else self._views.of(vector).pointer

    def delta(
        self,
        spec: DeltaSpec,
        layer: int,
        conv_weight: F32Array,
        dt_bias: F32Array,
        a: F32Array,
        norm: F32Array,
    ) -> DeltaPlan:
        d = self._struct("fomoe_delta *", delta_scratch(self._sizes[0], spec))
        plan = DeltaPlan(d, layer, (spec, conv_weight, dt_bias, a, norm))
        d.k_heads, d.v_heads, d.head_dim = spec.k_heads, spec.v_heads, spec.head_dim
        d.conv_kernel, d.tiled, d.eps = spec.conv_kernel, spec.tiled, spec.eps
        assert conv_weight.shape == (spec.conv_dim, spec.conv_kernel)
        taps = ffi.from_buffer("float[]", np.ascontiguousarray(conv_weight.T))
        plan.keep = [taps]
        d.conv_weight = taps
        d.dt_bias, d.a, d.norm = (self._views.of(x).pointer for x in (dt_bias, a, norm))
        return plan

    def route(self, spec: MoeSpec, router: CpuWeight, eps: float) -> RoutePlan:
        assert spec.top_k <= min(MAX_TOP_K, spec.num_experts), spec.top_k
        assert (router.rows, router.cols) == (spec.num_experts, spec.hidden)
        scratch = lib.fomoe_route_scratch(*self._sizes, spec.hidden, spec.num_experts)
        r = self._struct("fomoe_route *", scratch)
        plan = RoutePlan(r, (spec, eps))
        r.router, r.router_row_bytes, r.router_type = (
            router.address,
            router.row_bytes,
            router.type_id,
        )
        r.hidden, r.num_experts, r.top_k = spec.hidden, spec.num_experts, spec.top_k
        r.renormalise, r.weights_scale, r.eps = spec.renormalise, spec.weights_scale, eps
        return plan


def same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """The very same objects."""
    return len(now) == len(before) and all(map(is_, now, before))


def attention_scratch(num_threads: int, max_tokens: int, spec: AttentionSpec) -> int:
    size: int = lib.fomoe_attention_scratch(
        num_threads, max_tokens, spec.heads, spec.kv_heads, spec.head_dim
    )
    return size


def delta_scratch(num_threads: int, spec: DeltaSpec) -> int:
    size: int = lib.fomoe_delta_scratch(num_threads, spec.k_heads, spec.v_heads, spec.head_dim)
    return size
