"""Several drives read as one: who reads what, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import errno
import heapq
import itertools
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faulty_reader import FaultyReader
from io_rig import SMALL, Rig, open_rig, write_bytes

from fomoe.errors import ClosedError, ReadError
from fomoe.io.open import Io, open_reader
from fomoe.io.reader import Extent, Priority, ReaderStats, ReadRequest
from fomoe.io.replicas import ReplicaReader, replica_paths


class Clock:
    """Time that passes when the drives are done with something, and not otherwise."""

    def __init__(self) -> None:
        self.now_ns = 1
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now_ns + int(seconds * 1e9), next(self._numbers), event))

    def step(self) -> None:
        self.now_ns, _, event = heapq.heappop(self.events)
        event()

    def run(self) -> None:
        while self.events:
            self.step()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("fomoe.io.replicas.time", clock)
    return clock


class SlowDrive:
    """A Reader of one request at a time, at a given rate, which fails from some request on."""

    def __init__(
        self, clock: Clock, number: int, bytes_per_second: float, fails_from: int = 1 << 60
    ) -> None:
        self.name = "slow"
        self.direct = True
        self.alignment = 512 * number
        self.stats = ReaderStats()
        self.bytes = 0
        self.num_started = 0
        self._clock = clock
        self._number = number
        self._fails_from = fails_from
        self._bytes_per_second = bytes_per_second
        self._queues: list[list[ReadRequest]] = [[], []]
        self._running: ReadRequest | None = None

    def describe(self) -> str:
        return f"drive {self._number}"

    def register_memory(self, address: int, length: int) -> bool:
        return self._number == 1

    def submit(self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND) -> None:
        self._queues[priority].extend(requests)
        self._start()

    def _start(self) -> None:
        if self._running is None and any(self._queues):
            self._running = (self._queues[0] or self._queues[1]).pop(0)
            self._running.submitted_ns = self._clock.now_ns
            size = sum(extent.length for extent in self._running.extents)
            self.num_started += 1
            self._clock.after(size / self._bytes_per_second, lambda: self._land(size))

    def _land(self, size: int) -> None:
        request, self._running = self._running, None
        assert request is not None
        if self.num_started > self._fails_from:
            request.error = OSError(errno.EIO, "Input/output error", f"drive {self._number}")
        else:
            self.bytes += size
        request.landed_ns = self._clock.now_ns
        self._start()
        request.done(request)

    def cancel(self, request: ReadRequest) -> bool:
        for queue in self._queues:
            if request in queue:
                queue.remove(request)
                request.cancelled = True
                request.done(request)
                return True
        return False

    def abandon(self, request: ReadRequest) -> None:
        self.cancel(request)

    def promote(self, request: ReadRequest) -> None:
        if request in self._queues[1]:
            self._queues[1].remove(request)
            self._queues[0].append(request)

    def idle(self) -> bool:
        return self._running is None and not any(self._queues)

    async def close(self) -> None:
        for request in [*self._queues[0], *self._queues[1]]:
            self.cancel(request)
        while not self.idle():
            self._clock.step()


def requests_of(num_requests: int, length: int, done: list[ReadRequest]) -> list[ReadRequest]:
    """Requests of three extents each, which put themselves on `done`."""
    extents = [Extent(0, 0, length, 0, length)] * 3
    return [ReadRequest(extents, done.append, f"request {i}") for i in range(num_requests)]


def test_drives_share_by_speed(clock: Clock) -> None:
    drives = [SlowDrive(clock, 1, 3e9), SlowDrive(clock, 2, 1e9)]
    reader = ReplicaReader(drives, ["one", "two"])
    assert reader.alignment == 1024
    assert not reader.register_memory(0, 1)
    assert reader.describe() == "one: drive 1; two: drive 2"
    done: list[ReadRequest] = []
    for _ in range(100):
        reader.submit(requests_of(5, 2_000_000, done))
        clock.run()
    speeds = reader.bytes_per_second()
    assert speeds["one"] == pytest.approx(3e9, rel=0.1)
    assert speeds["two"] == pytest.approx(1e9, rel=0.1)
    before = [drive.bytes for drive in drives]
    for _ in range(10):
        reader.submit(requests_of(20, 2_000_000, done))
        clock.run()
    shares = [drive.bytes - share for drive, share in zip(drives, before, strict=True)]
    assert shares[0] / shares[1] == pytest.approx(3, rel=0.15)
    for request in done:
        assert request.landed_ns > request.submitted_ns >= request.queued_ns > 0
    assert reader.stats.reads == len(done) == 700
    assert reader.idle()


def test_a_failing_drive_is_left_out_with_one_warning(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    drives = [SlowDrive(clock, 1, 1e9, fails_from=3), SlowDrive(clock, 2, 1e9)]
    reader = ReplicaReader(drives, ["one", "two"])
    done: list[ReadRequest] = []
    requests = requests_of(10, 100_000, done)
    reader.submit(requests[:5])
    reader.submit(requests[5:], Priority.BACKGROUND)
    clock.run()
    assert len(done) == 10
    assert all(request.error is None and not request.cancelled for request in requests)
    assert drives[1].bytes + drives[0].bytes == 3_000_000
    assert drives[0].num_started <= 5, "one may have been in flight when another failed"
    assert reader.stats.reads == 10
    assert reader.describe() == "one: left out; two: drive 2"
    assert reader.idle()
    (record,) = caplog.records
    assert record.getMessage().startswith("one fails and is left out: ")
    assert record.getMessage().endswith("reading from two")


def test_the_last_drive_stays_and_its_errors_are_the_callers(clock: Clock) -> None:
    drives = [SlowDrive(clock, 1, 1e9, fails_from=0), SlowDrive(clock, 2, 1e9, fails_from=4)]
    reader = ReplicaReader(drives, ["one", "two"])
    done: list[ReadRequest] = []
    reader.submit(requests_of(6, 100_000, done))
    clock.run()
    errors = [request.error for request in done if request.error is not None]
    assert errors
    assert {error.filename for error in errors} == {"drive 2"}
    assert len(done) == 6
    assert reader.stats.errors == len(errors)
    assert reader.stats.reads == 6 - len(errors)
    assert reader.idle()


def test_cancel_is_all_or_nothing(clock: Clock) -> None:
    drives = [SlowDrive(clock, 1, 1e9), SlowDrive(clock, 2, 1e9)]
    reader = ReplicaReader(drives, ["one", "two"])
    done: list[ReadRequest] = []
    requests = requests_of(3, 100_000, done)
    reader.submit(requests)
    assert reader.cancel(requests[2])
    assert requests[2].cancelled
    assert done == [requests[2]]
    assert not reader.cancel(requests[0]), "a part of it is being read"
    clock.run()
    assert not requests[0].cancelled
    assert drives[0].bytes + drives[1].bytes == 600_000
    assert len(done) == 3
    assert not reader.cancel(requests[0])
    assert reader.idle()


def test_an_abandoned_request_is_done_once_whatever_was_under_way(clock: Clock) -> None:
    drives = [SlowDrive(clock, 1, 1e9), SlowDrive(clock, 2, 1e9)]
    reader = ReplicaReader(drives, ["one", "two"])
    done: list[ReadRequest] = []
    requests = requests_of(3, 100_000, done)
    reader.submit(requests)
    for request in requests[1:]:
        reader.abandon(request)
    clock.run()
    assert sorted(map(id, done)) == sorted(map(id, requests))
    assert not requests[0].cancelled
    assert requests[2].cancelled
    assert drives[0].bytes + drives[1].bytes < 900_000
    assert all(
        drive.num_started and replica.alive
        for drive, replica in zip(drives, reader._replicas, strict=True)
    )
    assert reader.idle()


def test_promote_and_close(clock: Clock) -> None:
    drives = [SlowDrive(clock, 1, 1e9), SlowDrive(clock, 2, 1e9)]
    reader = ReplicaReader(drives, ["one", "two"])
    done: list[ReadRequest] = []
    requests = requests_of(6, 100_000, done)
    reader.submit(requests, Priority.BACKGROUND)
    reader.promote(requests[5])
    while requests[5] not in done:
        clock.step()
    assert len(done) <= 2, "the promoted one passed all that waited"
    asyncio.run(reader.close())
    assert len(done) == 6
    assert any(request.cancelled for request in requests)
    assert reader.idle()
    with pytest.raises(ClosedError):
        reader.submit(requests)


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


@pytest.mark.parametrize("way", ["uring", "threads"])
def test_late_and_failing_landings_do_no_harm(tmp_path: Path, way: Io) -> None:
    data = write_bytes(tmp_path / "a", 1 << 20)
    rng = np.random.default_rng(2)

    async def check() -> None:
        async with (
            open_rig([tmp_path / "a"], way, arena_bytes=32 << 20) as one,
            open_rig([tmp_path / "a"], way) as two,
        ):
            failing = random.Random(1)
            faulty = FaultyReader(one.reader, 1, fails=lambda _: failing.randrange(20) == 0)
            reader = ReplicaReader([faulty, FaultyReader(two.reader, 2)], ["one", "two"])
            rig = Rig(reader, one.arena)
            entries = []
            for offset, length in zip(
                rng.integers(0, 900_000, 200), rng.integers(1, 100_000, 200), strict=True
            ):
                entries.append((offset, length, *rig.request([(0, int(offset), int(length))])))
                reader.submit([entries[-1][2]], Priority(len(entries) % 2))
                cancelled = len(entries) % 5 == 0 and reader.cancel(entries[-1][2])
                assert cancelled == entries[-1][2].cancelled
            for offset, length, request, (view,), landed in entries:
                await asyncio.wait_for(landed, 20)
                assert request.error is None
                assert request.cancelled or np.array_equal(view, data[offset : offset + length])
            await reader.close()
            assert reader.describe().startswith("one: left out; two: faulty ")

    asyncio.run(check())


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
    with pytest.raises(ReadError, match="neither"):
        replica_paths([tmp_path / "a"], Path("/dev/null"))
    (folder / "a").unlink()
    (folder / "a").hardlink_to(tmp_path / "a")
    with pytest.raises(ReadError, match="itself"):
        opened()
    (folder / "a").unlink()
    write_bytes(folder / "a", 100_000, seed=1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ReadError, match="differs"):
        opened()
    (folder / "a").unlink()
    with pytest.raises(ReadError, match="cannot be read"):
        opened()
    assert len(os.listdir("/proc/self/fd")) == before
