"""The same files on several drives, read as one.

Owns: which drive gets which extent, by measured speed, and what happens when a drive fails. Does
not know: how a drive is read; every replica is a Reader of its own.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fomoe.errors import ClosedError, ReadError
from fomoe.io.reader import Extent, Priority, Reader, ReaderStats, ReadRequest

_log = logging.getLogger(__name__)

# A drive's speed is taken over this much time with reads outstanding, and follows slowly.
_WINDOW_NS = 50_000_000
_NEW_SHARE = 0.3
# Where replicas are compared before they are believed to be the same.
_SAMPLES = 64
_SAMPLE_BYTES = 4096


def replica_paths(paths: Sequence[str | os.PathLike[str]], replica: Path) -> list[Path]:
    """The files of the same names in `replica`, or in its folder when it is a file. A copy of a
    single file may have another name. Raises ReadError when `replica` is neither."""
    if not replica.exists():
        raise ReadError(f"replica {replica}: no such file or folder")
    if not (replica.is_file() or replica.is_dir()):
        raise ReadError(f"replica {replica}: neither a file nor a folder")
    if len(paths) == 1 and replica.is_file():
        return [replica]
    folder = replica if replica.is_dir() else replica.parent
    return [folder / Path(path).name for path in paths]


def check_same(paths: Sequence[str | os.PathLike[str]], others: Sequence[Path]) -> None:
    """ReadError unless the files look the same, by their sizes and samples of what they hold, and
    are not the very same."""
    for path, other in zip(paths, others, strict=True):
        try:
            itself, same = os.path.samefile(path, other), _samples(path) == _samples(other)
        except OSError as error:
            raise ReadError(f"replica {other}: cannot be read: {error.strerror}") from error
        if itself:
            raise ReadError(f"replica {other} is {os.fspath(path)} itself: name a copy of it")
        if not same:
            raise ReadError(f"replica {other} differs from {os.fspath(path)}: copy it anew")


def _samples(path: str | os.PathLike[str]) -> list[bytes | int]:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        last = max(size - _SAMPLE_BYTES, 0)
        offsets = [last * part // (_SAMPLES - 1) for part in range(_SAMPLES)]
        return [size, *(os.pread(file.fileno(), _SAMPLE_BYTES, offset) for offset in offsets)]


@dataclass(slots=True, eq=False)
class _Replica:
    """A drive: what it was given and how fast it gave it back."""

    reader: Reader
    place: str
    alive: bool = True
    outstanding: list[int] = field(default_factory=lambda: [0, 0])  # bytes, by priority
    bytes_per_ns: float = 1.0
    busy_ns: int = 0  # of the current window: time with something outstanding
    landed_bytes: int = 0
    mark_ns: int = 0  # busy_ns is counted up to here

    def finish_ns(self, num_bytes: int, priority: Priority) -> float:
        """How long until `num_bytes` more would have landed; background does not delay demand."""
        before = self.outstanding[Priority.DEMAND]
        if priority is Priority.BACKGROUND:
            before += self.outstanding[Priority.BACKGROUND]
        return (before + num_bytes) / self.bytes_per_ns

    def give(self, num_bytes: int, priority: Priority) -> None:
        if not any(self.outstanding):
            self.mark_ns = time.perf_counter_ns()
        self.outstanding[priority] += num_bytes

    def take_back(self, num_bytes: int, priority: Priority, landed: bool) -> None:
        self.outstanding[priority] -= num_bytes
        now = time.perf_counter_ns()
        self.busy_ns += now - self.mark_ns
        self.mark_ns = now
        self.landed_bytes += num_bytes if landed else 0
        if self.busy_ns >= _WINDOW_NS:
            measured = self.landed_bytes / self.busy_ns
            self.bytes_per_ns += _NEW_SHARE * (measured - self.bytes_per_ns)
            self.busy_ns = self.landed_bytes = 0


@dataclass(slots=True, eq=False)
class _Whole:
    """A request of the caller, and the requests for parts of it that are out."""

    request: ReadRequest
    priority: Priority
    parts: dict[ReadRequest, _Replica] = field(default_factory=dict)
    taken_back: list[Extent] | None = None  # not None while the whole is being cancelled
    abandoned: bool = False


class ReplicaReader:
    """A Reader over readers of the same files, which it owns. A drive that fails is left out with
    one warning, and its reads go to the others; the last one is never left out: its errors are the
    caller's. Needs two readers or more, `places` names them for people."""

    def __init__(self, readers: Sequence[Reader], places: Sequence[str]) -> None:
        assert len(readers) > 1
        self.name = readers[0].name
        self.direct = all(reader.direct for reader in readers)
        self.alignment = max(reader.alignment for reader in readers)
        self._stats = ReaderStats()
        self._replicas = [
            _Replica(reader, place) for reader, place in zip(readers, places, strict=True)
        ]
        self._wholes: dict[ReadRequest, _Whole] = {}
        self._closing = False
        self._epoll: select.epoll | None = None

    @property
    def stats(self) -> ReaderStats:
        """Of all drives together; requests are counted whole."""
        parts = [replica.reader.stats for replica in self._replicas]
        self._stats.bytes = sum(part.bytes for part in parts)
        self._stats.retries = sum(part.retries for part in parts)
        self._stats.short_reads = sum(part.short_reads for part in parts)
        self._stats.in_flight_bytes = sum(part.in_flight_bytes for part in parts)
        return self._stats

    def describe(self) -> str:
        """One line: how each drive is read."""
        return "; ".join(
            f"{replica.place}: {replica.reader.describe() if replica.alive else 'left out'}"
            for replica in self._replicas
        )

    def bytes_per_second(self) -> dict[str, float]:
        """The speed that each drive in use is taken to have."""
        return {replica.place: replica.bytes_per_ns * 1e9 for replica in self._alive()}

    def register_memory(self, address: int, length: int) -> bool:
        # A list: every drive is told, whatever the others said.
        return all([r.reader.register_memory(address, length) for r in self._alive()])

    def submit(self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND) -> None:
        if self._closing:
            raise ClosedError("the reader is closed")
        now = time.perf_counter_ns()
        wholes = []
        for request in requests:
            request.queued_ns = now
            whole = self._wholes[request] = _Whole(request, priority)
            wholes.append((whole, request.extents))
        self._send(wholes, priority)

    def cancel(self, request: ReadRequest) -> bool:
        whole = self._wholes.get(request)
        if whole is None:
            return False
        whole.taken_back = []
        for part, replica in list(whole.parts.items()):
            replica.reader.cancel(part)
        taken_back, whole.taken_back = whole.taken_back, None
        if not whole.parts:
            request.cancelled = True
            self._finish(whole)
            return True
        if taken_back:  # the rest has started, and a request runs to its end as a whole
            self._send([(whole, taken_back)], whole.priority)
        return False

    def abandon(self, request: ReadRequest) -> None:
        whole = self._wholes.get(request)
        if whole is None:
            return
        whole.abandoned = True
        for part, replica in list(whole.parts.items()):
            replica.reader.abandon(part)

    def promote(self, request: ReadRequest) -> None:
        whole = self._wholes.get(request)
        if whole is None or whole.priority is Priority.DEMAND:
            return
        whole.priority = Priority.DEMAND
        for part, replica in list(whole.parts.items()):
            num_bytes = _num_bytes(part.extents)
            replica.outstanding[Priority.BACKGROUND] -= num_bytes
            replica.outstanding[Priority.DEMAND] += num_bytes
            replica.reader.promote(part)

    def fileno(self) -> int:
        if self._epoll is None:
            self._epoll = select.epoll()
            for replica in self._replicas:
                self._epoll.register(replica.reader.fileno(), select.EPOLLIN)
        return self._epoll.fileno()

    def land(self) -> None:
        for replica in self._replicas:
            replica.reader.land()

    def idle(self) -> bool:
        return not self._wholes and all(replica.reader.idle() for replica in self._replicas)

    async def close(self) -> None:
        self._closing = True
        try:
            for replica in self._replicas:
                await replica.reader.close()
        finally:  # interrupted: memory must not be given back before the others are done too
            for replica in self._replicas:
                await replica.reader.close()
            if self._epoll is not None:
                self._epoll.close()

    def _alive(self) -> list[_Replica]:
        return [replica for replica in self._replicas if replica.alive]

    def _send(self, wholes: Sequence[tuple[_Whole, Sequence[Extent]]], priority: Priority) -> None:
        """Give each extent to the drive that would land it first; one submission to each drive."""
        alive = self._alive()
        batches: dict[int, list[ReadRequest]] = {}
        for whole, extents in wholes:
            shares: dict[int, list[Extent]] = {}
            for extent in extents:
                finish = [replica.finish_ns(extent.length, priority) for replica in alive]
                best = finish.index(min(finish))
                alive[best].give(extent.length, priority)
                shares.setdefault(best, []).append(extent)
            for best, share in shares.items():
                part = self._part(whole, share, alive[best])
                batches.setdefault(best, []).append(part)
        for best, batch in batches.items():
            alive[best].reader.submit(batch, priority)

    def _part(self, whole: _Whole, extents: Sequence[Extent], replica: _Replica) -> ReadRequest:
        part = ReadRequest(extents, lambda part: self._landed(whole, part), whole.request.what)
        whole.parts[part] = replica
        return part

    def _landed(self, whole: _Whole, part: ReadRequest) -> None:
        replica = whole.parts.pop(part)
        landed = part.error is None and not part.cancelled
        replica.take_back(_num_bytes(part.extents), whole.priority, landed)
        request = whole.request
        if landed:
            request.submitted_ns = min(request.submitted_ns or part.submitted_ns, part.submitted_ns)
            request.landed_ns = max(request.landed_ns, part.landed_ns)
        elif part.cancelled and whole.taken_back is not None:
            whole.taken_back.extend(part.extents)
            return
        elif self._closing or whole.abandoned:
            request.cancelled = True
        elif part.error is not None and len(self._alive()) == 1 and replica.alive:
            request.error = part.error
        else:
            self._move(whole, part, replica)
        if not whole.parts:
            self._finish(whole)

    def _move(self, whole: _Whole, part: ReadRequest, replica: _Replica) -> None:
        """Read elsewhere what a failing drive did not give."""
        drop = replica.alive
        replica.alive = False
        self._send([(whole, part.extents)], whole.priority)
        if not drop:
            return
        rest = ", ".join(other.place for other in self._alive())
        _log.warning(
            "%s fails and is left out: %s; reading from %s", replica.place, part.error, rest
        )
        for other in list(self._wholes.values()):
            for waiting, at in list(other.parts.items()):
                if at is replica:  # what is in flight lands, or fails and comes here as well
                    at.reader.cancel(waiting)

    def _finish(self, whole: _Whole) -> None:
        request = self._wholes.pop(whole.request).request
        if request.error is not None:
            self._stats.errors += 1
        elif not request.cancelled:
            self._stats.reads += 1
        request.done(request)


def _num_bytes(extents: Sequence[Extent]) -> int:
    return sum(extent.length for extent in extents)
