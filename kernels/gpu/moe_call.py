"""The experts of one layer on the device: MoeCall over the kernels of moe.py.

Owns: which picks have been computed, outputs by pick until the sum. Does not know: where experts
come from, slots, streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fomoe.kernels.gpu import moe
from fomoe.kernels.gpu.matmul import group, grouped_down, grouped_gate_up
from fomoe.kernels.gpu.matvec import MAX_TOKENS as MATVEC_TOKENS
from fomoe.kernels.gpu.routing import device_picks, to_device
from fomoe.kernels.gpu.shared import Multiply, SharedExpert, shared_expert
from fomoe.kernels.ops import MoeSpec, Routing


class GpuMoeCall:
    """fomoe.kernels.device.DeviceMoeCall. Addresses are of device memory, 16-byte aligned, and stay
    valid until what is queued here has run.

    The picks are those of `routing` when the first experts are asked for. Whether every one of them
    ran is known where the host gave all experts; a table is read by the device alone.
    """

    def __init__(
        self, spec: MoeSpec, routing: Routing, shared: SharedExpert | None, multiply: Multiply
    ) -> None:
        self._spec, self._routing = spec, routing
        self._h = routing.h
        self._given: set[int] = set()
        self._by_table = False
        self._ids: Any = None
        self._shared = None if shared is None else shared_expert(self._h, shared, multiply)

    def run_table(self, table: Any) -> None:
        """Compute the picks whose expert is in `table` (int64 [experts, 3]), as it is then."""
        self._by_table = True
        self._launch(table)

    def run(self, experts: Sequence[tuple[int, int, int, int]]) -> None:
        numbers = {e for e, *_ in experts}
        assert len(numbers) == len(experts), f"an expert was given twice: {experts}"
        assert not numbers & self._given, f"an expert was given twice: {numbers & self._given}"
        self._given |= numbers
        table = np.zeros((self._spec.num_experts, 3), np.int64)
        for expert, *addresses in experts:
            table[expert] = addresses
        self._launch(to_device(table, self._h.device))

    def finish(self, x: Any) -> None:
        if not self._by_table:
            missing = set(self._routing.ids.ravel().tolist()) - self._given
            assert not missing, f"experts never ran: {sorted(missing)}"
        self.finish_some(x)

    def finish_some(self, x: Any) -> None:
        """As finish, with the picks that were computed here."""
        self._begin()
        shared, gate = self._shared or (None, None)
        moe.combine(x, self._out, self._weights, shared, gate)

    def _begin(self) -> None:
        if self._ids is not None:
            return
        spec, h = self._spec, self._h
        self._ids, self._weights = device_picks(self._routing, h.device)
        picks = self._ids.numel()
        self._groups = group(self._ids, spec.num_experts) if len(h) > MATVEC_TOKENS else None
        self._act = h.new_empty((picks, spec.ff))
        self._out = h.new_zeros((picks, spec.hidden))  # a pick that is not computed adds nothing

    def _launch(self, table: Any) -> None:
        self._begin()
        if self._groups is None:
            moe.gate_up(self._spec, self._h, self._ids, table, self._act)
            moe.down(self._spec, self._act, self._ids, table, self._out)
        else:
            grouped_gate_up(self._spec, self._h, self._groups, table, self._act)
            grouped_down(self._spec, self._act, self._groups, table, self._out)
