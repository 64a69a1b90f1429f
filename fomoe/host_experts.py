"""The processor as a device's helper: it computes experts where they lie in host memory.

Owns: the mailbox that a layer's input comes in by, and the sum that goes back. Does not know: which
experts are left to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fomoe.experts.layer import Resident
from fomoe.kernels.cpu import CpuOps
from fomoe.kernels.cpu_moe import CpuMoeCall
from fomoe.kernels.device import Device
from fomoe.kernels.ops import MoeSpec, Routing

F32Array = npt.NDArray[np.float32]


class HostExperts:
    """One device's helper. `ops` is shared by all devices' helpers: layers take turns."""

    def __init__(self, ops: CpuOps, device: Device, hidden: int) -> None:
        shape = (ops.max_tokens, hidden)
        self._ops = ops
        self.h: F32Array = device.host_array(shape, np.float32)
        self.partial: F32Array = device.host_array(shape, np.float32)
        self._call: CpuMoeCall | None = None
        self._tokens = 0

    def begin(self, spec: MoeSpec, routing: Routing) -> None:
        """A layer's turn, its input being in `h`: no expert has been computed."""
        self._tokens = len(routing.ids)
        own = Routing(
            h=self.h[: self._tokens],
            logits=routing.logits,
            ids=np.ascontiguousarray(routing.ids),
            weights=np.ascontiguousarray(routing.weights),
        )
        self._call = self._ops.moe(spec, own, None)

    def run(self, experts: Sequence[Resident]) -> None:
        """Compute experts, at addresses of host memory."""
        assert self._call is not None
        self._call.run(experts)

    def finish(self) -> None:
        """Their weighted sum, in rank order, is in `partial`."""
        assert self._call is not None
        out = self.partial[: self._tokens]
        out[...] = 0
        self._call.finish_some(out)
        self._call = None
