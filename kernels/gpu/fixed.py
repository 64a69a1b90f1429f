"""The fixed part of a layer's step: memory at addresses that stay, mailboxes, recorded launches.

Owns: what lets launches be recorded under a key and played back, and run beside one another. Does
not know: what is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from fomoe.kernels.gpu.recorded import Recorded
from fomoe.kernels.gpu.routing import Mailbox
from fomoe.kernels.gpu.scratch import Scratch

R = TypeVar("R")


def forks(device: Any) -> bool:
    """Whether a graph's branches run beside one another, as they do on NVIDIA's cards."""
    return bool(device.type == "cuda") and torch.version.hip is None


class Beside:
    """A second stream of a device, for what may run beside what follows it in a fixed part."""

    def __init__(self, device: Any) -> None:
        self._stream = torch.cuda.Stream(device)
        self._forked = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is queued inside runs after what is queued already, beside what comes after."""
        self._stream.wait_stream(torch.cuda.current_stream())
        self._forked = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is queued from here on comes after it."""
        if self._forked:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._forked = False


class FixedParts:
    """Those of one device, which follow one another in the order of its stream: all of them work in
    the same memory, `routed` for what a router said and `experts` for their results."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.beside = Beside(device) if forks(device) else None
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
            result: R = self._recorded.run(key, partial(self._joined, launch), moved)
        finally:
            self._key = None
        return result

    def _joined(self, launch: Callable[[], R]) -> R:
        result = launch()
        if self.beside:
            self.beside.join()
        return result

    @property
    def side(self) -> Beside | None:
        """For a fixed part's work that may run beside what follows it; None outside of one, where
        memory is the stream's own, and where a device has no use for it."""
        return None if self._key is None else self.beside

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
