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
from fomoe.kernels.ops import MoeSpec, Resident, Routing
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

    def __init__(
        self, pool: Any, serial: Any, views: Views, num_threads: int, max_tokens: int
    ) -> None:
        self.views = views
        self.max_tokens = max_tokens
        self.last = ffi.new("fomoe_moe_last *")
        self._num_threads = num_threads
        self.memory = Scratch()
        self.live: CpuMoeCall | None = None  # a later one takes its memory
        self.routed: tuple[Any, Any, Any, Any] = (None, None, None, None)
        self._pools = pool, serial
        self._layers: list[Any] = []  # C structs that hold the memory's pointer

    def reserve(self, num_bytes: int) -> None:
        """Memory of at least num_bytes, for the plans that exist as well."""
        if self.memory.reserve(num_bytes):
            for layer in self._layers:
                layer.memory = self.memory.pointer

    def plan(self, spec: MoeSpec, shared: SharedExpert | None) -> MoePlan:
        plan = MoePlan(spec, shared)
        layer = plan.layer
        layer.pool, layer.serial = self._pools
        self._layers.append(layer)
        size = (self._num_threads, self.max_tokens)
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
    """fomoe.kernels.ops.MoeCall, of a `moe` that C has begun and started: the other threads compute
    the shared expert from then on, and who was known to be in memory."""

    __slots__ = ("_engine", "_moe", "_picks", "_plan", "_routing")

    def __init__(self, engine: MoeEngine, plan: MoePlan, routing: Routing, moe: Any) -> None:
        self._engine, self._plan, self._routing, self._moe = engine, plan, routing, moe
        self._picks: tuple[Any, ...] = ()  # once they are told
        engine.live = self

    @classmethod
    def begin(cls, engine: MoeEngine, plan: MoePlan, routing: Routing) -> CpuMoeCall:
        h = engine.views.of(routing.h)
        assert h.cols == plan.shape_key[1]
        assert h.rows <= engine.max_tokens, (h.rows, engine.max_tokens)
        moe = lib.fomoe_moe_begin(plan.layer, h.pointer, h.ld, h.rows)
        lib.fomoe_moe_start(moe, ffi.NULL)
        return cls(engine, plan, routing, moe)

    def _pick(self) -> tuple[Any, ...]:
        shape = (len(self._routing.h), self._plan.shape_key[0])
        self._picks = self._engine.pick_pointers(self._routing, shape)
        return self._picks

    def _tell(self) -> None:
        _, _, ids, weights = self._pick()
        lib.fomoe_moe_pick(self._moe, ids, weights)

    def _fill(self, experts: Sequence[Resident]) -> Any:
        array = self._plan.experts
        array[0 : 4 * len(experts)] = list(chain.from_iterable(experts))
        return array

    def start(self, expert: Resident) -> bool:
        assert self._engine.live is self
        if not self._picks:
            self._tell()
        return bool(lib.fomoe_moe_start_expert(self._moe, expert))

    def run(self, experts: Sequence[Resident]) -> None:
        assert self._engine.live is self
        if not self._picks:
            self._tell()
        rc = lib.fomoe_moe_run(self._moe, self._fill(experts), len(experts))
        assert rc == 0, f"an expert was given twice or does not exist: {experts}"

    def run_table(self, table: npt.NDArray[np.int64]) -> None:
        """As in fomoe.kernels.device.DeviceMoeCall, for a device that threads of the host are."""
        picked = np.unique(self._routing.ids)
        here = picked[table[picked, 0] != 0].tolist()
        self.run([(e, *table[e].tolist()) for e in here])

    def ending(self, experts: Sequence[Resident]) -> Any:
        """What fomoe_layer_begin takes to run these experts, the last ones, and finish."""
        assert self._engine.live is self
        last = self._engine.last
        last.moe, last.experts, last.num = self._moe, self._fill(experts), len(experts)
        last.ids = ffi.NULL
        if not self._picks:
            _, _, last.ids, last.weights = self._pick()
        return last

    def finish(self, x: F32Array) -> None:
        assert self._engine.live is self
        view = self._engine.views.of(x)
        missing = lib.fomoe_moe_finish(self._moe, view.pointer, view.ld)
        assert missing == 0, f"{missing} picks have no output: an expert never ran"
        self._engine.live = None

    def finish_some(self, x: F32Array) -> None:
        """As finish, with the picks whose experts have run: others are computed elsewhere."""
        assert self._engine.live is self
        if not self._picks:
            self._tell()
        view = self._engine.views.of(x)
        lib.fomoe_moe_finish_some(self._moe, view.pointer, view.ld)
        self._engine.live = None
