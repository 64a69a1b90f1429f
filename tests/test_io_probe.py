"""The probe of a drive: what it measures, and what it remembers."""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from io_rig import write_bytes

from fomoe.errors import ReadError
from fomoe.io import probe
from fomoe.io.arena import Arena
from fomoe.io.open import open_reader
from fomoe.io.probe import Drive, device_name, probe_drive

TWO = ((1 << 20, 2), (256 << 10, 8))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_bytes(tmp_path / "file", 8 << 20)
    return tmp_path / "file"


def run(path: Path, cache: Path | None, **choice: Any) -> Drive | None:
    return asyncio.run(
        probe_drive(path, cache=cache, candidates=TWO, smallest_bytes=1 << 20, **choice)
    )


@pytest.mark.parametrize("io", ["uring", "threads"])
def test_one_of_the_candidates_is_chosen(path: Path, io: str) -> None:
    drive = run(path, None, io=io)
    assert drive is not None
    assert (drive.read_bytes, drive.depth) in TWO
    assert drive.bytes_per_second > 1e6
    assert drive.options().depth == drive.depth


@pytest.mark.parametrize(("gb_s", "pieces"), [(0.1, 4), (1.4, 7), (2.5, 12), (7.0, 16)])
def test_background_work_is_a_few_milliseconds_of_reading(gb_s: float, pieces: int) -> None:
    drive = Drive(read_bytes=1 << 20, depth=8, bytes_per_second=gb_s * 1e9)
    assert drive.options().background_depth == pieces


def test_more_in_flight_must_be_worthwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 1.02, 1.02, 1.05])

    async def measured(*_: Any, **__: Any) -> probe.ReadRate:
        return probe.ReadRate(reads=1, bytes=1000, seconds=1 / next(rates), cpu_seconds=0.1)

    monkeypatch.setattr(probe, "measure_reads", measured)
    first = run(path, None)
    second = run(path, None)
    assert first is not None
    assert second is not None
    assert (first.read_bytes, first.depth) == TWO[0]
    assert (second.read_bytes, second.depth) == TWO[0]
    rates = iter([1.0, 1.1])
    better = run(path, None)
    assert better is not None
    assert (better.read_bytes, better.depth) == TWO[1]


def test_of_a_short_file_only_what_there_is_counts(tmp_path: Path) -> None:
    write_bytes(tmp_path / "short", 100_000)

    async def main() -> probe.ReadRate:
        reader = open_reader([tmp_path / "short"], loop=asyncio.get_running_loop())
        arena = Arena(2 << 20)
        arena.attach(reader)
        try:
            return await probe.measure_reads(
                reader, arena, [100_000], request_bytes=1 << 20, outstanding=2, seconds=0.01
            )
        finally:
            await reader.close()
            arena.close()

    rate = asyncio.run(main())
    assert rate.reads > 0
    assert rate.bytes == rate.reads * 100_000


def test_it_is_remembered_for_each_drive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = path.parent / "new" / "cache"
    first = run(path, cache)

    async def not_again(*_: Any, **__: Any) -> probe.ReadRate:
        raise AssertionError("measured again")

    monkeypatch.setattr(probe, "measure_reads", not_again)
    assert run(path, cache) == first
    with pytest.raises(AssertionError, match="measured again"):
        run(path, cache, io="threads")
    assert len(list(cache.iterdir())) == 1


def entry(**changes: object) -> str:
    usual = {"read_bytes": 1 << 20, "depth": 2, "bytes_per_second": 1.25e9}
    return json.dumps({"NAME io_uring": usual | {"measured_at": time.time()} | changes})


def test_what_is_remembered_is_believed_for_a_month(path: Path) -> None:
    memory = path.parent / "drives.json"
    month = 30 * 24 * 3600
    for age, believed in ((0, True), (month - 60, True), (month + 1, False), (-3600, False)):
        text = entry(measured_at=time.time() - age)
        memory.write_text(text.replace("NAME", device_name(path)))
        drive = run(path, path.parent)
        assert drive is not None
        assert (drive.bytes_per_second == 1.25e9) == believed
        if not believed:
            assert run(path, path.parent) == drive, "it is remembered from now on"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"NAME io_uring": {"speed": 1}}',
        '{"NAME io_uring": 3}',
        entry(depth="x"),
        entry(depth=0),
        entry(depth=1 << 40),
        entry(read_bytes=1000),
        entry(bytes_per_second="x"),
        entry(bytes_per_second=0),
        entry(bytes_per_second=-1.0),
        entry(bytes_per_second=float("nan")),
        entry(bytes_per_second=float("inf")),
        entry(bytes_per_second=10**400),
        entry(measured_at=10**400),
        '{"NAME io_uring": {"read_bytes": 1048576, "depth": 2, "bytes_per_second": 0}}',
        entry(measured_at=None),
    ],
)
def test_a_damaged_memory_is_measured_anew(path: Path, text: str) -> None:
    (path.parent / "drives.json").write_text(text.replace("NAME", device_name(path)))
    drive = run(path, path.parent)
    assert drive is not None
    entries = json.loads((path.parent / "drives.json").read_text())
    assert entries[f"{device_name(path)} io_uring"]["depth"] == drive.depth
    assert 1e6 < drive.bytes_per_second < 1e13
    assert drive.bytes_per_second != 1.25e9


def test_a_folder_that_cannot_be_written_costs_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(path, path / "below a file") is not None
    (record,) = caplog.records
    assert "measured again at the next start" in record.getMessage()


def test_what_cannot_be_known_is_not_guessed(path: Path) -> None:
    assert run(path, path.parent, direct="off") is None
    assert asyncio.run(probe_drive(path, cache=None)) is None, "a small file"
    assert not (path.parent / "drives.json").exists()
    with pytest.raises(ReadError):
        run(path.parent / "absent", None)


def test_a_drive_that_fails_is_said_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(*_: Any, **__: Any) -> probe.ReadRate:
        raise OSError(5, "reading at offset 0: Input/output error", str(path))

    monkeypatch.setattr(probe, "measure_reads", failing)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ReadError, match=r"measuring the drive.*Input/output error"):
        run(path, None)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("io", ["uring", "threads"])
def test_a_probe_that_is_cancelled_starts_no_more_reads(path: Path, io: str) -> None:
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        for part in range(1, 11):
            measuring = asyncio.create_task(probe_drive(path, cache=None, smallest_bytes=0, io=io))
            await asyncio.sleep(part * 0.01)
            measuring.cancel()
            await asyncio.wait([measuring])

    asyncio.run(main())
    assert not complaints
