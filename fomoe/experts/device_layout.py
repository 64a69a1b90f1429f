"""Where an expert lies in a slot of a device: the bare matrices, each aligned for wide loads.

Owns: sizes and offsets. Does not know: files, who stays, how bytes are copied.
"""

from __future__ import annotations

from fomoe.experts.layer import Resident
from fomoe.experts.layout import ExpertLayout
from fomoe.kernels.device import DEVICE_ALIGNMENT


class DeviceLayout:
    """Gate, up and down of one expert of a layer, one after the other."""

    def __init__(self, layout: ExpertLayout) -> None:
        self.sizes = layout.matrix_bytes
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + -(-size // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT)
        self._starts = tuple(starts[:3])
        self.slot_bytes = starts[3]
        self.expert_bytes = sum(self.sizes)

    def resident(self, expert: int, slot: int) -> Resident:
        """The expert in a slot of the device, as its kernels take it."""
        gate, up, down = self._starts
        return expert, slot + gate, slot + up, slot + down

    def copies(self, expert: Resident, slot: int) -> list[tuple[int, int, int]]:
        """(target, source, bytes) that bring an expert of host memory into a slot."""
        return [
            (slot + start, source, size)
            for start, source, size in zip(self._starts, expert[1:], self.sizes, strict=True)
        ]
