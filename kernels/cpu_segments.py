"""The segments of a step as C takes them, made once for all layers.

Owns: the C structs of segments and states. Does not know: what is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fomoe.kernels.cpu_arrays import Views
from fomoe.kernels.ops import Segment
from fomoe.native import ffi

_IDS = ffi.typeof("int32_t[]")


class Segments:
    """The segments of the latest step. `version` changes with the sequences and their lengths, but
    not with positions: a step that looks like the one before costs the layers a comparison."""

    def __init__(self, views: Views) -> None:
        self.version = 0
        self.count = 0
        self.c: Any = ffi.NULL  # fomoe_segment[count]
        self._views = views
        self._now: Sequence[Segment] = ()
        self._layout: list[tuple[int, int, Any]] = []  # start, length, states

    def update(self, segments: Sequence[Segment]) -> None:
        """Take a step's segments, unless they are those already."""
        if segments is self._now:
            return
        self._now = segments
        layout = [(s.start, s.length, s.delta) for s in segments]
        if not _same(layout, self._layout):
            self.version += 1
            self._layout = layout
            self.count = len(segments)
            self.c = ffi.new("fomoe_segment[]", self.count)
        for i, s in enumerate(segments):
            c = self.c[i]
            c.start, c.length, c.position = s.start, s.length, s.position
            c.pages = ffi.from_buffer(_IDS, s.pages)

    def states(self, layer: int) -> Any:
        """fomoe_delta_segment[count] of a delta-net layer."""
        made = ffi.new("fomoe_delta_segment[]", self.count)
        for i, s in enumerate(self._now):
            c, state = made[i], s.delta[layer]
            assert state is not None, layer
            c.start, c.length = s.start, s.length
            c.conv, c.s = self._views.of(state.conv).pointer, self._views.of(state.s).pointer
        return made


def _same(a: list[tuple[int, int, Any]], b: list[tuple[int, int, Any]]) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and x[1] == y[1] and x[2] is y[2] for x, y in zip(a, b, strict=True)
    )
