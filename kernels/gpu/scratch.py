"""Scratch memory of one device's operations: one after the other, they all use the same.

Owns: one allocation and the views of it. Does not know: who uses it for what.
"""

from __future__ import annotations

from typing import Any

import torch

_ALIGNMENT = 64  # floats


def scratch_floats(*sizes: int) -> int:
    """Floats that take(*sizes) needs."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


class Scratch:
    """Grows when more is asked for than was reserved; `generation` counts how often it moved."""

    def __init__(self, device: Any) -> None:
        self._flat = torch.empty(0, dtype=torch.float32, device=device)
        self.generation = 0

    @property
    def num_bytes(self) -> int:
        return 4 * int(self._flat.numel())

    def reserve(self, num_floats: int) -> None:
        if num_floats > self._flat.numel():
            self._flat = torch.empty(num_floats, dtype=torch.float32, device=self._flat.device)
            self.generation += 1

    def take(self, *sizes: int) -> list[Any]:
        """Uninitialised float32 vectors of those sizes, used by what is queued before the next
        take."""
        self.reserve(scratch_floats(*sizes))
        views, start = [], 0
        for size in sizes:
            views.append(self._flat[start : start + size])
            start += scratch_floats(size)
        return views
