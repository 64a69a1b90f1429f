"""The memory plan: what the process will hold, decided and shown before anything is loaded.

Owns: dividing a budget. Does not know: files, arrays; it works on byte counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fomoe.config import format_size
from fomoe.errors import BudgetError

if TYPE_CHECKING:
    from fomoe.device_plan import DevicePlan

# Part of what is free that is left to the system when the user names no budget.
_HEADROOM = 0.90
_SLACK = 8 << 20
# Slots that belong to no layer: what is read while every slot of a layer is in use. As many experts
# as keep a drive busy (techniques: 8 to 16 MB in flight) while the next layer is prepared.
_TRANSIT_SHARE = 16
_TRANSIT_MAX = 48
_GUESSES = 3  # experts of the next layer that are read ahead for one token


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNeed:
    """One layer's experts: bytes of a slot, number of experts, experts a token picks."""

    slot_bytes: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotClass:
    """Slots of one size: `layers` use them, `transit` of them belong to no layer."""

    slot_bytes: int
    layers: tuple[int, ...]
    transit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """A budget divided, in bytes. `fixed` lists what has to be held whatever the cache is, (name,
    bytes); `quota` is the number of expert slots of each layer, `num_experts` that of all layers'
    experts; `streamed_bytes_per_token` is what a token picks, in slots or not; `devices` have plans
    of their own."""

    budget: int
    budget_source: str
    fixed: tuple[tuple[str, int], ...]
    quota: tuple[int, ...]
    classes: tuple[SlotClass, ...]
    num_experts: int
    streamed_bytes_per_token: int
    holds_embedding: bool = False
    devices: tuple[DevicePlan, ...] = ()

    @property
    def fixed_bytes(self) -> int:
        return sum(size for _, size in self.fixed)

    @property
    def slot_bytes(self) -> int:
        return sum(
            c.slot_bytes * (c.transit + sum(self.quota[i] for i in c.layers)) for c in self.classes
        )

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.slot_bytes

    @property
    def num_slots(self) -> int:
        return sum(self.quota)

    @property
    def all_resident(self) -> bool:
        return self.num_slots == self.num_experts

    def lines(self) -> list[str]:
        """The plan as text, one line an item."""
        share = 100 * self.num_slots / self.num_experts
        transit = sum(c.transit for c in self.classes)
        rows = [(name, format_size(size), "") for name, size in self.fixed]
        note = f"{self.num_slots} of {self.num_experts} experts ({share:.0f} %)"
        if transit:
            note += f", {transit} in transit"
        rows.append(("expert slots", format_size(self.slot_bytes), note))
        rows.append(
            ("total", format_size(self.total_bytes),
             f"of {format_size(self.budget)} ({self.budget_source})")
        )  # fmt: skip
        rows.append(
            ("experts per token", format_size(self.streamed_bytes_per_token),
             "read from disk where not in a slot")
        )  # fmt: skip
        own = [f"  {name:<20}{size:>12}  {text}".rstrip() for name, size, text in rows]
        return own + [line for device in self.devices for line in device.lines()]


def make_plan(
    *,
    budget: int | None,
    available: int,
    fixed: Sequence[tuple[str, int]],
    layers: Sequence[LayerNeed],
    expert_bytes_per_token: int,
    embedding_bytes: int = 0,
    cache_share: float = 1.0,
) -> MemoryPlan:
    """Divide `budget` bytes (None: most of `available`, but no more than there is use for).
    No layer gets slots for more than `cache_share` of its experts. The embedding (0: it is not in
    question) is held where there is room for it beside every expert: nothing is read then.

    Raises BudgetError, with the number that would do, when one layer's working set does not fit.
    """
    fixed_bytes = sum(size for _, size in fixed)
    by_size: dict[int, list[int]] = {}
    for i, layer in enumerate(layers):
        by_size.setdefault(layer.slot_bytes, []).append(i)
    everything = sum(layer.slot_bytes * layer.num_experts for layer in layers)
    minimum = fixed_bytes + sum(
        size * max(layers[i].top_k for i in members) for size, members in by_size.items()
    )
    source = "given"
    if budget is None:
        budget = min(int(available * _HEADROOM), fixed_bytes + everything + embedding_bytes)
        source = f"planned from {format_size(available)} free"
    if budget < minimum:
        raise _too_small(f"{format_size(budget)} ({source})", minimum, fixed)
    room = budget - fixed_bytes
    holds_embedding = 0 < embedding_bytes <= room - everything and cache_share == 1.0
    if holds_embedding:
        fixed = [*fixed, ("embedding", embedding_bytes)]
    if room >= everything and cache_share == 1.0:
        quota = [layer.num_experts for layer in layers]
        transit = dict.fromkeys(by_size, 0)
    else:
        transit = _transit(room, layers, by_size)
        room -= sum(size * n for size, n in transit.items())
        quota = [
            min(n, int(layer.num_experts * cache_share))
            for n, layer in zip(share_out(room, layers), layers, strict=True)
        ]
    return MemoryPlan(
        budget=budget,
        budget_source=source,
        fixed=tuple(fixed),
        quota=tuple(quota),
        classes=tuple(
            SlotClass(slot_bytes=size, layers=tuple(members), transit=transit[size])
            for size, members in sorted(by_size.items())
        ),
        num_experts=sum(layer.num_experts for layer in layers),
        streamed_bytes_per_token=expert_bytes_per_token,
        holds_embedding=holds_embedding,
    )


def _too_small(budget: str, minimum: int, fixed: Sequence[tuple[str, int]]) -> BudgetError:
    """Names a budget that will do at the next try, when the process may be a little larger."""
    needed_mib = -(-(minimum + _SLACK) >> 20)
    experts_bytes = minimum - sum(size for _, size in fixed)
    return BudgetError(
        f"a memory budget of {budget} is too small: this model needs {needed_mib} MiB: "
        + ", ".join(f"{name} {format_size(size)}" for name, size in fixed)
        + f", {format_size(experts_bytes)} for the experts of one layer and"
        f" {format_size(_SLACK)} to spare. Give more with --dram, or shorten the context (-c) or"
        " the step (-ub)"
    )


def _transit(
    room: int, layers: Sequence[LayerNeed], by_size: dict[int, list[int]]
) -> dict[int, int]:
    """Slots of each size that belong to no layer: at least one token's picks, some for guesses
    where a cache is left beside them, at most what is useful.
    """
    result = {}
    for size, members in by_size.items():
        least = max(layers[i].top_k for i in members)
        slots = room * len(members) // len(layers) // size
        if least + _GUESSES <= slots // 4:
            least += _GUESSES
        part = slots // _TRANSIT_SHARE
        most = max(_TRANSIT_MAX, least)
        result[size] = min(max(part, least), most, max(layers[i].num_experts for i in members))
    return result


def share_out(room: int, layers: Sequence[LayerNeed]) -> list[int]:
    """Slots of each layer: the same share of every layer's experts, then one more in order."""
    everything = sum(layer.slot_bytes * layer.num_experts for layer in layers)
    room = min(room, everything)
    quota = [layer.num_experts * room // everything for layer in layers]
    left = room - sum(layer.slot_bytes * n for layer, n in zip(layers, quota, strict=True))
    for i, layer in enumerate(layers):
        if quota[i] < layer.num_experts and layer.slot_bytes <= left:
            quota[i] += 1
            left -= layer.slot_bytes
    return quota
