"""A CUDA or HIP device: torch's streams, events and memory, the runtime's copies.

Owns: the four streams, what is allocated and pinned, and waking the event loop. Does not know:
models, experts, kernels beyond making their Ops. Imported where such a device is asked for only.

The event loop hears of events by an eventfd. What writes to it is a host function on streams of
their own that wait for the events: on the stream itself it would hold up the work behind it. Each
stream has one for its signals, so those must be asked for in the order in which events are recorded
or they come late. An event in the middle of a graph (mark) is external to it: every launch of the
graph records it anew, as of then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from fomoe.kernels.device import DEVICE_ALIGNMENT, DeviceOps, Event
from fomoe.kernels.device_runtime import Runtime
from fomoe.kernels.gpu.recorded import lacks_graphs

Work = Callable[[], object]
_log = logging.getLogger(__name__)


class CudaEvent:
    """fomoe.kernels.device.Event."""

    def __init__(self, event: Any, stream: CudaStream) -> None:
        self.event, self.stream = event, stream

    def done(self) -> bool:
        return bool(self.event.query())


class CudaStream:
    """fomoe.kernels.device.Stream. `priority`: a lower number goes first."""

    def __init__(self, index: int, place: Any, runtime: Runtime, priority: int) -> None:
        self._index, self._place, self._runtime = index, place, runtime
        self.stream = torch.cuda.Stream(place, priority=priority)
        self._handle = self.stream.cuda_stream
        self._signals = torch.cuda.Stream(place)
        self.waiting: deque[tuple[CudaEvent, Work]] = deque()

    def call(self, work: Work) -> None:
        torch.cuda.set_device(self._index)
        with torch.cuda.stream(self.stream):
            work()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._runtime.copy(target, source, nbytes, self._handle)

    def record(self) -> CudaEvent:
        event = torch.cuda.Event()
        event.record(self.stream)
        return CudaEvent(event, self)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.stream.wait_event(event.event)

    def signal(self, event: CudaEvent, callback: Work, fd: int) -> None:
        """Write to `fd` when the event has been reached; `callback` is due then."""
        self.waiting.append((event, callback))
        self._signals.wait_event(event.event)
        self._runtime.wake(fd, self._signals.cuda_stream)

    def due(self) -> list[Work]:
        """Callbacks whose events have been reached."""
        found = []
        while self.waiting and self.waiting[0][0].done():
            found.append(self.waiting.popleft()[1])
        return found


class CudaDevice:
    """fomoe.kernels.device.Device. `index`: torch's number of the card; `place` and `runtime` are
    for tests without one."""

    shares_memory = False
    # Of two graphs, one with stand-ins and one without, some 25 kernels each, and the next layer's
    # router: a guess at what drivers keep of them (8 KiB a kernel), which gpu_check tests.
    recorded_bytes = 512 << 10
    # Being called back goes through the driver's thread, the eventfd and the loop: it may well take
    # as long as the experts of a layer of a token, and those are what the next layer's launch has.
    poll_ns = 1_000_000

    def __init__(
        self, name: str, index: int, *, place: Any = None, runtime: Runtime | None = None
    ) -> None:
        self.name = name
        self._index = index
        self._place = torch.device("cuda", index) if place is None else place
        self._runtime = runtime or Runtime("hip" if torch.version.hip else "cuda")
        torch.cuda.set_device(index)
        lacking = lacks_graphs()
        if lacking:
            _log.warning("%s: %s: kernels are launched one by one, which is slower", name, lacking)
        self._external = lacking is None
        # Kernels go before copies where both want the same unit; they are what the host waits for.
        self.compute = CudaStream(index, self._place, self._runtime, -1)
        self.aside = CudaStream(index, self._place, self._runtime, 0)
        self.uploads = CudaStream(index, self._place, self._runtime, 0)
        self.downloads = CudaStream(index, self._place, self._runtime, 0)
        self._kept: dict[int, Any] = {}
        self._marks: dict[Hashable, CudaEvent] = {}
        self._pinned: list[int] = []
        self._own: list[mmap.mmap] = []  # host memory of host_array
        self._loop = asyncio.get_running_loop()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._fd, self._woken)

    # ---- memory ----

    def allocate(self, nbytes: int) -> int:
        # torch gives out multiples of 512 on a GPU; room to align it elsewhere.
        start = self.address(self._tensor((nbytes + DEVICE_ALIGNMENT,), np.uint8, torch.empty))
        return -(-start // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Any:
        tensor = self._tensor(shape, dtype, torch.zeros)
        # It was zeroed in the order of `compute`, and may be filled by copies of `uploads`.
        self.uploads.wait(self.compute.record())
        return tensor

    def _tensor(self, shape: Sequence[int], dtype: npt.DTypeLike, make: Any) -> Any:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        made: list[Any] = []
        try:
            self.compute.call(
                lambda: made.append(make(tuple(shape), dtype=kind, device=self._place))
            )
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{self.name}: {error}") from error
        self._kept[self.address(made[0])] = made[0]
        return made[0]

    def host_array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._own.append(memory)
        array = np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)
        if nbytes:
            # Where it is refused, who pins the large memory is told.
            with contextlib.suppress(OSError):
                self.pin(array.ctypes.data, nbytes)
        return array

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def pin(self, address: int, nbytes: int) -> None:
        torch.cuda.set_device(self._index)  # of this thread
        if self._runtime.pin(address, nbytes):
            self._pinned.append(address)

    def unpin(self) -> None:
        while self._pinned:
            self._runtime.unpin(self._pinned.pop())

    def mark(self, key: Hashable) -> CudaEvent:
        found = self._marks.get(key)
        if found is None:
            event = torch.cuda.Event(external=True) if self._external else torch.cuda.Event()
            found = self._marks[key] = CudaEvent(event, self.compute)
        return found

    def reach(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        event.event.record(event.stream.stream)

    def move(self, target: Any, source: Any) -> None:
        _tensor(target).copy_(_tensor(source), non_blocking=True)

    assign = move

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self._index)
        return int(free), int(total)

    # ---- the event loop ----

    def when(self, event: Event, callback: Work) -> None:
        assert isinstance(event, CudaEvent)
        if event.done() and not event.stream.waiting:
            self._loop.call_soon(callback)
        else:
            event.stream.signal(event, callback, self._fd)

    def _woken(self) -> None:
        os.eventfd_read(self._fd)
        for stream in (self.compute, self.aside, self.uploads, self.downloads):
            for callback in stream.due():
                callback()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def failure(self) -> BaseException | None:
        """Errors of the device are raised by the calls themselves."""
        return None

    # ---- operations ----

    def make_ops(self, *, threads: int, max_tokens: int, isa: str) -> DeviceOps:
        from fomoe.kernels.gpu.ops import GpuOps

        made: list[Any] = []
        self.compute.call(lambda: made.append(GpuOps(str(self._place), max_tokens)))
        return made[0]  # type: ignore[no-any-return]

    def workspace_bytes(self, ops: DeviceOps, **shapes: Any) -> int:
        return int(cast(Any, ops).workspace_bytes(**shapes))

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self.unpin()
        self._kept.clear()
        torch.cuda.empty_cache()


def _tensor(array: Any) -> Any:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array
