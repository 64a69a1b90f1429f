"""Several drives read as one: who reads what, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from io_rig import SMALL, open_rig, write_bytes

from fomoe.errors import ReadError
from fomoe.io.open import open_reader
from fomoe.io.reader import Extent, Priority, ReaderStats, ReadRequest
from fomoe.io.replicas import ReplicaReader, replica_paths


class SlowDrive:
    """A Reader of one piece at a time at a given rate, which fails from some request on.

    Its bytes are its mark, so that it shows who read what.
    """

    def __init__(self, mark: int, bytes_per_second: float, fails_from: int = 1 << 60) -> None:
        self.name = "slow"
        self.direct = True
        self.alignment = 512 * mark
        self.stats = ReaderStats()
        self.mark = mark
        self.fails_from = fails_from
        self.bytes_per_second = bytes_per_second
        self.queues: list[list[ReadRequest]] = [[], []]
        self.running: ReadRequest | None = None
        self.num_started = 0
        self.bytes = 0
        self.stopped = asyncio.Event()
        self.stopped.set()

    def describe(self) -> str:
        return f"drive {self.mark}"

    def register_memory(self, address: int, length: int) -> bool:
        return self.mark == 1

    def submit(self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND) -> None:
        self.queues[priority].extend(requests)
        self._start()

    def _start(self) -> None:
        if self.running is not None or not any(self.queues):
            return
        self.stopped.clear()
        self.running = (self.queues[0] or self.queues[1]).pop(0)
        size = sum(extent.length for extent in self.running.extents)
        asyncio.get_running_loop().call_later(size / self.bytes_per_second, self._land, size)

    def _land(self, size: int) -> None:
        request, self.running = self.running, None
        assert request is not None
        self.num_started += 1
        if self.num_started > self.fails_from:
            request.error = OSError(errno.EIO, "Input/output error", f"drive {self.mark}")
        else:
            self.bytes += size
        request.submitted_ns = request.landed_ns = self.num_started
        self._start()
        request.done(request)
        if self.idle():
            self.stopped.set()

    def cancel(self, request: ReadRequest) -> bool:
        for queue in self.queues:
            if request in queue:
                queue.remove(request)
                request.cancelled = True
                request.done(request)
                return True
        return False

    def promote(self, request: ReadRequest) -> None:
        if request in self.queues[1]:
            self.queues[1].remove(request)
            self.queues[0].append(request)

    def idle(self) -> bool:
        return self.running is None and not any(self.queues)

    async def close(self) -> None:
        for queue in self.queues:
            for request in list(queue):
                self.cancel(request)
        await self.stopped.wait()


def requests_of(
    num_requests: int, num_extents: int, length: int
) -> tuple[list[ReadRequest], list[asyncio.Future[ReadRequest]]]:
    futures: list[asyncio.Future[ReadRequest]] = []
    requests = []
    for i in range(num_requests):
        futures.append(asyncio.get_running_loop().create_future())
        extents = [Extent(0, 0, length, 0, length)] * num_extents
        requests.append(ReadRequest(extents, futures[-1].set_result, f"request {i}"))
    return requests, futures


def test_drives_share_by_speed() -> None:
    async def check() -> None:
        drives = [SlowDrive(1, 150e6), SlowDrive(2, 50e6)]
        reader = ReplicaReader(drives, ["one", "two"])
        assert reader.alignment == 1024
        assert not reader.register_memory(0, 1)
        assert reader.describe() == "one: drive 1; two: drive 2"
        for _ in range(8):
            requests, futures = requests_of(5, 3, 400_000)
            reader.submit(requests)
            await asyncio.gather(*futures)
        first = [drive.bytes for drive in drives]
        for _ in range(8):
            requests, futures = requests_of(5, 3, 400_000)
            reader.submit(requests)
            await asyncio.gather(*futures)
        assert all(request.landed_ns >= request.submitted_ns > 0 for request in requests)
        speeds = reader.bytes_per_second()
        assert speeds["one"] > 1.5 * speeds["two"]
        shares = [drive.bytes - before for drive, before in zip(drives, first, strict=True)]
        assert shares[0] > 1.6 * shares[1]
        assert reader.stats.reads == 80
        assert reader.idle()
        await reader.close()

    asyncio.run(check())


def test_a_failing_drive_is_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        drives = [SlowDrive(1, 500e6, fails_from=3), SlowDrive(2, 500e6)]
        reader = ReplicaReader(drives, ["one", "two"])
        requests, futures = requests_of(10, 3, 100_000)
        reader.submit(requests[:5])
        reader.submit(requests[5:], Priority.BACKGROUND)
        await asyncio.gather(*futures)
        assert all(request.error is None and not request.cancelled for request in requests)
        assert drives[1].bytes + drives[0].bytes == 3_000_000
        assert drives[0].num_started <= 5, "one was in flight when the first failed"
        assert reader.stats.reads == 10
        assert reader.describe() == "one: left out; two: drive 2"
        assert reader.idle()
        await reader.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(check())
    (record,) = caplog.records
    assert record.getMessage().startswith("one fails and is left out: ")
    assert record.getMessage().endswith("reading from two")


def test_the_last_drive_stays_and_its_errors_are_the_callers() -> None:
    async def check() -> None:
        drives = [SlowDrive(1, 500e6, fails_from=0), SlowDrive(2, 500e6, fails_from=2)]
        reader = ReplicaReader(drives, ["one", "two"])
        requests, futures = requests_of(6, 2, 100_000)
        reader.submit(requests)
        await asyncio.gather(*futures)
        errors = [request.error for request in requests if request.error is not None]
        assert errors
        assert {error.filename for error in errors} == {"drive 2"}
        assert reader.stats.errors == len(errors)
        assert reader.stats.reads == 6 - len(errors)
        assert reader.idle()
        await reader.close()

    asyncio.run(check())


def test_cancel_is_all_or_nothing() -> None:
    async def check() -> None:
        drives = [SlowDrive(1, 100e6), SlowDrive(2, 100e6)]
        reader = ReplicaReader(drives, ["one", "two"])
        requests, futures = requests_of(3, 3, 100_000)
        reader.submit(requests)
        assert reader.cancel(requests[2])
        assert requests[2].cancelled
        assert futures[2].done()
        assert not reader.cancel(requests[0]), "a part of it is being read"
        await asyncio.gather(*futures)
        assert not requests[0].cancelled
        assert drives[0].bytes + drives[1].bytes == 600_000
        assert not reader.cancel(requests[0])
        assert reader.idle()
        await reader.close()

    asyncio.run(check())


def test_promote_and_close() -> None:
    async def check() -> None:
        drives = [SlowDrive(1, 100e6), SlowDrive(2, 100e6)]
        reader = ReplicaReader(drives, ["one", "two"])
        requests, futures = requests_of(6, 2, 100_000)
        reader.submit(requests, Priority.BACKGROUND)
        reader.promote(requests[5])
        await futures[5]
        assert sum(future.done() for future in futures) <= 3
        await reader.close()
        assert all(future.done() for future in futures)
        assert any(request.cancelled for request in requests)
        assert reader.idle()

    asyncio.run(check())


def test_real_files_byte_for_byte_while_one_copy_is_cut_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "copy").mkdir()
    data = write_bytes(tmp_path / "a", 4 << 20)
    shutil.copy(tmp_path / "a", tmp_path / "copy" / "a")
    rng = np.random.default_rng(1)

    async def check() -> None:
        options = replace(SMALL, depth=2)
        async with open_rig(
            [tmp_path / "a"],
            "auto",
            options=options,
            arena_bytes=64 << 20,
            replicas=[tmp_path / "copy"],
        ) as rig:
            assert f"{tmp_path / 'copy'}: " in rig.reader.describe()
            entries = []
            for i in range(200):
                ranges = [
                    (0, int(offset), int(length))
                    for offset, length in zip(
                        rng.integers(0, 3 << 20, 3), rng.integers(1, 100_000, 3), strict=True
                    )
                ]
                entries.append((ranges, *rig.request(ranges)))
                rig.reader.submit([entries[-1][1]], Priority(i % 2))
                if i == 100:
                    os.truncate(tmp_path / "copy" / "a", 500_000)
            for ranges, request, views, landed in entries:
                await asyncio.wait_for(landed, 20)
                assert request.error is None
                for (_, offset, length), view in zip(ranges, views, strict=True):
                    assert np.array_equal(view, data[offset : offset + length])

    asyncio.run(check())
    assert len(caplog.records) == 1


def test_copies_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    write_bytes(tmp_path / "a", 100_000)
    (folder / "a").write_bytes((tmp_path / "a").read_bytes())
    assert replica_paths([tmp_path / "a"], folder) == [folder / "a"]
    assert replica_paths([tmp_path / "a"], folder / "a") == [folder / "a"]

    def opened() -> None:
        async def check() -> None:
            loop = asyncio.get_running_loop()
            await open_reader([tmp_path / "a"], loop=loop, replicas=[folder]).close()

        asyncio.run(check())

    opened()
    write_bytes(folder / "a", 100_000, seed=1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ReadError, match="differs"):
        opened()
    (folder / "a").unlink()
    with pytest.raises(ReadError, match="cannot be read"):
        opened()
    assert len(os.listdir("/proc/self/fd")) == before
