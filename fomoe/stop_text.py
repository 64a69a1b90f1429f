"""Texts that end a generation, found in text that comes in pieces.

Owns: what must be withheld since it may be the beginning of one. Does not know: tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Withholds text that may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""

    def push(self, text: str, *, last: bool) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop text was met (it and what follows are
        cut).
        """
        held = self._held + text
        found = [i for i in (held.find(s) for s in self._stops) if i >= 0]
        if found:
            return held[: min(found)], True
        keep = 0
        if not last:
            keep = max(
                (n for s in self._stops for n in range(1, len(s)) if held.endswith(s[:n])),
                default=0,
            )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False
