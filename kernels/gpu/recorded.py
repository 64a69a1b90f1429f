"""Launches that are recorded once and played back: CUDA graphs, where the device has them.

Owns: the graphs. Does not know: what is launched.

An event that is recorded in a graph has to be an external one (torch.cuda.Event(external=True)):
every launch of the graph then records it anew, at its place in the middle. Where those are not to
be had nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")


def lacks_graphs() -> str | None:
    """What this torch lacks for recording, as a reason; None where it has all."""
    if torch.version.hip and int(torch.version.hip.split(".")[0]) < 7:
        return f"ROCm {torch.version.hip} has no external events, 7.0 has"
    try:
        torch.cuda.Event(external=True)
    except TypeError:
        return f"torch {torch.__version__} has no external events"
    return None


def has_graphs(device: Any) -> bool:
    return bool(device.type == "cuda") and lacks_graphs() is None


class Recorded(Generic[R]):
    """What was recorded under each key, for one device."""

    def __init__(self, device: Any) -> None:
        self._records = has_graphs(device)
        self._graphs: dict[Hashable, tuple[Any, R]] = {}
        self._warm: set[Hashable] = set()
        self._pool: Any = None  # the graphs run one after the other, and share their memory
        self._generation = -1

    def run(self, key: Hashable, launch: Callable[[], R], generation: int) -> R:
        """Queue what `launch` queues, and return what it returned when it was last called.

        The first time of a key it is called (which compiles kernels, allocates, and may make
        scratch grow), the second time recorded, from then on played back. `generation` counts the
        times that memory moved which the launches use: what was recorded before is void then.
        """
        if not self._records:
            return launch()
        if generation != self._generation:
            self.clear()
            self._generation = generation
        found = self._graphs.get(key)
        if found is None:
            if key not in self._warm:
                self._warm.add(key)
                return launch()
            found = self._graphs[key] = self._record(launch)
        graph, result = found
        graph.replay()
        return result

    def _record(self, launch: Callable[[], R]) -> tuple[Any, R]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: that synchronises and collects garbage, for every layer once.
        # Other threads may allocate or copy meanwhile: only what this one does is recorded.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = launch()
        finally:
            graph.capture_end()
        return graph, result

    def clear(self) -> None:
        self._graphs.clear()
        self._warm.clear()
