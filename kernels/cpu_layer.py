"""Layers on the CPU: one C call from one routing to the next, or for as many layers as need nothing
in between.

Owns: the C structs that join the plans of a layer. Does not know: what is computed, models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fomoe.kernels.cpu_arrays import F32Array, I64Array, RoutedArrays, Views
from fomoe.kernels.cpu_mixers import CpuMixer
from fomoe.kernels.cpu_moe import CpuMoeCall, MoeEngine, MoePlan
from fomoe.kernels.cpu_plans import RoutePlan
from fomoe.kernels.cpu_segments import Segments
from fomoe.kernels.ops import SHORT_STEP, KvCache, LayerParts, MoeCall, Resident, Routing, Segment
from fomoe.native import ffi, lib

Last = tuple[MoeCall, Sequence[Resident]] | None


def ending(last: Last) -> Any:
    """The C struct of what has to be ended first."""
    if last is None:
        return ffi.NULL
    call, experts = last
    assert isinstance(call, CpuMoeCall)
    return call.ending(experts)


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
        self._short = RoutedArrays(SHORT_STEP, with_h=False)
        self._table: I64Array | None = None
        self._began = ffi.new("fomoe_moe **")
        self.c = ffi.new("fomoe_layer *")
        self.c.route, self.c.experts, self.c.norm = self._route.c, experts.layer, self._norm
        self.c.found = experts.experts

    @property
    def marks(self) -> Sequence[int]:
        return list(self.c.marks)

    @property
    def routing(self) -> Routing:
        return Routing(*self._route.arrays)

    def prepare(self, x: F32Array, segments: Sequence[Segment], cache: KvCache | None) -> None:
        """Set what varies from step to step."""
        mixer = self._mixer
        if mixer is None or cache is not self._cache:
            mixer = self._mixer = self._make_mixer(cache)
            self._cache, self.c.mixer = cache, mixer.c
        tokens = len(x)
        self._segments.update(segments)
        mixer.prepare(x, self._parts.room(tokens), self._segments)
        if tokens != self._route.tokens:
            h, *shared = self._routed.take(self._parts.moe, tokens)
            own = self._short.take(self._parts.moe, tokens)[1:] if tokens <= SHORT_STEP else shared
            self._route.set_outs(self._views, (h, *own))

    def use_table(self, table: I64Array | None) -> None:
        """Where the experts are that are in memory, int64 [experts, 3]."""
        if table is self._table:
            return
        assert table is None or table.shape == (self._parts.moe.num_experts, 3)
        self._table = table
        self.c.table = ffi.NULL if table is None else ffi.from_buffer("int64_t[]", table)

    def begin(
        self,
        x: F32Array,
        segments: Sequence[Segment],
        cache: KvCache | None,
        last: Last,
        table: I64Array | None = None,
    ) -> tuple[Routing, CpuMoeCall]:
        self.prepare(x, segments, cache)
        self.use_table(table)
        rc = lib.fomoe_layer_begin(self.c, ending(last), self._began)
        assert rc == 0, f"the experts before were not those that were picked ({rc})"
        return self.begun(self._began[0])

    def begun(self, moe: Any) -> tuple[Routing, CpuMoeCall]:
        """What C began."""
        routing = self.routing
        self._engine.routed = self._route.picks
        return routing, CpuMoeCall(self._engine, self._experts, routing, moe)

    def guess(self, x: F32Array) -> Routing:
        plan, view = self._guess, self._views.of(x)
        if view.rows != plan.tokens:
            plan.set_outs(self._views, self._guessed.take(self._parts.moe, view.rows))
        lib.fomoe_route_run(plan.c, view.pointer, view.ld, view.rows, self._norm)
        return Routing(*plan.arrays)


class CpuTrunk:
    """fomoe.kernels.ops.TrunkOps."""

    def __init__(self, layers: Sequence[CpuLayer]) -> None:
        self._layers = tuple(layers)
        self._c = ffi.new("fomoe_layer *[]", [layer.c for layer in layers])
        self._walk = ffi.new("fomoe_walk *")

    @property
    def marks(self) -> Sequence[int]:
        return list(self._walk.marks[0:3])

    def settle(self) -> None:
        lib.fomoe_moe_settle(self._layers[0].c.experts)

    def walk(
        self,
        x: F32Array,
        segments: Sequence[Segment],
        caches: Sequence[KvCache | None],
        tables: Sequence[I64Array],
        first: int,
        last: Last,
        most_ns: int,
    ) -> tuple[int, tuple[Routing, CpuMoeCall] | None]:
        layers = self._layers
        if len(x) > SHORT_STEP:
            return first, None
        for layer, cache, table in zip(layers, caches, tables, strict=True):
            layer.prepare(x, segments, cache)
            layer.use_table(table)
        walk = self._walk
        rc = lib.fomoe_layers_walk(self._c, first, len(layers), ending(last), most_ns, walk)
        assert rc == 0, f"the experts before were not those that were picked ({rc})"
        return walk.next, layers[walk.next].begun(walk.moe) if walk.begun else None
