"""The plan of one device's memory, decided and shown before anything is loaded.

Owns: dividing a device's budget. Does not know: devices, files; it works on byte counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fomoe.config import format_size
from fomoe.errors import BudgetError
from fomoe.plan import LayerNeed, share_out

# Part of what is free on a device that is left to others when the user names no budget.
_HEADROOM = 0.92
# Staging slots beyond those that the misses of one layer need: a large prompt's experts are copied
# in batches of half of them, so that a batch's kernels are long beside their launch.
_STAGING_SHARE = 16
_STAGING_HALF = 32
_GRAIN = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingClass:
    """Slots of one size, for `layers`: `staging` of them go round."""

    slot_bytes: int
    layers: tuple[int, ...]
    staging: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """A device's budget divided; `quota`: expert slots of each of its layers that has some."""

    name: str
    budget: int
    budget_source: str
    fixed: tuple[tuple[str, int], ...]
    quota: Mapping[int, int]
    classes: tuple[StagingClass, ...]
    num_layers: int
    num_experts: int

    @property
    def num_slots(self) -> int:
        return sum(self.quota.values())

    @property
    def all_resident(self) -> bool:
        return self.num_slots == self.num_experts

    @property
    def staging_bytes(self) -> int:
        return sum(c.slot_bytes * c.staging for c in self.classes)

    @property
    def slot_bytes(self) -> int:
        return sum(c.slot_bytes * sum(self.quota[i] for i in c.layers) for c in self.classes)

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.fixed) + self.staging_bytes + self.slot_bytes

    def lines(self) -> list[str]:
        """The plan as text, one line an item."""
        rows = [(name, format_size(size), "") for name, size in self.fixed]
        if self.classes:
            staging = sum(c.staging for c in self.classes)
            share = 100 * self.num_slots / self.num_experts
            rows.append(("staging", format_size(self.staging_bytes), f"{staging} experts"))
            rows.append(
                ("expert slots", format_size(self.slot_bytes),
                 f"{self.num_slots} of {self.num_experts} experts ({share:.0f} %)")
            )  # fmt: skip
        rows.append(
            ("total", format_size(self.total_bytes),
             f"of {format_size(self.budget)} ({self.budget_source})")
        )  # fmt: skip
        head = f"memory of {self.name}, {self.num_layers} layers"
        return [head, *(f"  {name:<20}{size:>12}  {text}".rstrip() for name, size, text in rows)]


def make_device_plan(
    *,
    name: str,
    budget: int | None,
    free: int,
    fixed: Sequence[tuple[str, int]],
    layers: Mapping[int, LayerNeed],
    num_layers: int,
) -> DevicePlan:
    """Divide `budget` bytes (None: most of what is `free`, but no more than there is use for).
    `layers`: those whose experts come to the device.

    Raises BudgetError, with the number that would do.
    """
    fixed_bytes = sum(size for _, size in fixed)
    by_size: dict[int, list[int]] = {}
    for i, layer in layers.items():
        by_size.setdefault(layer.slot_bytes, []).append(i)
    # The misses of one layer, twice.
    least = {size: 2 * max(layers[i].top_k for i in own) for size, own in by_size.items()}
    minimum = fixed_bytes + sum(size * n for size, n in least.items())
    everything = sum(need.slot_bytes * need.num_experts for need in layers.values())
    source = "given"
    if budget is None:
        budget = min(int(free * _HEADROOM), minimum + everything)
        source = f"planned from {format_size(free)} free"
    elif budget > free:
        raise BudgetError(
            f"--vram {format_size(budget)} is more than the {format_size(free)} that are free on"
            f" {name}: give less, or free memory there"
        )
    if budget < minimum:
        need = -(-minimum // _GRAIN)
        raise BudgetError(
            f"{format_size(budget)} on {name} ({source}) are too few: this model needs {need} MiB"
            " there: "
            + ", ".join(f"{what} {format_size(size)}" for what, size in fixed)
            + f" and {format_size(minimum - fixed_bytes)} for experts on their way. Give more with"
            " --vram, spread the layers over more devices, or shorten the context (-c) or the step"
            " (-ub)"
        )
    room = budget - fixed_bytes
    staging = {}
    for size, own in by_size.items():
        useful = room // _STAGING_SHARE // size // len(by_size) // 2
        most = max(layers[i].num_experts for i in own)
        staging[size] = max(least[size], 2 * min(useful, _STAGING_HALF, most))
    needs = list(layers.values())
    left = room - sum(size * n for size, n in staging.items())
    quota = dict(zip(layers, share_out(max(left, 0), needs), strict=True))
    return DevicePlan(
        name=name,
        budget=budget,
        budget_source=source,
        fixed=tuple(fixed),
        quota=quota,
        classes=tuple(
            StagingClass(slot_bytes=size, layers=tuple(own), staging=staging[size])
            for size, own in sorted(by_size.items())
        ),
        num_layers=num_layers,
        num_experts=sum(need.num_experts for need in needs),
    )
