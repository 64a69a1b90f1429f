"""Which tokens make up the next step: plain policy over the sequences that are waiting and running.

Owns: the order of sequences, and how a step is filled. Does not know: the model, memory, text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fomoe.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """`length` tokens of a sequence from position `start` on, computed in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def is_prompt(self) -> bool:
        """The chunk's tokens were given, not generated."""
        return self.start < self.sequence.num_prompt

    @property
    def decodes(self) -> bool:
        """One token that was generated, or that is to be computed as if it had been."""
        return self.length == 1 and (not self.is_prompt or self.sequence.stepwise)

    @property
    def completes(self) -> bool:
        """The chunk reaches the sequence's last known token: its logits say what comes next."""
        return self.start + self.length == len(self.sequence.tokens)


class Scheduler:
    """First come, first served; sequences that generate go before prompts, so that a long prompt
    does not stop those who are being answered."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def admit(self, start: Callable[[Sequence], bool]) -> None:
        """Start waiting sequences, in order, for as long as `start` finds room for them."""
        while self.waiting and start(self.waiting[0]):
            self.running.append(self.waiting.popleft())

    def next_step(self) -> list[Chunk]:
        """The next step's chunks, at most max_tokens tokens; empty when there is nothing to do."""
        room = self._max_tokens
        chunks = []
        by_need = sorted(self.running, key=lambda s: s.num_pending > 1)
        for sequence in by_need:
            if sequence.is_held_up:
                continue
            length = min(sequence.num_pending, room)
            if sequence.stepwise:
                length = min(length, 1)
            if length > 0:
                chunks.append(Chunk(sequence, sequence.num_computed, length))
                room -= length
        return chunks
