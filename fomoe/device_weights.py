"""Dense weights in the memory of devices, read through a little memory of the host.

Owns: reading the tensors that every token needs into the devices that need them. Does not know:
experts, what the tensors mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fomoe.gguf import GgufFile, TensorInfo
from fomoe.io.arena import Arena
from fomoe.io.files import superset
from fomoe.io.reader import Extent, Reader
from fomoe.kernels.device import DEVICE_ALIGNMENT, Device, Event
from fomoe.kernels.ops import Tensor
from fomoe.weights import Progress, read

# Read and copied at a time: one such piece is read while the one before it is copied.
PIECE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a tensor: what is read, and where those of its bytes that count go."""

    name: str
    extent: Extent
    residue: int  # from the extent's start to the first byte that counts
    nbytes: int
    device: Device
    target: int


class DeviceWeights:
    """A models.WeightSource whose tensors are arrays of devices. `owner` says of a tensor's name
    which device has it; `bounce` is memory of the host, `bounce_bytes` long."""

    def __init__(
        self,
        gguf: GgufFile,
        names: Collection[str],
        owner: Callable[[str], Device],
        arena: Arena,
        alignment: int,
    ) -> None:
        # In the order of the file, so that the drive reads straight through.
        infos = sorted((gguf.tensors[n] for n in names), key=lambda t: (t.shard, t.offset))
        self._alignment = alignment
        self._infos = infos
        self._owner = owner
        self.bounce_bytes = bounce_bytes(infos, alignment)
        self.bounce = arena.allocate(self.bounce_bytes)
        self._tensors: dict[str, Tensor] = {}
        self._devices = list(dict.fromkeys(owner(info.name) for info in infos))
        for device in self._devices:
            self._allocate(device, [info for info in infos if owner(info.name) is device])

    def _allocate(self, device: Device, infos: Sequence[TensorInfo]) -> None:
        """One piece of memory for all of a device's: those who give it out round up what is large,
        by as much as a megabyte a tensor."""
        starts = [0]
        for info in infos:
            starts.append(starts[-1] + -(-info.nbytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT)
        memory = device.array((starts[-1],), np.uint8)
        for info, start in zip(infos, starts, strict=False):
            data = memory[start : start + info.nbytes]
            self._tensors[info.name] = Tensor(
                name=info.name, type=info.type, shape=info.shape, data=data
            )

    async def load(
        self,
        reader: Reader,
        reached: Callable[[Device, Event], Any],
        progress: Progress | None = None,
    ) -> float:
        """Read all tensors, and wait until they are there; returns the rate in GB/s. `progress`
        (done, total) is told of bytes, `reached(device, event)` waits."""
        total = sum(info.nbytes for info in self._infos)
        done, begin = 0, time.perf_counter()
        copied: list[list[tuple[Device, Event]]] = [[], []]
        try:
            for n, group in enumerate(self._groups()):
                half = n % 2
                for device, event in copied[half]:
                    await reached(device, event)
                extents = [[piece.extent] for piece in group]
                await read(reader, extents, [f"tensor {piece.name}" for piece in group])
                for piece in group:
                    source = piece.extent.address + piece.residue
                    piece.device.uploads.copy(piece.target, source, piece.nbytes)
                    done += piece.nbytes
                copied[half] = [(d, d.uploads.record()) for d in self._devices]
                if progress:
                    progress(done, total)
        finally:
            for device in self._devices:
                await reached(device, device.uploads.record())
        return total / max(time.perf_counter() - begin, 1e-9) / 1e9

    def _groups(self) -> Iterator[list[_Piece]]:
        """Pieces in the order of the file, as many as fit into a half of the bounce memory."""
        group: list[_Piece] = []
        half = used = 0
        room = self.bounce_bytes // 2
        for info in self._infos:
            for offset, length, residue, nbytes, start in _cuts(info, self._alignment):
                if used + length > room:
                    yield group
                    group, half, used = [], 1 - half, 0
                address = self.bounce + half * room + used
                device = self._owner(info.name)
                target = device.address(self._tensors[info.name].data) + start
                extent = Extent(info.shard, offset, length, address, residue + nbytes)
                group.append(_Piece(info.name, extent, residue, nbytes, device, target))
                used += -(-length // 4096) * 4096
        if group:
            yield group

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def bounce_bytes(infos: Iterable[TensorInfo], alignment: int) -> int:
    """Host memory through which these tensors go to their devices."""
    most = sum(-(-superset(i.offset, i.nbytes, alignment)[1] // 4096) * 4096 for i in infos)
    return 2 * min(most, PIECE_BYTES)


def _cuts(info: TensorInfo, alignment: int) -> Iterator[tuple[int, int, int, int, int]]:
    """A tensor's aligned superset, cut: (offset in the file, length, residue, bytes that count,
    where those begin in the tensor) of each piece."""
    offset, length, residue = superset(info.offset, info.nbytes, alignment)
    for begin in range(0, length, PIECE_BYTES):
        piece = min(PIECE_BYTES, length - begin)
        first, last = max(begin, residue), min(begin + piece, residue + info.nbytes)
        if first < last:
            yield offset + begin, piece, first - begin, last - first, first - residue
