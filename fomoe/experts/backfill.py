"""Displaced experts that wait to be read: the most wanted first, the least wanted forgotten.

Owns: their order. Does not know: reads, slots, when the drive is idle.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(slots=True)
class BackfillStats:
    """Displaced experts: asked for, handed out, read because they were worth a slot (which the
    caller counts), and forgotten for want of room."""

    queued: int = 0
    taken: int = 0
    read: int = 0
    forgotten: int = 0


class BackfillQueue:
    """At most `room` experts, ordered by the share of weight that was moved away from them."""

    def __init__(self, room: int = 512) -> None:
        self.stats = BackfillStats()
        self._room = room
        self._heap: list[tuple[float, int, int]] = []
        self._waiting: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, layer: int, expert: int, share: float) -> None:
        """An expert of a layer was displaced; one that waits already keeps its place."""
        if (layer, expert) in self._waiting:
            return
        self.stats.queued += 1
        self._waiting.add((layer, expert))
        heapq.heappush(self._heap, (-share, layer, expert))
        if len(self._heap) > self._room:
            # A sorted list is a heap; its last entry is the least wanted.
            self._heap.sort()
            _, lost_layer, lost_expert = self._heap.pop()
            self._waiting.discard((lost_layer, lost_expert))
            self.stats.forgotten += 1

    def take(self) -> tuple[int, int]:
        """The most wanted (layer, expert)."""
        _, layer, expert = heapq.heappop(self._heap)
        self._waiting.discard((layer, expert))
        self.stats.taken += 1
        return layer, expert
