"""Dense weights in memory, and rows of the token embedding from the file.

Owns: reading the tensors that every token needs, once, at load, and embedding rows as they are
needed. Does not know: experts, what the tensors mean.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from fomoe.errors import ReadError
from fomoe.gguf import GgufFile, TensorInfo
from fomoe.io.arena import Arena
from fomoe.io.files import superset
from fomoe.io.reader import Extent, Priority, Reader, ReadRequest
from fomoe.kernels.ops import Tensor
from fomoe.memory import prepare

# Rows of the embedding that are kept decoded from the drive: text repeats its words.
_KEPT_ROWS = 4096

# What is made ready before its reads begin: the first of them should not wait for more.
_GROUP_BYTES = 64 << 20

Progress = Callable[[int, int], None]


def region_bytes(info: TensorInfo, alignment: int) -> int:
    """Memory that a tensor takes when it is read by its aligned superset."""
    return superset(info.offset, info.nbytes, alignment)[1]


async def read(
    reader: Reader,
    extents: Sequence[Sequence[Extent]],
    what: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read groups of extents on demand and wait for all. Raises ReadError for the first that fails.
    `progress` is told of bytes that landed. The memory stays the reader's until the kernel
    is done with it, also when the caller is cancelled: it must not be reused before the reader is
    idle.
    """
    loop = asyncio.get_running_loop()
    landed: asyncio.Future[None] = loop.create_future()
    left = len(extents)

    def done(request: ReadRequest) -> None:
        nonlocal left
        left -= 1
        if landed.done():
            return
        if request.error is not None or request.cancelled:
            cause = request.error or "the read was cancelled"
            landed.set_exception(ReadError(f"{request.what}: {cause}"))
            return
        if progress:
            progress(sum(e.length for e in request.extents))
        if left == 0:
            landed.set_result(None)

    requests = [
        ReadRequest(extents=group, done=done, what=name)
        for group, name in zip(extents, what, strict=True)
    ]
    reader.submit(requests, Priority.DEMAND)
    if requests:
        await landed


class DenseWeights:
    """Tensors held in the arena for as long as the engine lives; a models.WeightSource."""

    def __init__(
        self, gguf: GgufFile, names: Collection[str], arena: Arena, alignment: int
    ) -> None:
        # In the order of the file, so that the drive reads straight through.
        infos = sorted((gguf.tensors[n] for n in names), key=lambda t: (t.shard, t.offset))
        self._arena = arena
        self._extents: dict[str, Extent] = {}
        self._tensors: dict[str, Tensor] = {}
        for info in infos:
            offset, length, residue = superset(info.offset, info.nbytes, alignment)
            address = arena.allocate(length)
            self._extents[info.name] = Extent(
                info.shard, offset, length, address, residue + info.nbytes
            )
            self._tensors[info.name] = Tensor(
                name=info.name,
                type=info.type,
                shape=info.shape,
                data=arena.view(address + residue, info.nbytes),
            )

    async def load(self, reader: Reader, progress: Progress | None = None) -> float:
        """Read all tensors; returns the rate in GB/s. `progress(done, total)` is told of bytes."""
        total = sum(e.length for e in self._extents.values())
        done = 0

        def landed(request_bytes: int) -> None:
            nonlocal done
            done += request_bytes
            if progress:
                progress(done, total)

        begin = time.perf_counter()
        # While one group is read, the memory of the next is made ready.
        try:
            async with asyncio.TaskGroup() as reads:
                for group in self._groups():
                    first, last = group[0][1], group[-1][1]
                    length = last.address + last.length - first.address
                    await prepare(self._arena, reader, first.address, length)
                    names = [f"tensor {name}" for name, _ in group]
                    reads.create_task(read(reader, [[e] for _, e in group], names, landed))
        except BaseExceptionGroup as group_of_errors:
            raise group_of_errors.exceptions[0] from None
        return total / max(time.perf_counter() - begin, 1e-9) / 1e9

    def _groups(self) -> Iterator[list[tuple[str, Extent]]]:
        """Tensors in the order of the file, at most twice _GROUP_BYTES at a time."""
        group: list[tuple[str, Extent]] = []
        for name, whole in self._extents.items():
            for extent in _pieces(whole):
                group.append((name, extent))
                if extent.address + extent.length - group[0][1].address >= _GROUP_BYTES:
                    yield group
                    group = []
        if group:
            yield group

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def _pieces(extent: Extent) -> Iterator[Extent]:
    """An extent cut every _GROUP_BYTES: the head of a large model alone has a gigabyte."""
    for begin in range(0, extent.length, _GROUP_BYTES):
        length = min(_GROUP_BYTES, extent.length - begin)
        needed = min(length, extent.needed - begin)
        yield Extent(extent.file, extent.offset + begin, length, extent.address + begin, needed)


class EmbeddingRows:
    """Rows of token_embd as they lie in the file, for up to `max_tokens` tokens of a step.

    Not loaded: a row of a large model is a few KB, its table a GB. `resident` is the table itself
    where it is in memory all the same: tied to the output head, or held beside every expert.
    """

    def __init__(
        self,
        info: TensorInfo,
        max_tokens: int,
        arena: Arena,
        reader: Reader,
        resident: Tensor | None,
    ) -> None:
        self.info = info
        self._row_bytes = info.type.row_bytes(info.shape[-1])
        self._reader = reader
        self._arena = arena
        self._resident: npt.NDArray[np.uint8] | None = (
            resident.data.reshape(-1, self._row_bytes) if resident else None
        )
        self._room = embedding_row_room(info)
        self._base = 0 if resident else arena.allocate(self._room * max_tokens)
        self._kept: OrderedDict[int, npt.NDArray[np.uint8]] = OrderedDict()

    def must_read(self, ids: Sequence[int]) -> bool:
        """Whether rows(ids) would wait for the drive."""
        return self._resident is None and any(i not in self._kept for i in ids)

    async def rows(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """uint8 [len(ids), row_bytes]. Raises ReadError."""
        if self._resident is not None:
            return self._resident[ids]
        missing = [i for i in dict.fromkeys(ids) if i not in self._kept]
        if missing:
            await self._read(missing)
        result = (
            self._kept[ids[0]] if len(ids) == 1 else np.concatenate([self._kept[i] for i in ids])
        )
        for i in ids:
            self._kept.move_to_end(i)
        while len(self._kept) > _KEPT_ROWS:
            self._kept.popitem(last=False)
        return result

    async def _read(self, ids: Sequence[int]) -> None:
        extents, places = [], []
        for n, i in enumerate(ids):
            offset = self.info.offset + i * self._row_bytes
            start, length, residue = superset(offset, self._row_bytes, self._reader.alignment)
            address = self._base + n * self._room
            extents.append(
                Extent(self.info.shard, start, length, address, residue + self._row_bytes)
            )
            places.append(address + residue)
        await read(self._reader, [extents], [f"tensor {self.info.name}"])
        for i, place in zip(ids, places, strict=True):
            self._kept[i] = self._arena.view(place, self._row_bytes).reshape(1, -1).copy()


def embedding_row_room(info: TensorInfo) -> int:
    """Bytes that one row's aligned superset may take."""
    return (-(-info.type.row_bytes(info.shape[-1]) // 4096) + 1) * 4096
