"""Cache-aware routing of one layer on its device: what stand-ins are chosen by.

Owns: telling the device, in the order of its work. Does not know: what is available, and how stand-
ins are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fomoe.experts.cache import BoolArray
from fomoe.experts.car_options import CarOptions
from fomoe.experts.device_rule import device_rule
from fomoe.experts.device_table import DeviceTable
from fomoe.kernels.device import LIMIT_BYTES, Device, DeviceOps, StandInRule
from fomoe.kernels.ops import MoeSpec


class DeviceOffer:
    """`stand_ins` is for the device's router, once `make` has been called: work for its stream."""

    def __init__(self, device: Device, ops: DeviceOps, spec: MoeSpec, rule: StandInRule) -> None:
        self._table = DeviceTable(device, (LIMIT_BYTES + spec.num_experts,), np.uint8)
        self._made = ops, spec, rule
        self.stand_ins: Any = None

    def make(self) -> None:
        ops, spec, rule = self._made
        self.stand_ins = ops.stand_ins(spec, rule, self._table.array)

    def offer(self, available: BoolArray, limit: float) -> None:
        """Stand-ins of the step that is queued from here on may be these experts, bool [experts]:
        no use of theirs would stall. `limit`: of the rule, as it is now."""
        table, now = self._table, np.array([limit, 0.0]).view(np.uint8)
        if not np.array_equal(table.mirror[:LIMIT_BYTES], now):
            table[:LIMIT_BYTES] = now
        if not np.array_equal(table.mirror[LIMIT_BYTES:], available):
            table[LIMIT_BYTES:] = available
        table.publish()


def make_offers(
    device: Device, ops: DeviceOps, options: CarOptions, layers: Mapping[int, MoeSpec]
) -> dict[int, DeviceOffer]:
    """Those of a device's layers, while loading; none where cache-aware routing is off."""
    if options.rule == "off":
        return {}
    made = {}
    for layer, spec in layers.items():
        made[layer] = DeviceOffer(device, ops, spec, device_rule(options, spec.top_k))
        device.compute.call(made[layer].make)
    device.synchronize()
    return made
