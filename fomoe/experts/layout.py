"""Where an expert lies: in the file, and in a slot of memory.

Owns: the arithmetic between (layer, expert), byte ranges of files, and addresses inside a slot.
Does not know: who stays in memory, how bytes are read.

A slot holds the slices of one expert one after the other, each in a region that starts at a
multiple of the alignment and has room for the slice's aligned superset, so that a direct read lands
where compute takes it: at the region's start plus the residue of the slice's file offset.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fomoe.gguf import ExpertTensors
from fomoe.io.files import superset
from fomoe.io.reader import Extent

REGION_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class SliceLayout:
    """One of an expert's matrices: `nbytes` at `offset + expert * nbytes` of file `shard`, read
    into the slot at `region`.
    """

    shard: int
    offset: int
    nbytes: int
    region: int


class ExpertLayout:
    """The experts of one layer: their extents, and where in a slot their matrices start."""

    def __init__(self, tensors: ExpertTensors, alignment: int) -> None:
        assert REGION_ALIGNMENT % alignment == 0
        self.alignment = alignment
        self.num_experts = tensors.num_experts
        slices: list[SliceLayout] = []
        region = 0
        parts = (
            (tensors.gate_up, tensors.down)
            if tensors.gate_up is not None
            else (tensors.gate, tensors.up, tensors.down)
        )
        for tensor in parts:
            assert tensor is not None
            nbytes = tensor.nbytes // tensors.num_experts
            slices.append(SliceLayout(tensor.shard, tensor.offset, nbytes, region))
            # Room for any drive's alignment: how many experts fit does not depend on the drive.
            region += max(
                superset(tensor.offset + e * nbytes, nbytes, REGION_ALIGNMENT)[1]
                for e in _representatives(tensors.num_experts, nbytes, REGION_ALIGNMENT)
            )
        self.slices = tuple(slices)
        self.slot_bytes = region
        self.expert_bytes = sum(s.nbytes for s in slices)
        self._fused_up = slices[0].nbytes // 2 if tensors.gate_up is not None else None

    @property
    def matrix_bytes(self) -> tuple[int, int, int]:
        """Bytes of gate, up and down."""
        sizes = [s.nbytes for s in self.slices]
        if self._fused_up is not None:
            sizes[:1] = [self._fused_up, self._fused_up]
        return sizes[0], sizes[1], sizes[2]

    def extents(self, expert: int, slot_address: int) -> list[Extent]:
        """What to read for an expert, aligned for direct I/O."""
        result = []
        for s in self.slices:
            offset = s.offset + expert * s.nbytes
            start, length, residue = superset(offset, s.nbytes, self.alignment)
            address = slot_address + s.region
            result.append(Extent(s.shard, start, length, address, residue + s.nbytes))
        return result

    def addresses(self, expert: int, slot_address: int) -> tuple[int, int, int]:
        """Where gate, up and down of an expert start once it has been read into a slot."""
        starts = [
            slot_address + s.region + (s.offset + expert * s.nbytes) % self.alignment
            for s in self.slices
        ]
        if self._fused_up is not None:
            return starts[0], starts[0] + self._fused_up, starts[1]
        return starts[0], starts[1], starts[2]


def _representatives(num_experts: int, nbytes: int, alignment: int) -> Iterable[int]:
    """Experts whose slices show every residue: those repeat after `alignment` experts."""
    return range(1 if nbytes % alignment == 0 else min(num_experts, alignment))
