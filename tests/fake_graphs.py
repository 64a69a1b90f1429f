"""CUDA graphs without a card: what is launched while one is captured is kept and played back, as a
driver does, and not done.

Owns: a log of the work that is queued, graph by graph or by itself. Kernels are those of Triton's
interpreter, and everything of torch that writes to memory counts as work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fake_cuda import FakeEvent, FakeStream
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

Work = Callable[[], Any]


class Log(TorchDispatchMode):  # type: ignore[misc]
    """`names`: of the work that was queued, in order; "graph" where a graph was played back."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.captured: list[Work] | None = None
        self._busy = False  # with work: what that does is part of it

    def work(self, name: str, run: Work, result: Any = None) -> Any:
        if self._busy:
            return run()
        if self.captured is not None:
            self.captured.append(run)
            return result
        self.names.append(name)
        return self._run(run)

    def play(self, works: list[Work]) -> None:
        assert self.captured is None
        self.names.append("graph")
        for work in works:
            self._run(work)

    def _run(self, work: Work) -> Any:
        self._busy = True
        try:
            return work()
        finally:
            self._busy = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def run() -> Any:
            return func(*args, **(kwargs or {}))

        if func._schema.is_mutable:
            return self.work(func.name(), run, args[0])
        made = func.name().split("::")[1].split(".")[0]
        views = any(r.alias_info is not None for r in func._schema.returns)
        assert self._busy or self.captured is None or views or made.startswith("empty"), (
            f"{func.name()} is done at once, and not when the graph is played back"
        )
        return run()


@contextmanager
def graphs(monkeypatch: Any, only: Collection[str] = ()) -> Iterator[Log]:
    """Let GpuOps on the CPU record graphs. `only`: the kernels that do anything, if not all do:
    most of the interpreter's time is products."""
    log = Log()
    launch = interpreter.GridExecutor.__call__

    def queue(kernel: Any, *args: Any, **kwargs: Any) -> None:
        name = kernel.fn.__name__

        def run() -> None:
            if not only or name in only:
                launch(kernel, *args, **kwargs)

        log.work(name, run)

    class FakeGraph:
        def __init__(self) -> None:
            self._works: list[Work] = []

        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            assert log.captured is None
            log.captured = self._works

        def capture_end(self) -> None:
            log.captured = None

        def replay(self) -> None:
            log.play(self._works)

    def record(event: FakeEvent, stream: FakeStream) -> None:
        if log.captured is None:
            record_now(event, stream)
        else:
            assert event.external, "nobody outside of the graph would hear of it"
            log.captured.append(lambda: record_now(event, stream))

    record_now = FakeEvent.record
    monkeypatch.setattr(FakeEvent, "record", record)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", queue)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr("fomoe.kernels.gpu.recorded.has_graphs", lambda device: True)
    with log:
        yield log
