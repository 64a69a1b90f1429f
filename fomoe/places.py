"""Where layers are computed: a device, its operations, the experts it holds, and the buffers by
which the residual stream and the processor's share come and go.

Owns: those buffers. Does not know: the order of a step, policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomoe.experts.device_offer import DeviceOffer
from fomoe.experts.device_tier import DeviceTier
from fomoe.experts.placement import Costs, LayerPlacement, Side
from fomoe.host_experts import HostExperts
from fomoe.kernels.device import Device, DeviceOps, Event
from fomoe.kernels.ops import A


class Place:
    """One device. `costs`: of its layers' experts. `pinned`: layers whose experts the processor
    computes. `fixed`: nothing that takes its time decides where experts are computed, or who stays.
    `helper`: the processor, where the device cannot read host memory as its own.
    `offers`: of its layers, where cache-aware routing is on."""

    def __init__(
        self,
        device: Device,
        ops: DeviceOps,
        tier: DeviceTier,
        *,
        hidden: int,
        max_tokens: int,
        costs: Mapping[int, Costs],
        pinned: frozenset[int] = frozenset(),
        fixed: bool = False,
        helper: HostExperts | None = None,
        offers: Mapping[int, DeviceOffer] | None = None,
    ) -> None:
        self.device, self.ops, self.tier, self.helper = device, ops, tier, helper
        self._row_bytes = 4 * hidden
        self._x = ops.buffer(max_tokens, hidden)
        self._peek = ops.buffer(max_tokens, hidden)
        self._peek_read: Event | None = None  # after which nothing reads it
        self.partial: A = ops.buffer(max_tokens, hidden) if helper else None
        self._views: dict[int, Any] = {}
        self._costs, self._pinned, self.fixed = costs, pinned, fixed
        self.offers = offers or {}

    def x(self, tokens: int) -> Any:
        """Where the residual stream [tokens, hidden] is while this device computes: the same view
        step after step."""
        if tokens not in self._views:
            self._views.clear()
            self._views[tokens] = self._x[:tokens], self._peek[:tokens]
        return self._views[tokens][0]

    def peek(self, tokens: int) -> Any:
        """A copy of a residual stream, for the router of a layer whose turn has not come."""
        self.x(tokens)
        return self._views[tokens][1]

    def await_peek(self) -> None:
        """What is queued from here on may write to `peek`."""
        if self._peek_read is not None and not self._peek_read.done():
            self.device.compute.wait(self._peek_read)
        self._peek_read = None

    def peeked(self, event: Event) -> None:
        """Nothing reads `peek` after the event."""
        self._peek_read = event

    def bring(self, source: Place, tokens: int) -> None:
        """The residual stream hops here, once the other device has done what it was given."""
        if source is not self:
            self._copy(self._x, source, source._x, tokens, source.device.compute.record())

    def bring_peek(self, source: Place, tokens: int, after: Event) -> None:
        """The other device's `peek`, as it is after an event there, becomes this one's."""
        self.await_peek()
        self._copy(self._peek, source, source._peek, tokens, after)

    def _copy(self, target: Any, source: Place, array: Any, tokens: int, after: Event) -> None:
        compute = self.device.compute
        compute.wait(after)
        nbytes = tokens * self._row_bytes
        compute.copy(self.device.address(target), source.device.address(array), nbytes)

    def placement(self, layer: int, tokens: int) -> LayerPlacement:
        """Where the layer's experts are computed in a step of so many tokens."""
        pinned: Side | None = "host" if layer in self._pinned else None
        return LayerPlacement(self._costs[layer], pinned=pinned, fixed=self.fixed, tokens=tokens)

    def pins(self, layer: int) -> bool:
        """The processor computes the layer's experts, always."""
        return layer in self._pinned
