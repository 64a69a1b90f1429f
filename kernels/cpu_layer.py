"""A layer on the CPU between two routings: one C call.

Owns: the C struct that joins the plans of a layer. Does not know: what is computed, models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fomoe.kernels.cpu_arrays import F32Array, RoutedArrays, Views
from fomoe.kernels.cpu_mixers import CpuMixer
from fomoe.kernels.cpu_moe import CpuMoeCall, MoeEngine, MoePlan
from fomoe.kernels.cpu_plans import RoutePlan
from fomoe.kernels.cpu_segments import Segments
from fomoe.kernels.ops import KvCache, LayerParts, MoeCall, Resident, Routing, Segment
from fomoe.native import ffi, lib


class CpuLayer:
    """fomoe.kernels.ops.LayerOps. `make_mixer` gives the mixer for a cache, `routes` a plan for the
    router and one for guesses."""

    def __init__(
        self,
        parts: LayerParts,
        *,
        views: Views,
        segments: Segments,
        make_mixer: Callable[[KvCache | None], CpuMixer],
        routes: tuple[RoutePlan, RoutePlan],
        routed: tuple[RoutedArrays, RoutedArrays],
        engine: MoeEngine,
        experts: MoePlan,
    ) -> None:
        self._parts, self._views, self._segments = parts, views, segments
        self._make_mixer = make_mixer
        self._mixer: CpuMixer | None = None
        self._cache: KvCache | None = None
        self._route, self._guess = routes
        self._routed, self._guessed = routed
        self._engine, self._experts = engine, experts
        self._norm = views.of(parts.norm).pointer
        self._began = ffi.new("fomoe_moe **")
        self._c = ffi.new("fomoe_layer *")
        self._c.route, self._c.experts, self._c.norm = self._route.c, experts.layer, self._norm

    @property
    def marks(self) -> Sequence[int]:
        return list(self._c.marks)

    def begin(
        self,
        x: F32Array,
        segments: Sequence[Segment],
        cache: KvCache | None,
        last: tuple[MoeCall, Sequence[Resident]] | None,
    ) -> tuple[Routing, CpuMoeCall]:
        mixer = self._mixer
        if mixer is None or cache is not self._cache:
            mixer = self._mixer = self._make_mixer(cache)
            self._cache, self._c.mixer = cache, mixer.c
        tokens = len(x)
        self._segments.update(segments)
        mixer.prepare(x, self._parts.room(tokens), self._segments)
        if tokens != self._route.tokens:
            self._route.set_outs(self._views, self._routed.take(self._parts.moe, tokens))
        ending: Any = ffi.NULL
        if last is not None:
            call, experts = last
            assert isinstance(call, CpuMoeCall)
            ending = call.ending(experts)
        rc = lib.fomoe_layer_begin(self._c, ending, self._began)
        assert rc == 0, f"the experts before were not those that were picked ({rc})"
        routing = Routing(*self._route.arrays)
        self._engine.routed = self._route.picks
        return routing, CpuMoeCall(self._engine, self._experts, routing, self._began[0])

    def guess(self, x: F32Array) -> Routing:
        plan, view = self._guess, self._views.of(x)
        if view.rows != plan.tokens:
            plan.set_outs(self._views, self._guessed.take(self._parts.moe, view.rows))
        lib.fomoe_route_run(plan.c, view.pointer, view.ld, view.rows, self._norm)
        return Routing(*plan.arrays)
