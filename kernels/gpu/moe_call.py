"""The experts of one layer on the device: MoeCall over the kernels of moe.py.

Owns: the order of launches, and outputs by pick until the sum. Does not know: where experts come
from, slots, streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from fomoe.kernels.gpu import moe
from fomoe.kernels.gpu.fixed import Beside
from fomoe.kernels.gpu.matmul import group, grouped_down, grouped_gate_up
from fomoe.kernels.gpu.matvec import MAX_TOKENS as MATVEC_TOKENS
from fomoe.kernels.gpu.routing import GpuRouting, to_device
from fomoe.kernels.gpu.shared import Multiply, SharedExpert, shared_expert, shared_sizes
from fomoe.kernels.ops import MoeSpec


def moe_sizes(spec: MoeSpec, shared: SharedExpert | None, tokens: int) -> list[int]:
    """Floats of the parts of the memory that a call of so many tokens works in."""
    picks = tokens * spec.top_k
    own = [picks * spec.ff, picks * spec.hidden]
    return own if shared is None else own + shared_sizes(shared, tokens)


class GpuMoeCall:
    """fomoe.kernels.device.DeviceMoeCall. Addresses are of device memory, 16-byte aligned, and stay
    valid until what is queued here has run. `memory`: float32 of moe_sizes(), its own until the
    sum. `side`: where the shared expert may run. Picks that nobody gave an expert for add
    nothing."""

    def __init__(
        self,
        spec: MoeSpec,
        routing: GpuRouting,
        shared: SharedExpert | None,
        multiply: Multiply,
        memory: Sequence[Any],
        side: Beside | None = None,
    ) -> None:
        self._spec, self._h = spec, routing.h
        self._ids, self._weights = routing.device_ids, routing.device_weights
        picks = self._ids.numel()
        self._act = memory[0].view(picks, spec.ff)
        self._out = memory[1].view(picks, spec.hidden).zero_()
        long = len(self._h) > MATVEC_TOKENS
        self._groups = group(self._ids, spec.num_experts) if long else None
        self._shared: tuple[Any, Any] = (None, None)
        self._side = side
        if shared is not None:
            # Four short kernels, each of which waits for the one before: beside those of the routed
            # experts, which keep the memory busy.
            with side.fork() if side else nullcontext():
                self._shared = shared_expert(self._h, shared, multiply, memory[2:])

    def run_table(self, table: Any) -> None:
        """Compute the picks whose expert is in `table` (int64 [experts, 3]), as it is then."""
        if self._groups is None:
            moe.gate_up(self._spec, self._h, self._ids, table, self._act)
            moe.down(self._spec, self._act, self._ids, table, self._out)
        else:
            grouped_gate_up(self._spec, self._h, self._groups, table, self._act)
            grouped_down(self._spec, self._act, self._groups, table, self._out)

    def start(self, expert: tuple[int, int, int, int]) -> bool:
        """Nothing: run only queues, and takes no time that could be saved."""
        return False

    def run(self, experts: Sequence[tuple[int, int, int, int]]) -> None:
        assert len({e for e, *_ in experts}) == len(experts), f"given twice: {experts}"
        table = np.zeros((self._spec.num_experts, 3), np.int64)
        for expert, *addresses in experts:
            table[expert] = addresses
        self.run_table(to_device(table, self._h.device))

    def finish(self, x: Any) -> None:
        if self._side:
            self._side.join()
        moe.combine(x, self._out, self._weights, *self._shared)

    finish_some = finish
