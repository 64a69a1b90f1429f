"""What device_cuda.py uses of torch.cuda and of the CUDA runtime, on a machine without a card.

Owns: streams that work at once, and events that are reached a little later, when a host function
behind them has been called from another thread, as the driver does.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import torch


class FakeStream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.cuda_stream = id(self)
        self.waited: list[Any] = []
        FAKES[id(self)] = self

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def wait_stream(self, stream: Any) -> None:
        """What that one was given is done at once."""


class FakeEvent:
    def __init__(self, external: bool = False) -> None:
        self.external = external
        self.reached = False

    def record(self, stream: FakeStream) -> None:
        self.stream = stream
        self.reached = False

    def query(self) -> bool:
        return self.reached


FAKES: dict[int, FakeStream] = {}


def fake_library(*, refuse_pinning: bool = False) -> Any:
    """The functions of libcudart that fomoe calls; `pinned` and `copies` tell what they did."""
    pinned: dict[int, int] = {}
    copies: list[int] = []
    timers: list[threading.Timer] = []

    def register(address: int, nbytes: int, flags: int) -> int:
        if refuse_pinning:
            return 2
        if address in pinned:
            return 712
        pinned[address] = nbytes
        return 0

    def unregister(address: int) -> int:
        return 0 if pinned.pop(address, 0) else 713

    def copy(target: int, source: int, nbytes: int, kind: int, stream: int) -> int:
        ctypes.memmove(target, source, nbytes)
        copies.append(nbytes)
        return 0

    def launch(stream: int, function: int, data: int) -> int:
        events = list(FAKES[stream].waited)

        def run() -> None:
            for event in events:
                event.reached = True
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)

        timers.append(threading.Timer(2e-4, run))
        timers[-1].start()
        return 0

    def error_string(code: int) -> bytes:
        return b"out of memory" if code == 2 else b"invalid argument"

    def last_error() -> int:
        return 0

    return SimpleNamespace(
        pinned=pinned,
        copies=copies,
        cudaHostRegister=register,
        cudaHostUnregister=unregister,
        cudaMemcpyAsync=copy,
        cudaLaunchHostFunc=launch,
        cudaGetErrorString=error_string,
        cudaGetLastError=last_error,
    )


def install(monkeypatch: Any) -> None:
    """Let torch.cuda be the fake one."""
    for name, fake in {
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": FakeStream,
        "set_device": lambda index: None,
        "mem_get_info": lambda index: (1 << 30, 2 << 30),
        "empty_cache": lambda: None,
        "synchronize": lambda index: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
