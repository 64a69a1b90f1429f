"""The chunks of a step as compute takes them: tokens in a row, and experts that they pick.

Owns: which rows are whose. Does not know: who made the chunks (scheduler.py), what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fomoe.errors import ReadError
from fomoe.kernels.ops import Routing, Segment
from fomoe.scheduler import Chunk


class ExpertLostError(Exception):
    """An expert could not be read: `error` says which. Only `chunks` had picked it."""

    def __init__(self, error: ReadError, chunks: Sequence[Chunk]) -> None:
        super().__init__(str(error))
        self.error = error
        self.chunks = chunks


def segments_of(chunks: Sequence[Chunk]) -> list[Segment]:
    """The chunks' tokens one after the other."""
    segments, start = [], 0
    for chunk in chunks:
        state = chunk.sequence.state
        assert state is not None
        segments.append(
            Segment(
                start=start,
                length=chunk.length,
                position=chunk.start,
                pages=state.pages,
                delta=state.delta,
            )
        )
        start += chunk.length
    return segments


def wanted_rows(chunk: Chunk, start: int) -> range:
    """The rows of a step, which the chunk begins at `start`, whose logits its sequence wants."""
    end = start + chunk.length
    if chunk.sequence.wants_all_logits:
        return range(min(start + max(chunk.sequence.logits_from - chunk.start, 0), end), end)
    return range(end - 1, end) if chunk.completes else range(0)


def distinct(routing: Routing) -> tuple[list[int], list[int]]:
    """The experts that a step needs, ascending when there are several tokens, and their tokens."""
    if len(routing.ids) == 1:
        experts: list[int] = routing.ids[0].tolist()
        return experts, [1] * len(experts)
    unique, counts = np.unique(routing.ids, return_counts=True)
    return unique.tolist(), counts.tolist()


def lost_expert(
    error: ReadError,
    expert: int,
    routing: Routing,
    chunks: Sequence[Chunk],
    segments: Sequence[Segment],
) -> ExpertLostError:
    """The error of a step that an expert is missing from, with the chunks that picked it."""
    lost = (routing.ids == expert).any(axis=1)  # [tokens]
    needed = [lost[s.start : s.start + s.length].any() for s in segments]
    return ExpertLostError(error, [c for c, need in zip(chunks, needed, strict=True) if need])
