"""What a drive can do: random reads with the real reader, a fraction of a second, remembered.

Owns: the measurement, and the file that remembers it for each drive. Does not know: what the reads
are for, or where the cache lies (it is told).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fomoe.errors import ReadError
from fomoe.io.arena import Arena
from fomoe.io.files import Direct
from fomoe.io.open import Io, open_reader
from fomoe.io.queued import ReadOptions
from fomoe.io.reader import Extent, Reader, ReadRequest

_log = logging.getLogger(__name__)

# Slices of experts are 1 to 4 MB: what is measured is what will be asked.
REQUEST_BYTES = 2304 << 10
# (read size, depth), in the order of preference: little in flight first.
CANDIDATES = (
    (1 << 20, 8),
    (512 << 10, 16),
    (2 << 20, 4),
    (1 << 20, 16),
    (2 << 20, 8),
    (512 << 10, 32),
    (1 << 20, 32),
    (2 << 20, 16),
)
SECONDS_A_CANDIDATE = 0.04
# More in flight delays each read: it has to gain this much.
WORTHWHILE = 1.03
# A smaller file is read once and for all: nothing is gained by knowing its drive.
SMALLEST_FILE_BYTES = 256 << 20
# A drive fills up, wears, gets other neighbours: what was measured holds for a month.
REMEMBERED_S = 30 * 24 * 3600
_CACHE_NAME = "drives.json"
_ANY_RATE = 1e15  # bytes per second: more than of any drive
_MEASURED_AT = "measured_at"  # in an entry, beside what a Drive has: seconds since 1970


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRate:
    """Reads of one size, one after the other finished, `outstanding` at a time."""

    reads: int
    bytes: int
    seconds: float
    cpu_seconds: float  # of the whole process

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds

    @property
    def cpu_seconds_per_read(self) -> float:
        return self.cpu_seconds / self.reads


_BACKGROUND_S = 5e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """The best way found to read a drive, and the rate it gave."""

    read_bytes: int
    depth: int
    bytes_per_second: float

    def options(self) -> ReadOptions:
        """Background work has some 5 ms of reading in flight: as long as a demand read is delayed
        at most, and about as long as compute goes on before landings are looked for."""
        usual = ReadOptions(read_bytes=self.read_bytes, depth=self.depth)
        depth = round(self.bytes_per_second * _BACKGROUND_S / usual.background_read_bytes)
        return replace(usual, background_depth=min(max(depth, usual.background_depth), 16))


async def measure_reads(
    reader: Reader,
    arena: Arena,
    file_bytes: Sequence[int],
    *,
    request_bytes: int = REQUEST_BYTES,
    outstanding: int = 8,
    seconds: float,
    seed: int = 0,
    register: bool = True,
) -> ReadRate:
    """Read random places of the reader's files, which have these sizes, for about `seconds`.

    The memory is touched (and registered) first, and a round of reads is left out of the figures.
    Of a file that is shorter than a request, what there is of it counts. OSError when a read fails.
    """
    assert request_bytes % reader.alignment == 0
    base = arena.allocate(request_bytes * outstanding)
    arena.populate(base, request_bytes * outstanding)
    if register:
        reader.register_memory(base, request_bytes * outstanding)
    load = _Load(reader, file_bytes, request_bytes, random.Random(seed))
    await load.run(base, outstanding, until=time.perf_counter())
    reads, bytes_before = load.reads, load.bytes
    cpu, begin = time.process_time(), time.perf_counter()
    await load.run(base, outstanding, until=begin + seconds)
    return ReadRate(
        reads=load.reads - reads,
        bytes=load.bytes - bytes_before,
        seconds=time.perf_counter() - begin,
        cpu_seconds=time.process_time() - cpu,
    )


class _Load:
    """Keeps reads outstanding: each one that lands starts the next."""

    def __init__(
        self, reader: Reader, sizes: Sequence[int], request_bytes: int, rng: random.Random
    ) -> None:
        self._reader = reader
        self._sizes = sizes
        self._request_bytes = request_bytes
        self._rng = rng
        self._outstanding = 0
        self._until = 0.0
        self._finished: asyncio.Future[None] | None = None
        self.reads = 0
        self.bytes = 0

    async def run(self, base: int, outstanding: int, until: float) -> None:
        self._until = until
        self._outstanding = outstanding
        self._finished = asyncio.get_running_loop().create_future()
        self._reader.submit(
            [self._request(base + slot * self._request_bytes) for slot in range(outstanding)]
        )
        try:
            await self._finished
        finally:
            self._until = 0.0  # cancelled: what lands from now on starts nothing

    def _request(self, address: int) -> ReadRequest:
        file = self._rng.choices(range(len(self._sizes)), self._sizes)[0]
        blocks = max(self._sizes[file] - self._request_bytes, 0) // self._reader.alignment
        offset = self._rng.randrange(blocks + 1) * self._reader.alignment
        needed = min(self._request_bytes, self._sizes[file] - offset)
        extent = Extent(file, offset, self._request_bytes, address, needed)
        return ReadRequest([extent], self._landed)

    def _landed(self, request: ReadRequest) -> None:
        assert self._finished is not None
        self.reads += 1
        self.bytes += request.extents[0].needed
        if request.error is None and time.perf_counter() < self._until:
            self._reader.submit([self._request(request.extents[0].address)])
            return
        self._outstanding -= 1
        if request.error is not None:
            self._until = 0.0
            if not self._finished.done():
                self._finished.set_exception(request.error)
        elif self._outstanding == 0 and not self._finished.done():
            self._finished.set_result(None)


async def probe_drive(
    path: str | os.PathLike[str],
    *,
    cache: Path | None,
    io: Io = "auto",
    direct: Direct = "auto",
    candidates: Sequence[tuple[int, int]] = CANDIDATES,
    smallest_bytes: int = SMALLEST_FILE_BYTES,
) -> Drive | None:
    """How to read the drive under `path`: as remembered in the folder `cache`, else measured.

    None when it cannot be known: reads are buffered (memory would be measured), or the file is
    small. Errors as of open_reader, ReadError when a read fails.
    """
    reader = open_reader([path], loop=asyncio.get_running_loop(), io=io, direct=direct)
    known = reader.direct and os.stat(path).st_size >= smallest_bytes
    key = f"{device_name(path)} {reader.name}"
    await reader.close()
    if not known:
        return None
    remembered = _recall(cache, key, candidates)
    if remembered is not None:
        return remembered
    try:
        drive = await _measure(path, io, direct, candidates)
    except OSError as error:
        raise ReadError(f"measuring the drive: {error}") from error
    _remember(cache, key, drive)
    return drive


async def _measure(
    path: str | os.PathLike[str],
    io: Io,
    direct: Direct,
    candidates: Sequence[tuple[int, int]],
) -> Drive:
    best: Drive | None = None
    for seed, (read_bytes, depth) in enumerate(candidates):
        outstanding = read_bytes * depth // REQUEST_BYTES + 2
        arena = Arena(outstanding * REQUEST_BYTES)
        reader = open_reader(
            [path],
            loop=asyncio.get_running_loop(),
            io=io,
            direct=direct,
            options=ReadOptions(read_bytes=read_bytes, depth=depth),
        )
        arena.attach(reader)
        try:
            rate = await measure_reads(
                reader,
                arena,
                [os.stat(path).st_size],
                outstanding=outstanding,
                seconds=SECONDS_A_CANDIDATE,
                seed=seed,
            )
        finally:
            await reader.close()
            arena.close()
        if best is None or rate.bytes_per_second > best.bytes_per_second * WORTHWHILE:
            best = Drive(read_bytes=read_bytes, depth=depth, bytes_per_second=rate.bytes_per_second)
    assert best is not None
    return best


def device_name(path: str | os.PathLike[str]) -> str:
    """What tells the drive under `path` from others: number, model if the system tells it, size."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    folder = Path("/sys/dev/block") / number
    facts = [number]
    for fact in ("device/model", "../device/model", "size"):
        try:
            facts.append((folder / fact).read_text().strip())
        except OSError:
            continue  # not every drive has every fact
    return " ".join(facts)


def _recall(cache: Path | None, key: str, candidates: Sequence[tuple[int, int]]) -> Drive | None:
    """Nothing where the entry is too old, damaged, or of another version: measured anew."""
    entry = _entries(cache).get(key)
    if not isinstance(entry, dict):
        return None
    rate, measured_at = entry.get("bytes_per_second"), entry.get(_MEASURED_AT)
    if not (isinstance(rate, int | float) and isinstance(measured_at, int | float)):
        return None
    now = time.time()
    if not (now - REMEMBERED_S < measured_at <= now and 0 < rate < _ANY_RATE):
        return None
    for read_bytes, depth in candidates:
        if (entry.get("read_bytes"), entry.get("depth")) == (read_bytes, depth):
            return Drive(read_bytes=read_bytes, depth=depth, bytes_per_second=rate)
    return None


def _remember(cache: Path | None, key: str, drive: Drive) -> None:
    """Replace the file whole, so that a reader in another process never sees half of it."""
    if cache is None:
        return
    entries = {**_entries(cache), key: asdict(drive) | {_MEASURED_AT: time.time()}}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        written = cache / f"{_CACHE_NAME}.{os.getpid()}"
        written.write_text(json.dumps(entries, indent=1))
        written.replace(cache / _CACHE_NAME)
    except OSError as error:
        _log.warning("%s: the drive will be measured again at the next start", error)


def _entries(cache: Path | None) -> dict[str, object]:
    if cache is None:
        return {}
    try:
        entries = json.loads((cache / _CACHE_NAME).read_text())
    except (OSError, ValueError):
        return {}  # absent or damaged: measured anew
    return entries if isinstance(entries, dict) else {}
