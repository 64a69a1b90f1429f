"""An array in a device's memory that the host keeps: which experts its kernels find, and where.

Owns: the order in which the host's changes are seen. Does not know: what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from fomoe.kernels.device import Device
from fomoe.kernels.ops import A


class DeviceTable:
    """`array` is the device's. The host writes to `mirror`, and publish() queues what it has become
    for the kernels that are queued after it; until they have begun it may not be written to."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.array: A = device.array(shape, dtype)
        self.mirror: npt.NDArray[Any] = device.host_array(shape, dtype)
        self._device = device
        self._changed = False

    def __setitem__(self, index: Any, value: Any) -> None:
        self.mirror[index] = value
        self._changed = True

    def publish(self) -> None:
        if self._changed:
            device, mirror = self._device, self.mirror
            device.compute.copy(device.address(self.array), mirror.ctypes.data, mirror.nbytes)
            self._changed = False
