"""CpuOps: the operations of models on the CPU, numpy arrays over the C steps of fomoe.native.

Owns: the compute threads, and what varies from call to call: activations and segments. One C call
per operation, a few microseconds of Python. Does not know: models, files, caches of experts.

Scratch is sized by `reserve` (or, without it, at the first use of each shape) for `max_tokens`, so
nothing is allocated while tokens flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from fomoe.errors import RequestError, UnsupportedError
from fomoe.kernels.cpu_arrays import (
    HUGE_PAGE,
    CpuWeight,
    F32Array,
    RoutedArrays,
    Views,
    aligned_array,
)
from fomoe.kernels.cpu_layer import CpuLayer, CpuTrunk
from fomoe.kernels.cpu_mixers import CpuMixer
from fomoe.kernels.cpu_moe import CpuMoeCall, MoeEngine, MoePlan, SharedExpert, moe_shape
from fomoe.kernels.cpu_plans import (
    AttentionPlan,
    DeltaPlan,
    LinearPlan,
    Plans,
    RoutePlan,
    attention_scratch,
    delta_scratch,
    same,
)
from fomoe.kernels.cpu_segments import Segments
from fomoe.kernels.ops import (
    AttentionSpec,
    AttentionWeights,
    DeltaSpec,
    DeltaWeights,
    KvCache,
    LayerParts,
    MoeSpec,
    Routing,
    Segment,
    Tensor,
)
from fomoe.kernels.table import QuantType
from fomoe.native import check, ffi, lib

ISA_NAMES = ("scalar", "avx2", "avx512", "amx")  # by number: enum fomoe_isa
_FLOATS = ffi.typeof("float[]")


class CpuOps:
    """fomoe.kernels.ops.Ops on `num_threads` threads (the caller is one of them), for steps of up
    to `max_tokens` tokens. `isa`: "auto", or one of ISA_NAMES, process-wide; UnsupportedError when
    the processor lacks it, RequestError when the threads cannot be started."""

    name = "cpu"

    def __init__(self, num_threads: int, max_tokens: int, isa: str = "auto") -> None:
        _set_isa(isa)
        self.num_threads = num_threads
        self.max_tokens = max_tokens
        self._pool = lib.fomoe_pool_create(num_threads)
        self._serial = lib.fomoe_pool_create(1)
        if not self._pool or not self._serial:
            for pool in (self._pool, self._serial):
                lib.fomoe_pool_destroy(pool)
            raise RequestError(
                f"{num_threads} compute threads could not be started: take fewer (-t), or raise"
                " the limits of the process (ulimit -v, ulimit -u)"
            )
        self._views = Views()
        self._plans = Plans(self._pool, self._views, num_threads, max_tokens)
        self._moe = MoeEngine(self._pool, self._serial, self._views, num_threads, max_tokens)
        self._routed, self._guessed = RoutedArrays(max_tokens), RoutedArrays(max_tokens)
        self._segments = Segments(self._views)
        self._linear_plans: dict[tuple[float | CpuWeight, ...], LinearPlan] = {}
        self._add_plans: dict[CpuWeight, LinearPlan] = {}
        self._attention_plans: dict[int, AttentionPlan] = {}  # by id of the layer's cache
        self._delta_plans: dict[int, DeltaPlan] = {}  # by id of the layer's convolution weight
        self._mixers: dict[tuple[AttentionWeights | DeltaWeights, int], CpuMixer] = {}
        self._route_plans: dict[CpuWeight, RoutePlan] = {}
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
        self._segments = Segments(self._views)
        for plans in (
            self._linear_plans,
            self._add_plans,
            self._attention_plans,
            self._delta_plans,
            self._mixers,
            self._route_plans,
            self._moe_plans,
        ):
            plans.clear()

    # ---- memory ----

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch held now; at most workspace_bytes of what was used."""
        scratch = self._plans.scratch.num_bytes + self._moe.memory.num_bytes
        return scratch + self._routed.num_bytes + self._guessed.num_bytes

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
        routed = 2 * RoutedArrays.bytes_needed(max_tokens, moe)
        return max(common, default=0) + max(experts, default=0) + routed + 2 * HUGE_PAGE

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
            self._moe.reserve(lib.fomoe_moe_bytes(*t, moe_shape(spec), shared_ff))
            self._routed.reserve(spec)
            self._guessed.reserve(spec)

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
        plan.set_outs(self._views, outs)
        view = self._views.of(x)
        assert view.rows == plan.tokens
        vector = ffi.NULL if norm is None else self._views.of(norm).pointer
        lib.fomoe_linear_run(plan.c, view.pointer, view.ld, plan.tokens, vector)

    def linear_add(self, x: F32Array, weight: CpuWeight, out: F32Array) -> None:
        plan = self._add_plans.get(weight)
        if plan is None:
            plan = self._add_plans[weight] = self._plans.linear((weight,), 0.0, add=True)
        plan.set_outs(self._views, (out,))
        view = self._views.of(x)
        assert view.rows == plan.tokens
        lib.fomoe_linear_run(plan.c, view.pointer, view.ld, plan.tokens, ffi.NULL)

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
        plan = self._attention_plan(spec, q_norm, k_norm, cache)
        plan.bind(self._views, (q, k, v, out))
        self._segments.update(segments)
        plan.follow(self._segments)
        lib.fomoe_attention_run(plan.c)

    def _attention_plan(
        self,
        spec: AttentionSpec,
        q_norm: F32Array | None,
        k_norm: F32Array | None,
        cache: KvCache,
    ) -> AttentionPlan:
        plan = self._attention_plans.get(id(cache))
        if plan is None or not same((spec, cache, q_norm, k_norm), plan.owners):
            plan = self._plans.attention(spec, cache, q_norm, k_norm)
            self._attention_plans[id(cache)] = plan
        return plan

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
        vectors = (conv_weight, dt_bias, a, norm)
        plan = self._delta_plans.get(id(conv_weight))
        if plan is None or not same((spec, *vectors), plan.owners):
            plan = self._delta_plans[id(conv_weight)] = self._plans.delta(spec, layer, *vectors)
        plan.bind(self._views, (qkv, z, beta, alpha, out))
        self._segments.update(segments)
        plan.follow(self._segments)
        lib.fomoe_delta_run(plan.c)

    def mix_attention(
        self,
        weights: AttentionWeights,
        x: F32Array,
        buffers: Sequence[F32Array],
        cache: KvCache,
        segments: Sequence[Segment],
    ) -> None:
        self._run_mixer(self._mixer(weights, cache), x, buffers, segments)

    def mix_delta(
        self,
        weights: DeltaWeights,
        x: F32Array,
        buffers: Sequence[F32Array],
        segments: Sequence[Segment],
    ) -> None:
        self._run_mixer(self._mixer(weights, None), x, buffers, segments)

    def _mixer(self, weights: AttentionWeights | DeltaWeights, cache: KvCache | None) -> CpuMixer:
        key = (weights, id(cache))
        mixer = self._mixers.get(key)
        if mixer is None:
            w = weights
            step: AttentionPlan | DeltaPlan
            if isinstance(w, AttentionWeights):
                assert cache is not None, "attention without a cache"
                step = self._plans.attention(w.spec, cache, w.q_norm, w.k_norm)
            else:
                step = self._plans.delta(w.spec, w.layer, w.conv, w.dt_bias, w.a, w.out_norm)
            mixer = self._mixers[key] = CpuMixer(self._plans, self._views, step, w)
        return mixer

    def _run_mixer(
        self,
        mixer: CpuMixer,
        x: F32Array,
        buffers: Sequence[F32Array],
        segments: Sequence[Segment],
    ) -> None:
        self._segments.update(segments)
        mixer.prepare(x, buffers, self._segments)
        lib.fomoe_mixer_run(mixer.c)

    def route(
        self, spec: MoeSpec, x: F32Array, norm: F32Array, eps: float, router: CpuWeight
    ) -> Routing:
        """As in Ops."""
        plan = self._route_plans.get(router)
        if plan is None or plan.owners[0] is not spec or plan.owners[1] != eps:
            plan = self._route_plans[router] = self._plans.route(spec, router, eps)
        view = self._views.of(x)
        if view.rows != plan.tokens:
            plan.set_outs(self._views, self._routed.take(spec, view.rows))
        lib.fomoe_route_run(plan.c, view.pointer, view.ld, view.rows, self._views.of(norm).pointer)
        self._moe.routed = plan.picks
        return Routing(*plan.arrays)

    def moe(self, spec: MoeSpec, routing: Routing, shared: SharedExpert | None) -> CpuMoeCall:
        """As in Ops; one call may be live at a time, and no route may come before its finish."""
        return CpuMoeCall.begin(self._moe, self._moe_plan(spec, shared), routing)

    def _moe_plan(self, spec: MoeSpec, shared: SharedExpert | None) -> MoePlan:
        key = (id(spec), id(shared))
        plan = self._moe_plans.get(key)
        if plan is None:
            plan = self._moe_plans[key] = self._moe.plan(spec, shared)
        return plan

    def layer(self, parts: LayerParts) -> CpuLayer:
        route = partial(self._plans.route, parts.moe, parts.router, parts.eps)
        return CpuLayer(
            parts,
            views=self._views,
            segments=self._segments,
            make_mixer=partial(self._mixer, parts.mixer),
            routes=(route(), route()),
            routed=(self._routed, self._guessed),
            engine=self._moe,
            experts=self._moe_plan(parts.moe, parts.shared),
        )

    def trunk(self, layers: Sequence[CpuLayer]) -> CpuTrunk:
        return CpuTrunk(layers)


def _set_isa(isa: str) -> None:
    if isa == "auto":
        check(lib.fomoe_isa_set(lib.fomoe_isa_best()), "fomoe_isa_set")
    elif isa not in ISA_NAMES:
        raise UnsupportedError(f"unknown CPU ISA {isa!r}: choose auto, {', '.join(ISA_NAMES)}")
    elif lib.fomoe_isa_set(ISA_NAMES.index(isa)) < 0:
        best = ISA_NAMES[lib.fomoe_isa_best()]
        raise UnsupportedError(f"this processor has no {isa}: the best it has is {best}")
