"""What an engine has done: counters by phase, and the figures that people read.

Owns: the public statistics. Does not know: how they come about. A figure that was not measured is
None.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fomoe.config import format_size
from fomoe.experts.device_copies import TierStats
from fomoe.experts.predict import PrefetchStats
from fomoe.residency import ResidencyStats


@dataclass(slots=True)
class PhaseStats:
    """Counters of the steps of one kind: those that compute a prompt, or those of one token of
    each sequence, generated or computed as if it were.

    A pick is one expert of one token at one layer; a hit is a pick whose expert was in memory when
    the router named it; expert_reads and expert_bytes are of the drives. stall_seconds: the forward
    had nothing to compute until a read landed. Shares and rates are from 0 to 1, and None where
    nothing was counted.
    """

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    picks: int = 0
    hits: int = 0
    expert_reads: int = 0
    expert_bytes: int = 0
    stall_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.picks if self.picks else None

    @property
    def bytes_per_token(self) -> float | None:
        return self.expert_bytes / self.tokens if self.tokens else None

    @property
    def stall_share(self) -> float | None:
        return self.stall_seconds / self.seconds if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        derived = ("tokens_per_second", "hit_rate", "bytes_per_token", "stall_share")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """What a device's share of the experts has done."""

    name: str
    tier: TierStats

    def line(self) -> str:
        t = self.tier
        if not t.picks:
            return f"{self.name:<11} no picks"
        text = (
            f"{self.name:<11} {100 * t.pick_hits / t.picks:.1f} % of the picks in its memory,"
            f" {format_size(t.copied_bytes)} copied there"
        )
        if t.copied_ahead:
            text += f" ({t.copied_ahead} of {t.copied} experts ahead, {t.staged_hits} of them used)"
        if t.lowered:
            text += f", {t.lowered} experts copied back to memory"
        return text + f", {100 * t.host_uses / t.uses:.1f} % of the uses left to the processor"


@dataclass(slots=True)
class Stats:
    """Everything since the engine was opened. `load_seconds` is the time that opening it took, the
    rate that of reading its dense weights; `short_reads` and `read_retries` count what the reader
    continued and tried again; None is what was not measured.
    """

    prompt: PhaseStats = field(default_factory=PhaseStats)
    generation: PhaseStats = field(default_factory=PhaseStats)
    load_seconds: float = 0.0
    load_gb_per_second: float | None = None
    read_retries: int = 0
    short_reads: int = 0
    landed_to_compute_us: float | None = None  # median, from a read's landing to its compute
    peak_bytes: int = 0  # the largest resident set of the process so far, 0: not known
    planned_bytes: int = 0  # what the memory plan allows it
    residency: ResidencyStats | None = None  # what the policies did
    devices: list[DeviceStats] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        result = dataclasses.asdict(self)
        return result | {"prompt": self.prompt.to_dict(), "generation": self.generation.to_dict()}

    def lines(self) -> list[str]:
        """The figures as text, one line a phase, then what the policies did."""
        result = [_phase("prompt", self.prompt), _phase("generation", self.generation)]
        result += [device.line() for device in self.devices]
        if self.residency:
            result += _prefetch_lines(self.residency)
            result += car_lines(self.residency)
        if self.landed_to_compute_us is not None:
            result.append(f"landed      to compute in {self.landed_to_compute_us:.0f} us (median)")
        if self.planned_bytes and self.peak_bytes:
            peak, planned = format_size(self.peak_bytes), format_size(self.planned_bytes)
            result.append(f"memory      {peak} at most, {planned} planned")
        return result


def _prefetch_lines(stats: ResidencyStats) -> list[str]:
    lines = []
    recall, prefetch = stats.recall, stats.prefetch
    if recall.picks:
        misses = "no misses"
        if recall.misses:
            misses = f"{100 * recall.misses_foreseen_at_k / recall.misses:.1f} % of the misses"
        at_k = 100 * recall.foreseen_at_k / recall.picks
        lines.append(f"prediction  {at_k:.1f} % of the picks foreseen, {misses}")
    if prefetch.issued:
        lines.append(
            f"prefetch    {prefetch.issued} experts read ahead, {prefetch.useful} used,"
            f" {prefetch.wasted} in vain{_switched(prefetch)}"
        )
    elif recall.picks:
        lines.append(f"prefetch    nothing was worth reading ahead{_switched(prefetch)}")
    return lines


def _switched(prefetch: PrefetchStats) -> str:
    times = prefetch.switched_off
    if not times:
        return ""
    often = "once" if times == 1 else f"{times} times"
    return f"; found not to pay {often}, now {'off' if prefetch.paused else 'on again'}"


def car_lines(stats: ResidencyStats) -> list[str]:
    """What stand-ins cost so far; nothing where no rule is on."""
    car, backfill = stats.car, stats.backfill
    if not car.picks:
        return []
    lines = [
        f"CAR         {100 * car.substitutions / car.picks:.1f} % of the picks substituted,"
        f" {100 * car.moved_mass / car.token_layers:.2f} % of the weight moved,"
        f" {car.reads_avoided} reads avoided, {backfill.read} backfilled"
    ]
    if car.audits:
        lines.append(
            f"CAR audit   {car.audits} tokens: KL divergence {car.audit_kl / car.audits:.5f} nats"
            f" in the mean, {car.audit_kl_max:.5f} at most;"
            f" {100 * car.audit_agreements / car.audits:.1f} % the same first choice"
        )
    return lines


def _phase(name: str, phase: PhaseStats) -> str:
    if not phase.tokens:
        return f"{name:<11} no tokens"
    text = f"{name:<11} {phase.tokens} tokens, {phase.tokens_per_second:.2f} tokens per second"
    if phase.hit_rate is not None:
        text += (
            f", hit rate {100 * phase.hit_rate:.1f} %"
            f", {format_size(phase.bytes_per_token or 0)} read per token"
            f", stalled {100 * (phase.stall_share or 0):.1f} % of the time"
        )
    return text
