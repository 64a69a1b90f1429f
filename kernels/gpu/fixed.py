"""The fixed part of a layer's step: memory at addresses that stay, mailboxes, recorded launches.

Owns: what lets launches be recorded under a key and played back. Does not know: what is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

from fomoe.kernels.gpu.recorded import Recorded
from fomoe.kernels.gpu.routing import Mailbox
from fomoe.kernels.gpu.scratch import Scratch

R = TypeVar("R")


class FixedParts:
    """Those of one device, which follow one another in the order of its stream: all of them work in
    the same memory, `routed` for what a router said and `experts` for their results."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.routed, self.experts = Scratch(device), Scratch(device)
        self._recorded: Recorded[Any] = Recorded(device)
        self._mailboxes: dict[Hashable, list[Mailbox]] = {}  # by the key of the part
        self._key: Hashable = None  # of the part that runs
        self._taken = 0  # of its mailboxes

    @property
    def num_bytes(self) -> int:
        return self.routed.num_bytes + self.experts.num_bytes

    def run(self, key: Hashable, launch: Callable[[], R], generation: int) -> R:
        """As Recorded.run; meanwhile take() and mailbox() are of this key."""
        for mailbox in self._mailboxes.setdefault(key, []):
            mailbox.clear()
        self._key, self._taken = key, 0
        try:
            moved = generation + self.routed.generation + self.experts.generation
            result: R = self._recorded.run(key, launch, moved)
        finally:
            self._key = None
        return result

    def take(self, scratch: Scratch, sizes: Sequence[int]) -> list[Any]:
        """Float32 vectors: in a fixed part those of `scratch`, at the same addresses every time,
        else new ones."""
        if self._key is not None:
            return scratch.take(*sizes)
        return [torch.empty(size, dtype=torch.float32, device=self._device) for size in sizes]

    def mailbox(self, picks: Any, logits: Any) -> Mailbox:
        """In a fixed part those that its key had before, in the same order, else new ones."""
        if self._key is None:
            return Mailbox.like(picks, logits)
        known = self._mailboxes[self._key]
        if self._taken == len(known):
            known.append(Mailbox.like(picks, logits))
        self._taken += 1
        return known[self._taken - 1]
