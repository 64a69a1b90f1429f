"""The C argument structs of CpuOps: one plan per operation and layer, filled once.

Owns: what of an operation stays the same from token to token, and the scratch that all of them
share. Does not know: what varies, which CpuOps sets on each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fomoe.kernels.cpu_arrays import CpuWeight, F32Array, Scratch, Views
from fomoe.kernels.ops import AttentionSpec, DeltaSpec, KvCache, MoeSpec
from fomoe.native import ffi, lib

MAX_TOP_K = 64  # native/moe.c

# Attention's caches and norms, or a delta-net's vectors: what a plan of one layer belongs to.
Owners = tuple[Any, ...]


class Plan:
    """A C struct `c`; `parts`, its structs per weight or segment; `arrays`, the activations that
    its fields point to, of `tokens` rows; `owners` and `keep`, what it belongs to and keeps alive.
    """

    __slots__ = ("arrays", "c", "keep", "owners", "parts", "tokens")

    def __init__(self, c: Any, owners: Owners = ()) -> None:
        self.c = c
        self.owners = owners
        self.keep: list[Any] = []
        self.parts: list[Any] = []
        self.arrays: Sequence[F32Array] = ()
        self.tokens = 0


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

    def _plan(self, ctype: str, scratch_bytes: int, owners: Owners = ()) -> Plan:
        self.reserve(scratch_bytes)
        struct = ffi.new(ctype)
        struct.pool = self._pool
        struct.scratch = self.scratch.pointer
        self._structs.append(struct)
        return Plan(struct, owners)

    def linear(self, weights: Sequence[CpuWeight], eps: float, *, add: bool) -> Plan:
        cols = weights[0].cols
        assert len(weights) <= lib.FOMOE_LINEAR_MAX_PRODUCTS
        assert all(w.cols == cols for w in weights)
        plan = self._plan("fomoe_linear *", lib.fomoe_linear_scratch(*self._sizes, cols))
        plan.c.cols, plan.c.num_products, plan.c.add, plan.c.eps = cols, len(weights), add, eps
        plan.parts = [plan.c.products[i] for i in range(len(weights))]
        for weight, product in zip(weights, plan.parts, strict=True):
            weight.fill(product)
        return plan

    def attention(
        self, spec: AttentionSpec, cache: KvCache, q_norm: F32Array | None, k_norm: F32Array | None
    ) -> Plan:
        scratch = attention_scratch(*self._sizes, spec)
        plan = self._plan("fomoe_attention *", scratch, (spec, cache, q_norm, k_norm))
        a = plan.c
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
        conv_weight: F32Array,
        dt_bias: F32Array,
        a: F32Array,
        norm: F32Array,
    ) -> Plan:
        scratch = delta_scratch(self._sizes[0], spec)
        owners = (spec, conv_weight, dt_bias, a, norm)
        plan = self._plan("fomoe_delta *", scratch, owners)
        d = plan.c
        d.k_heads, d.v_heads, d.head_dim = spec.k_heads, spec.v_heads, spec.head_dim
        d.conv_kernel, d.tiled, d.eps = spec.conv_kernel, spec.tiled, spec.eps
        assert conv_weight.shape == (spec.conv_dim, spec.conv_kernel)
        taps = ffi.from_buffer("float[]", np.ascontiguousarray(conv_weight.T))
        plan.keep = [taps]
        d.conv_weight = taps
        d.dt_bias, d.a, d.norm = (self._views.of(x).pointer for x in (dt_bias, a, norm))
        return plan

    def route(self, spec: MoeSpec, router: CpuWeight, eps: float) -> Plan:
        assert spec.top_k <= min(MAX_TOP_K, spec.num_experts), spec.top_k
        assert (router.rows, router.cols) == (spec.num_experts, spec.hidden)
        scratch = lib.fomoe_route_scratch(*self._sizes, spec.hidden, spec.num_experts)
        plan = self._plan("fomoe_route *", scratch, (spec, eps))
        r = plan.c
        r.router, r.router_row_bytes, r.router_type = (
            router.address,
            router.row_bytes,
            router.type_id,
        )
        r.hidden, r.num_experts, r.top_k = spec.hidden, spec.num_experts, spec.top_k
        r.renormalise, r.weights_scale, r.eps = spec.renormalise, spec.weights_scale, eps
        return plan


def attention_scratch(num_threads: int, max_tokens: int, spec: AttentionSpec) -> int:
    size: int = lib.fomoe_attention_scratch(
        num_threads, max_tokens, spec.heads, spec.kv_heads, spec.head_dim
    )
    return size


def delta_scratch(num_threads: int, spec: DeltaSpec) -> int:
    size: int = lib.fomoe_delta_scratch(num_threads, spec.k_heads, spec.v_heads, spec.head_dim)
    return size
