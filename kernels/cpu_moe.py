"""The experts of one layer on the CPU: MoeCall over native/moe.c.

Owns: turning a routing and expert addresses into C arguments. Does not know: threads, other
operations, where experts lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels.cpu_arrays import CpuWeight, F32Array, Scratch, Views
from fomoe.kernels.ops import MoeSpec, Routing
from fomoe.native import ffi, lib

SharedExpert = tuple[CpuWeight, CpuWeight, CpuWeight, CpuWeight | None]

_IDS = ffi.typeof("int32_t[]")
_FLOATS = ffi.typeof("float[]")


def moe_shape(spec: MoeSpec) -> Any:
    """The C fomoe_moe_shape of a layer."""
    shape = ffi.new("fomoe_moe_shape *")
    shape.num_experts, shape.top_k = spec.num_experts, spec.top_k
    shape.hidden, shape.ff = spec.hidden, spec.ff
    shape.gate_type, shape.up_type = spec.gate_type.id, spec.up_type.id
    shape.down_type = spec.down_type.id
    shape.gate_row_bytes = spec.gate_type.row_bytes(spec.hidden)
    shape.up_row_bytes = spec.up_type.row_bytes(spec.hidden)
    shape.down_row_bytes = spec.down_type.row_bytes(spec.ff)
    return shape


class MoeEngine:
    """What the calls of one CpuOps share: threads, memory, and which call is the live one."""

    def __init__(self, pool: Any, serial: Any, views: Views, max_tokens: int) -> None:
        self.views = views
        self.max_tokens = max_tokens
        self.memory = Scratch()
        self.live: CpuMoeCall | None = None
        self.routed: tuple[Any, Any, Any, Any] = (None, None, None, None)
        self._pools = pool, serial
        self._layers: list[Any] = []  # C structs that hold the memory's pointer

    def reserve(self, num_bytes: int) -> None:
        """Memory of at least num_bytes, for the plans that exist as well."""
        if self.memory.reserve(num_bytes):
            for layer in self._layers:
                layer.memory = self.memory.pointer

    def plan(self, num_threads: int, spec: MoeSpec, shared: SharedExpert | None) -> MoePlan:
        plan = MoePlan(spec, shared)
        layer = plan.layer
        layer.pool, layer.serial = self._pools
        self._layers.append(layer)
        size = (num_threads, self.max_tokens)
        self.reserve(lib.fomoe_moe_bytes(*size, moe_shape(spec), layer.shared_ff))
        layer.memory = self.memory.pointer
        return plan

    def pick_pointers(self, routing: Routing, shape: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
        """ids and weights as contiguous arrays of that shape, and their C pointers. What route made
        is known; what took its place is checked."""
        routed = self.routed
        if routing.ids is routed[0] and routing.weights is routed[1]:
            return routed
        assert routing.ids.shape == routing.weights.shape == shape
        ids = np.ascontiguousarray(routing.ids, np.int32)
        weights = np.ascontiguousarray(routing.weights, np.float32)
        return ids, weights, ffi.from_buffer(_IDS, ids), ffi.from_buffer(_FLOATS, weights)


class MoePlan:
    """What stays the same from step to step for the experts of one layer: the C struct `layer`, and
    room for the experts of a run."""

    __slots__ = ("experts", "keep", "layer", "shape_key")

    def __init__(self, spec: MoeSpec, shared: SharedExpert | None) -> None:
        self.keep = (spec, shared)
        self.shape_key = (spec.top_k, spec.hidden)
        self.experts = ffi.new("int64_t[]", 4 * spec.num_experts)
        layer = self.layer = ffi.new("fomoe_moe_layer *")
        layer.shape = moe_shape(spec)[0]
        if shared is not None:
            gate, up, down, scale = shared
            layer.shared_ff = gate.rows
            gate.fill(layer.shared_gate)
            up.fill(layer.shared_up)
            down.fill(layer.shared_down)
            if scale is not None:
                scale.fill(layer.shared_scale)


class CpuMoeCall:
    """fomoe.kernels.ops.MoeCall. The other threads compute the shared expert from the beginning."""

    __slots__ = ("_engine", "_keep", "_moe", "_plan", "_routing")

    def __init__(self, engine: MoeEngine, plan: MoePlan, routing: Routing) -> None:
        h = engine.views.of(routing.h)
        assert h.cols == plan.shape_key[1]
        assert h.rows <= engine.max_tokens, (h.rows, engine.max_tokens)
        self._engine, self._plan, self._routing = engine, plan, routing
        self._keep: tuple[Any, ...] = ()  # of the picks, once they are told
        self._moe = lib.fomoe_moe_begin(plan.layer, h.pointer, h.ld, h.rows)
        engine.live = self

    def _pick(self) -> None:
        routing = self._routing
        shape = (len(routing.h), self._plan.shape_key[0])
        self._keep = picks = self._engine.pick_pointers(routing, shape)
        lib.fomoe_moe_pick(self._moe, picks[2], picks[3])

    def run(self, experts: Sequence[tuple[int, int, int, int]]) -> None:
        assert self._engine.live is self
        if not self._keep:
            self._pick()
        array, num = self._plan.experts, len(experts)
        array[0 : 4 * num] = list(chain.from_iterable(experts))
        rc = lib.fomoe_moe_run(self._moe, array, num)
        assert rc == 0, f"an expert was given twice or does not exist: {experts}"

    def run_table(self, table: npt.NDArray[np.int64]) -> None:
        """As in fomoe.kernels.device.DeviceMoeCall, for a device that threads of the host are."""
        picked = np.unique(self._routing.ids)
        here = picked[table[picked, 0] != 0].tolist()
        self.run([(e, *table[e].tolist()) for e in here])

    def finish(self, x: F32Array) -> None:
        assert self._engine.live is self
        view = self._engine.views.of(x)
        missing = lib.fomoe_moe_finish(self._moe, view.pointer, view.ld)
        assert missing == 0, f"{missing} picks have no output: an expert never ran"
        self._engine.live = None

    def finish_some(self, x: F32Array) -> None:
        """As finish, with the picks whose experts have run: others are computed elsewhere."""
        assert self._engine.live is self
        if not self._keep:
            self._pick()
        view = self._engine.views.of(x)
        lib.fomoe_moe_finish_some(self._moe, view.pointer, view.ld)
        self._engine.live = None
