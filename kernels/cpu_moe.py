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
        self.pool, self.serial, self.views = pool, serial, views
        self.max_tokens = max_tokens
        self.memory = Scratch()
        self.live: CpuMoeCall | None = None
        self.routed: tuple[Any, Any, Any, Any] = (None, None, None, None)

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
    """What stays the same from step to step for the experts of one layer."""

    __slots__ = (
        "experts", "has_shared", "keep", "num_types", "shape", "shape_key", "shared_ff",
        "shared_products", "types",
    )  # fmt: skip

    def __init__(self, spec: MoeSpec, shared: SharedExpert | None) -> None:
        self.keep: tuple[Any, ...] = (spec, shared)
        self.shape = moe_shape(spec)
        self.shape_key = (spec.top_k, spec.hidden)
        self.experts = ffi.new("int64_t[]", 4 * spec.num_experts)
        self.has_shared = shared is not None
        self.shared_ff = 0
        self.types = ffi.new("int32_t[3]")
        self.num_types = 0
        self.shared_products: tuple[Any, ...] = ()
        if shared is not None:
            products = ffi.new("fomoe_product[4]")
            self.keep += (products,)
            self.shared_products = tuple(products + i for i in range(4))
            self.shared_ff = shared[0].rows
            for product, weight in zip(products, shared, strict=True):
                if weight is not None:
                    weight.fill(product)
            by_h = [w.type_id for w in (shared[0], shared[1], shared[3]) if w is not None]
            self.num_types = len(by_h)
            self.types[0 : len(by_h)] = by_h


class CpuMoeCall:
    """fomoe.kernels.ops.MoeCall."""

    __slots__ = ("_engine", "_keep", "_moe", "_plan", "_shared_left")

    def __init__(self, engine: MoeEngine, plan: MoePlan, routing: Routing) -> None:
        top_k, hidden = plan.shape_key
        h = engine.views.of(routing.h)
        assert h.cols == hidden
        assert h.rows <= engine.max_tokens, (h.rows, engine.max_tokens)
        picks = engine.pick_pointers(routing, (h.rows, top_k))
        self._engine, self._plan = engine, plan
        self._keep = (h, picks)
        self._shared_left = plan.has_shared
        self._moe = lib.fomoe_moe_begin(
            engine.memory.pointer,
            engine.pool,
            engine.serial,
            plan.shape,
            plan.shared_ff,
            plan.types,
            plan.num_types,
            h.pointer,
            h.ld,
            h.rows,
            picks[2],
            picks[3],
        )
        engine.live = self

    def shared(self) -> None:
        """As in MoeCall, on the other threads: it returns before they are done."""
        assert self._engine.live is self
        if self._shared_left:
            lib.fomoe_moe_shared(self._moe, *self._plan.shared_products)
            self._shared_left = False

    def run(self, experts: Sequence[tuple[int, int, int, int]]) -> None:
        assert self._engine.live is self
        array, num = self._plan.experts, len(experts)
        array[0 : 4 * num] = list(chain.from_iterable(experts))
        rc = lib.fomoe_moe_run(self._moe, array, num)
        assert rc == 0, f"an expert was given twice or does not exist: {experts}"

    def run_table(self, table: npt.NDArray[np.int64]) -> None:
        """As in fomoe.kernels.device.DeviceMoeCall, for a device that threads of the host are."""
        picked = np.unique(self._keep[1][0])
        here = picked[table[picked, 0] != 0].tolist()
        self.run([(e, *table[e].tolist()) for e in here])

    def finish(self, x: F32Array) -> None:
        assert self._engine.live is self
        assert not self._shared_left, "finish before the shared expert has run"
        view = self._engine.views.of(x)
        missing = lib.fomoe_moe_finish(self._moe, view.pointer, view.ld)
        assert missing == 0, f"{missing} picks have no output: an expert never ran"
        self._engine.live = None
