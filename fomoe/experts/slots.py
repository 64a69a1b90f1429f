"""Slots: equal pieces of the arena that hold one expert each.

Owns: which slots of one size are free. Does not know: which expert lies where, who stays.
"""

from __future__ import annotations


class SlotPool:
    """The slots of one size. Layers fill theirs up to a quota; `transit` more belong to none, and
    carry experts that are read while every slot of their layer is in use."""

    def __init__(self, base: int, slot_bytes: int, num_slots: int, transit: int) -> None:
        self.base = base
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.transit = transit
        self._free = [base + i * slot_bytes for i in reversed(range(num_slots))]
        self._transit_left = transit

    @property
    def nbytes(self) -> int:
        return self.slot_bytes * self.num_slots

    def take(self) -> int:
        """A slot for a layer that is below its quota: there always is one."""
        return self._free.pop()

    def give(self, address: int) -> None:
        self._free.append(address)

    def take_transit(self, reserve: int = 0) -> int | None:
        """A slot that belongs to no layer, or None while at most `reserve` of those are free."""
        if self._transit_left <= reserve:
            return None
        self._transit_left -= 1
        return self._free.pop()

    def give_transit(self, address: int) -> None:
        """A transit slot is free again, or became a layer's, which gives `address` for it."""
        self._transit_left += 1
        self._free.append(address)
