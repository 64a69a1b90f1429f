"""Launches that are recorded once and played back: CUDA graphs, where the device has them.

Owns: the graphs. Does not know: what is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")


class Recorded(Generic[R]):
    """What was recorded under each key, for one device."""

    def __init__(self, device: Any) -> None:
        self._records = device.type == "cuda"
        self._graphs: dict[Hashable, tuple[Any, R]] = {}
        self._warm: dict[Hashable, R] = {}
        self._pool: Any = None  # the graphs run one after the other, and share their memory
        self._generation = -1

    def run(self, key: Hashable, launch: Callable[[R | None], R], generation: int) -> R:
        """Queue what `launch` queues, and return what it returned when it was last called.

        The first time of a key it is called (which compiles kernels, and may make scratch grow),
        the second time recorded, from then on played back. It is given what it returned the first
        time when it is recorded: host memory cannot be allocated then. `generation` counts the
        times that memory moved which the launches use: what was recorded before is void then.
        """
        if not self._records:
            return launch(None)
        if generation != self._generation:
            self.clear()
            self._generation = generation
        found = self._graphs.get(key)
        if found is None:
            if key not in self._warm:
                first = self._warm[key] = launch(None)
                return first
            found = self._graphs[key] = self._record(launch, self._warm.pop(key))
        graph, result = found
        graph.replay()
        return result

    def _record(self, launch: Callable[[R | None], R], first: R) -> tuple[Any, R]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate or copy meanwhile: only what this one does is recorded.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = launch(first)
        return graph, result

    def clear(self) -> None:
        self._graphs.clear()
        self._warm.clear()
