"""Threads of the host that stand for a device: `--device cpu,cpu`, and every test of the schedule.

Owns: streams as worker threads, device memory as memory of the process. Does not know: models,
experts. A stream's work runs truly beside the event loop and beside other streams, so what is
ordered wrongly shows. Its Ops are CpuOps. Never chosen for speed: the engine without a device is
faster on a host.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from math import prod
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fomoe.kernels.cpu import CpuOps
from fomoe.kernels.cpu_arrays import CpuWeight, F32Array
from fomoe.kernels.device import (
    DEVICE_ALIGNMENT,
    LIMIT_BYTES,
    Choose,
    DeviceOps,
    Event,
    StandInRule,
)
from fomoe.kernels.ops import MoeSpec, Routing, Segment
from fomoe.kernels.table import QuantType

R = TypeVar("R")
Work = Callable[[], object]
HostStandIns = tuple[Choose, npt.NDArray[np.uint8]]


class HostEvent:
    """fomoe.kernels.device.Event."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Work] = []

    def done(self) -> bool:
        return self._reached.is_set()

    def wait(self) -> None:
        """Block the calling thread."""
        self._reached.wait()

    def reach(self) -> None:
        with self._lock:
            self._reached.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def then(self, callback: Work) -> None:
        """Call back once it is reached, at once where it is: from whatever thread."""
        with self._lock:
            if not self._reached.is_set():
                self._callbacks.append(callback)
                return
        callback()


class HostStream:
    """fomoe.kernels.device.Stream: a thread that works through a queue.

    After a failure no more work is done, but events are still reached, so that nobody waits in vain
    and who looks (`failure`) finds out why; `left_out` is called for work that is not done.
    """

    def __init__(self, name: str, pause: Work | None = None, left_out: Work | None = None) -> None:
        self.failure: BaseException | None = None
        self._pause = pause
        self._left_out = left_out
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Work) -> None:
        def run() -> None:
            if self._pause and self.failure is None:
                self._pause()
            try:
                if self.failure is None:
                    work()
            except BaseException as error:
                self.failure = error
            if self.failure is not None and self._left_out:
                self._left_out()

        self._queue.put(run)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.call(lambda: ctypes.memmove(target, source, nbytes))

    def record(self) -> HostEvent:
        event = HostEvent()
        self._queue.put(event.reach)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, HostEvent)
        if not event.done():
            self._queue.put(event.wait)

    def close(self) -> None:
        """End the thread, after what is queued."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()


class HostDevice:
    """fomoe.kernels.device.Device in host memory. `pause` is called before every piece of work of
    every stream: tests sleep in it. `shares_memory` False computes nothing from host memory."""

    def __init__(
        self, name: str = "cpu", *, pause: Work | None = None, shares_memory: bool = True
    ) -> None:
        self.name = name
        self.shares_memory = shares_memory
        self.recorded_bytes = 0
        self.poll_ns = 0  # it would take the processor from the streams
        self._marks: set[HostEvent] = set()  # not reached yet
        self.compute = HostStream(f"fomoe-{name}-compute", pause, self._reach_all)
        self.aside = self.compute  # its operations are one thread's
        self.uploads = HostStream(f"fomoe-{name}-uploads", pause)
        self.downloads = HostStream(f"fomoe-{name}-downloads", pause)
        self._streams = self.compute, self.uploads, self.downloads
        self._loop = asyncio.get_running_loop()
        self._arrays: dict[int, npt.NDArray[Any]] = {}

    def allocate(self, nbytes: int) -> int:
        return self.address(self.array((nbytes,), np.uint8))

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        memory = np.zeros(nbytes + DEVICE_ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % DEVICE_ALIGNMENT
        array = memory[start : start + nbytes].view(dtype).reshape(shape)
        self._arrays[self.address(array)] = array
        return array

    def host_array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.zeros(shape, dtype)

    def address(self, array: npt.NDArray[Any]) -> int:
        return int(array.ctypes.data)

    def pin(self, address: int, nbytes: int) -> None:
        """Nothing to do: a copy is this processor's own."""

    def unpin(self) -> None:
        """Nothing was pinned."""

    def when(self, event: Event, callback: Callable[[], None]) -> None:
        assert isinstance(event, HostEvent)
        event.then(lambda: self._loop.call_soon_threadsafe(callback))

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.record().wait()

    def failure(self) -> BaseException | None:
        return next((s.failure for s in self._streams if s.failure), None)

    def mark(self, key: Hashable) -> HostEvent:
        event = HostEvent()
        self._marks.add(event)
        return event

    def reach(self, event: Event) -> None:
        assert isinstance(event, HostEvent)
        self._marks.discard(event)
        event.reach()

    def _reach_all(self) -> None:
        while self._marks:
            self._marks.pop().reach()

    def move(self, target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
        target[...] = source

    assign = move

    def memory(self) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def make_ops(self, *, threads: int, max_tokens: int, isa: str) -> HostOps:
        return HostOps(threads, max_tokens, isa)

    def workspace_bytes(self, ops: DeviceOps, **shapes: Any) -> int:
        assert isinstance(ops, CpuOps)
        return CpuOps.workspace_bytes(ops.num_threads, ops.max_tokens, **shapes)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self._arrays.clear()


class HostOps(CpuOps):
    """CpuOps as a device's: all calls come from the thread of its compute stream."""

    def fixed_part(
        self,
        key: Hashable,
        segments: Sequence[Segment],
        launch: Callable[[], R],
        *,
        aside: bool = False,
    ) -> R:
        return launch()

    def reads(self, tensor_type: QuantType) -> bool:
        return True

    def stand_ins(
        self, spec: MoeSpec, rule: StandInRule, offered: npt.NDArray[np.uint8]
    ) -> HostStandIns:
        return rule.policy(), offered

    def route(
        self,
        spec: MoeSpec,
        x: F32Array,
        norm: F32Array,
        eps: float,
        router: CpuWeight,
        stand_ins: HostStandIns | None = None,
    ) -> Routing:
        said = super().route(spec, x, norm, eps, router)
        logits, ids, weights = said.logits.copy(), said.ids.copy(), said.weights.copy()
        routing = Routing(h=said.h.copy(), logits=logits, ids=ids, weights=weights)
        if stand_ins is not None:
            choose, offered = stand_ins
            limit = float(offered[:LIMIT_BYTES].view(np.float64)[0])
            there = offered[LIMIT_BYTES:].astype(np.bool_)
            routing.picked = ids, weights
            routing.ids, routing.weights = choose(logits, ids, weights, there, limit)
        return routing
