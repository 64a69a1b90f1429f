"""A reader, an arena and a file of known bytes for the tests of fomoe.io."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from fomoe.io.arena import Arena
from fomoe.io.files import Direct, superset
from fomoe.io.open import Io, open_reader
from fomoe.io.queued import ReadOptions
from fomoe.io.reader import Extent, Priority, Reader, ReadRequest

SMALL = ReadOptions(read_bytes=32768, depth=4, background_read_bytes=16384, background_depth=2)


def write_bytes(path: Path, size: int, seed: int = 0) -> np.ndarray:
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    path.write_bytes(data.tobytes())
    return data


class Rig:
    """Reads byte ranges of files and gives back their bytes."""

    def __init__(self, reader: Reader, arena: Arena) -> None:
        self.reader = reader
        self.arena = arena

    def request(
        self, ranges: list[tuple[int, int, int]], what: str = ""
    ) -> tuple[ReadRequest, list[np.ndarray], asyncio.Future[ReadRequest]]:
        """A request for (file, offset, length) ranges, where their bytes will be, its future."""
        extents, views = [], []
        for file, offset, length in ranges:
            around = superset(offset, length, self.reader.alignment)
            address = self.arena.allocate(around.length)
            views.append(self.arena.view(address + around.residue, length))
            extents.append(
                Extent(file, around.offset, around.length, address, around.residue + length)
            )
        landed: asyncio.Future[ReadRequest] = asyncio.get_running_loop().create_future()
        return ReadRequest(extents, landed.set_result, what), views, landed

    async def read(
        self, ranges: list[tuple[int, int, int]], priority: Priority = Priority.DEMAND
    ) -> list[np.ndarray]:
        request, views, landed = self.request(ranges)
        self.reader.submit([request], priority)
        assert await asyncio.wait_for(landed, 20) is request
        if request.error is not None:
            raise request.error
        return views


@asynccontextmanager
async def open_rig(
    paths: list[Path],
    io: Io,
    direct: Direct = "auto",
    options: ReadOptions = SMALL,
    arena_bytes: int = 8 << 20,
    replicas: Sequence[Path] = (),
) -> AsyncIterator[Rig]:
    loop = asyncio.get_running_loop()
    arena = Arena(arena_bytes)
    reader = open_reader(paths, loop=loop, io=io, direct=direct, options=options, replicas=replicas)
    arena.attach(reader)
    try:
        yield Rig(reader, arena)
    finally:
        await reader.close()
        arena.close()
