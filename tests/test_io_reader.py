"""Both ways of reading, on real files: the same tests for the ring and for the threads."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import select
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from io_rig import SMALL, open_rig, write_bytes

from fomoe.errors import ClosedError
from fomoe.io.reader import Extent, Priority, ReadRequest

IOS = ["uring", "threads"]
WAYS = [(io, direct) for io in IOS for direct in ("on", "off")]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS])
def way(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.param


@pytest.fixture(params=IOS)
def io(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_every_residue_at_the_end_of_a_ragged_file(tmp_path: Path, way: tuple[Any, Any]) -> None:
    size = 3 * 4096 + 1234
    data = write_bytes(tmp_path / "a", size)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], *way, arena_bytes=128 << 20) as rig:
            step = 61 if way[1] == "on" else 401
            for begin in range(0, 4096 + 1, step):
                for end in (size, size - 1, begin + 1, 4096):
                    if end > begin:
                        (view,) = await rig.read([(0, begin, end - begin)])
                        assert np.array_equal(view, data[begin:end]), (begin, end)

    run(check())


def test_thousands_of_random_reads(tmp_path: Path, way: tuple[Any, Any]) -> None:
    sizes = [300_001, 1_000_000, 77_777]
    datas = [write_bytes(tmp_path / str(i), size, i) for i, size in enumerate(sizes)]
    rng = np.random.default_rng(5)

    async def check() -> None:
        paths = [tmp_path / str(i) for i in range(3)]
        async with open_rig(paths, *way, arena_bytes=160 << 20) as rig:
            assert rig.reader.register_memory(rig.arena.address, 40 << 20) == (way[0] == "uring")
            for _ in range(20):
                batch = []
                for _ in range(50):
                    ranges = []
                    for _ in range(int(rng.integers(1, 4))):
                        file = int(rng.integers(3))
                        offset = int(rng.integers(sizes[file]))
                        length = int(rng.integers(1, min(100_000, sizes[file] - offset) + 1))
                        ranges.append((file, offset, length))
                    batch.append((ranges, *rig.request(ranges)))
                half = len(batch) // 2
                rig.reader.submit([entry[1] for entry in batch[:half]])
                rig.reader.submit([entry[1] for entry in batch[half:]], Priority.BACKGROUND)
                for ranges, request, views, landed in batch:
                    await asyncio.wait_for(landed, 20)
                    assert request.error is None
                    assert 0 < request.queued_ns <= request.submitted_ns <= request.landed_ns
                    for (file, offset, length), view in zip(ranges, views, strict=True):
                        assert np.array_equal(view, datas[file][offset : offset + length])
                rig.arena.used = 0  # all have landed: the next batch takes the same memory
            assert rig.reader.stats.reads == 1000
            assert rig.reader.stats.in_flight_bytes == 0
            assert rig.reader.idle()

    run(check())


def test_regions_registered_in_parts_may_split_a_read(tmp_path: Path) -> None:
    data = write_bytes(tmp_path / "a", 1 << 20)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], "uring", "on") as rig:
            for part in (3, 0, 1):  # not in order, not all
                assert rig.reader.register_memory(rig.arena.address + part * 102_400, 102_400)
            (view,) = await rig.read([(0, 0, 1 << 20)])
            assert np.array_equal(view, data)
            assert "memory registered: 0 MiB so far" in rig.reader.describe()

    run(check())


def test_a_file_that_shrinks_is_an_error(tmp_path: Path, way: tuple[Any, Any]) -> None:
    write_bytes(tmp_path / "a", 200_000)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], *way) as rig:
            os.truncate(tmp_path / "a", 100_001)
            request, _, landed = rig.request(
                [(0, 0, 1000), (0, 50_000, 120_000)], "layer 3 expert 7"
            )
            rig.reader.submit([request])
            await landed
            assert request.error is not None
            assert request.error.errno == errno.ENODATA
            assert request.error.filename == str(tmp_path / "a")
            for part in ("layer 3 expert 7", "100001 bytes", "offset"):
                assert part in str(request.error)
            assert rig.reader.stats.errors == 1
            await rig.read([(0, 0, 100_001)])

    run(check())


def test_a_waiting_read_can_be_cancelled_and_one_in_flight_runs_to_its_end(
    tmp_path: Path, way: tuple[Any, Any]
) -> None:
    data = write_bytes(tmp_path / "a", 4 << 20)

    async def check() -> None:
        options = replace(SMALL, depth=1)
        async with open_rig([tmp_path / "a"], *way, options=options, arena_bytes=64 << 20) as rig:
            entries = [rig.request([(0, i << 18, 1 << 18)]) for i in range(16)]
            rig.reader.submit([entry[0] for entry in entries])
            taken_back = [rig.reader.cancel(entry[0]) for entry in entries]
            assert taken_back[-1] or way[1] == "off"  # 4 MiB of page cache may be faster
            for (request, views, landed), cancelled in zip(entries, taken_back, strict=True):
                assert cancelled == request.cancelled
                assert not cancelled or landed.done()
                await landed
                assert request.error is None
                if cancelled:
                    assert not views[0].any(), "cancelled, and written to"
                else:
                    at = entries.index((request, views, landed)) << 18
                    assert np.array_equal(views[0], data[at : at + (1 << 18)])
            assert rig.reader.idle()
            assert not rig.reader.cancel(entries[0][0])

    run(check())


def test_close_waits_for_what_is_in_flight(tmp_path: Path, way: tuple[Any, Any]) -> None:
    write_bytes(tmp_path / "a", 4 << 20)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], *way, arena_bytes=64 << 20) as rig:
            entries = [rig.request([(0, 0, 4 << 20)]) for _ in range(8)]
            rig.reader.submit([entry[0] for entry in entries])
            with pytest.raises(AssertionError, match="may still land"):
                rig.arena.close()
            await rig.reader.close()
            assert all(landed.done() for _, _, landed in entries)
            cancelled = [request.cancelled for request, _, _ in entries]
            assert any(cancelled) or way[1] == "off"  # page cache may be faster
            for _, views, _ in entries:
                views[0][:] = 0
            await asyncio.sleep(0.02)
            assert not any(views[0].any() for _, views, _ in entries), "written after close"
            with pytest.raises(ClosedError):
                rig.reader.submit([entries[0][0]])

    run(check())


def test_close_that_is_cancelled_still_waits(tmp_path: Path, way: tuple[Any, Any]) -> None:
    write_bytes(tmp_path / "a", 4 << 20)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], *way, arena_bytes=16 << 20) as rig:
            request, _, landed = rig.request([(0, 0, 4 << 20)])
            rig.reader.submit([request])
            closing = asyncio.ensure_future(rig.reader.close())
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            assert rig.reader.idle()
            assert landed.done()

    run(check())


def test_demand_passes_background(tmp_path: Path, io: Any) -> None:
    data = write_bytes(tmp_path / "a", 4 << 20)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], io, "on", arena_bytes=64 << 20) as rig:
            order: list[str] = []
            back, _, back_landed = rig.request([(0, 0, 4 << 20)], "back")
            soon, _, soon_landed = rig.request([(0, 0, 4 << 20)], "soon")
            front, views, front_landed = rig.request([(0, 0, 4 << 20)], "front")
            for request, landed in (
                (back, back_landed),
                (soon, soon_landed),
                (front, front_landed),
            ):
                landed.add_done_callback(lambda done: order.append(done.result().what))
                assert request.landed_ns == 0
            rig.reader.submit([back, soon], Priority.BACKGROUND)
            assert rig.reader.stats.in_flight_bytes <= 2 * 16384
            rig.reader.submit([front])
            rig.reader.promote(soon)
            await asyncio.gather(back_landed, soon_landed, front_landed)
            await asyncio.sleep(0)
            assert order == ["front", "soon", "back"]
            assert np.array_equal(views[0], data)

    run(check())


def test_a_callback_may_submit_and_may_fail(tmp_path: Path, way: tuple[Any, Any]) -> None:
    data = write_bytes(tmp_path / "a", 100_000)

    async def check() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failures.append(context)
        )
        async with open_rig([tmp_path / "a"], *way, arena_bytes=64 << 20) as rig:
            finished = asyncio.get_running_loop().create_future()
            count = 0

            def landed(request: ReadRequest) -> None:
                nonlocal count
                count += 1
                if count <= 200:
                    rig.reader.submit([ReadRequest(request.extents, landed)])
                elif count == 208:
                    finished.set_result(None)
                raise ValueError("a caller's mistake")

            entries = [rig.request([(0, 0, 10_000)]) for _ in range(8)]
            rig.reader.submit([ReadRequest(request.extents, landed) for request, _, _ in entries])
            await finished
            assert len(failures) == 208
            assert all(np.array_equal(views[0], data[:10_000]) for _, views, _ in entries)

    run(check())


def test_a_broken_alignment_is_our_own_mistake(tmp_path: Path, io: Any) -> None:
    write_bytes(tmp_path / "a", 100_000)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], io, "on") as rig:
            base, block = rig.arena.address, rig.reader.alignment
            for extent in (
                Extent(0, 1, block, base, 1),
                Extent(0, 0, block + 1, base, 1),
                Extent(0, 0, block, base + 1, 1),
                Extent(0, 0, block, base, block + 1),
                Extent(0, 0, block, base, 0),
                Extent(0, -block, block, base, 1),
            ):
                with pytest.raises(AssertionError, match="alignment"):
                    rig.reader.submit([ReadRequest([extent], lambda request: None)])
            assert rig.reader.idle()

    run(check())


class Memory:
    """Two pages of this process as /proc/self/mem shows them: 7s, then nothing (EIO) until it is
    filled. The one file at hand that fails like a bad drive, reads short, and recovers."""

    path = Path("/proc/self/mem")
    begin = 1 << 33  # low: nothing is put there unless asked for
    hole = begin + 4096
    elsewhere = begin + 65536

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        numbers = [ctypes.c_int] * 3
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *numbers, ctypes.c_long]
        self._libc.mremap.restype = ctypes.c_void_p
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._fill(self.begin, 7)

    def fill_hole(self) -> None:
        """At once: a page that is full already moves in."""
        self._fill(self.elsewhere, 42)
        sizes = [ctypes.c_size_t(4096)] * 2
        moved = self._libc.mremap(
            ctypes.c_void_p(self.elsewhere), *sizes, 3, ctypes.c_void_p(self.hole)
        )  # MREMAP_MAYMOVE | MREMAP_FIXED
        assert moved == self.hole

    def _fill(self, address: int, value: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        assert self._libc.mmap(address, 4096, protection, flags, -1, 0) == address
        ctypes.memset(address, value, 4096)

    def close(self) -> None:
        self._libc.munmap(self.begin, 8192)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


def test_eio_is_retried_a_few_times_and_then_reported(io: Any, memory: Memory) -> None:
    async def check() -> None:
        async with open_rig([memory.path], io, "off") as rig:
            request, _, landed = rig.request([(0, memory.begin, 8192)], "layer 1 expert 2")
            rig.reader.submit([request])
            await landed
            assert request.error is not None
            assert request.error.errno == errno.EIO
            assert f"offset {memory.hole} for layer 1 expert 2" in str(request.error)
            assert rig.reader.stats.retries == SMALL.tries - 1
            assert rig.reader.stats.short_reads == 1
            assert rig.reader.stats.errors == 1

    run(check())


def test_a_read_that_was_short_and_recovered_from_eio_is_whole(io: Any, memory: Memory) -> None:
    async def check() -> None:
        options = replace(SMALL, tries=1 << 30)
        async with open_rig([memory.path], io, "off", options) as rig:
            request, views, landed = rig.request([(0, memory.begin + 1, 8191)])
            rig.reader.submit([request])
            while rig.reader.stats.retries == 0:
                await asyncio.sleep(0.001)
                rig.reader.promote(request)
            memory.fill_hole()
            await landed
            assert request.error is None
            assert (views[0][:4095] == 7).all()
            assert (views[0][4095:] == 42).all()
            assert rig.reader.stats.short_reads == 1

    run(check())


def test_on_memory_file_system(io: Any) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no tmpfs at /dev/shm")
    path = shm / f"fomoe-test-{os.getpid()}"
    data = write_bytes(path, 123_457)

    async def check() -> None:
        async with open_rig([path], io) as rig:
            assert rig.reader.register_memory(rig.arena.address, rig.arena.size) == (io == "uring")
            (view,) = await rig.read([(0, 1, 123_456)])
            assert np.array_equal(view, data[1:])

    try:
        run(check())
    finally:
        path.unlink()


def test_landings_may_be_taken_without_the_event_loop(tmp_path: Path, way: tuple[Any, Any]) -> None:
    data = write_bytes(tmp_path / "a", 1 << 20)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], *way) as rig:
            request, views, landed = rig.request([(0, 4097, 100_000)])
            rig.reader.submit([request])
            poll = select.poll()
            poll.register(rig.reader.fileno(), select.POLLIN)
            while not landed.done():  # the loop has no turn meanwhile
                assert poll.poll(20_000)
                rig.reader.land()
            assert np.array_equal(views[0], data[4097:104_097])
            assert rig.reader.idle()

    run(check())


def test_what_waits_is_sent_when_something_has_landed(tmp_path: Path, way: tuple[Any, Any]) -> None:
    data = write_bytes(tmp_path / "a", 4 << 20)

    async def check() -> None:
        options = replace(SMALL, depth=2)
        async with open_rig([tmp_path / "a"], *way, options=options) as rig:
            request, views, landed = rig.request([(0, 4096, 3 << 20)])
            rig.reader.submit([request])
            await asyncio.wait_for(landed, 30)
            assert np.array_equal(views[0], data[4096 : 4096 + (3 << 20)])

    run(check())


def test_an_abandoned_request_reads_no_more_and_is_done_once(
    tmp_path: Path, way: tuple[Any, Any]
) -> None:
    write_bytes(tmp_path / "a", 4 << 20)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], *way, arena_bytes=128 << 20) as rig:
            length = 2 << 20
            entries = [rig.request([(0, i << 16, length)]) for i in range(30)]
            rig.reader.submit([request for request, _, _ in entries])
            for request, _, _ in (entries[0], *entries[:1:-1]):
                rig.reader.abandon(request)
            for request, _, landed in entries:
                await asyncio.wait_for(landed, 20)
                assert request.error is None
            assert not entries[1][0].cancelled
            assert sum(request.cancelled for request, _, _ in entries) > 15
            assert rig.reader.stats.bytes < 15 * length
            assert rig.reader.idle()
            rig.reader.abandon(entries[1][0])  # done already: nothing happens

    run(check())


def test_any_mix_of_submit_cancel_abandon_and_promote(tmp_path: Path, way: tuple[Any, Any]) -> None:
    data = write_bytes(tmp_path / "a", 2 << 20)
    rng = np.random.default_rng(11)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], *way, arena_bytes=64 << 20) as rig:
            for _ in range(10):
                entries: list[Any] = []
                for _ in range(60):
                    choice = rng.integers(6)
                    if choice >= 3 or not entries:
                        offset = int(rng.integers(1 << 20))
                        length = int(rng.integers(1, 200_000))
                        entries.append((offset, length, *rig.request([(0, offset, length)])))
                        rig.reader.submit([entries[-1][2]], Priority(int(rng.integers(2))))
                    elif choice == 1:
                        rig.reader.promote(entries[int(rng.integers(len(entries)))][2])
                    elif choice == 2:
                        rig.reader.abandon(entries[int(rng.integers(len(entries)))][2])
                    else:
                        rig.reader.cancel(entries[int(rng.integers(len(entries)))][2])
                    if rng.integers(8) == 0:
                        await asyncio.sleep(0.0005)
                for offset, length, request, views, landed in entries:
                    await asyncio.wait_for(landed, 20)
                    assert request.error is None
                    if not request.cancelled:
                        assert np.array_equal(views[0], data[offset : offset + length])
                assert rig.reader.idle()
                assert rig.reader.stats.in_flight_bytes == 0
                rig.arena.used = 0

    run(check())


def test_on_uvloop(tmp_path: Path, io: Any) -> None:
    uvloop = pytest.importorskip("uvloop")
    data = write_bytes(tmp_path / "a", 1 << 20)

    async def check() -> None:
        async with open_rig([tmp_path / "a"], io, arena_bytes=32 << 20) as rig:
            for begin in range(0, 900_000, 50_000):
                (view,) = await rig.read([(0, begin, 100_000)])
                assert np.array_equal(view, data[begin : begin + 100_000])

    uvloop.run(check())
