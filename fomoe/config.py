"""Options of an engine: one frozen dataclass, built once at the edge and passed down.

Owns: names, defaults and the checks that need no file. Does not know: the model, the machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fomoe.errors import RequestError
from fomoe.experts.car_options import CarOptions
from fomoe.experts.predict import Mode
from fomoe.io.files import Direct
from fomoe.io.open import Io

# Beyond any machine's; scratch memory is counted by the thread.
_MAX_THREADS = 4096

_UNITS = {
    "": 1, "b": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 10**3,
    "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes from "4GiB", "4G" (both 2^32), "4GB" (4e9), "512MiB" or a plain number of bytes."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise RequestError(f"{text!r} is not a size; write for example 16GiB, 16G or 800MiB")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size >= 1 << 63:
        raise RequestError(f"{text[:40]!r} is more than any machine has")
    return int(size)


def format_size(nbytes: float) -> str:
    """Bytes as a short text in binary units: "3.21 GiB"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine runs. Names follow llama.cpp's flags where it has them. Raises RequestError for
    values that cannot be.

    dram: bytes that the process may use in all; None plans from what the machine has free.
    context: tokens of KV cache, shared by all sequences that run at once.
    ubatch: tokens of one forward step at most.
    parallel: sequences that run at once; further ones wait for their turn.
    logit_rows: rows of logits that the callers of logits() hold at a time, for the memory plan.
    threads: that compute, the caller's among them; None takes every processor.
    cache_type: element type of the KV cache, "f16" or "f32".
    io, direct: how files are read (see fomoe.io.open).
    cpu_isa: "auto", or a lesser instruction set than the processor has, for comparisons.
    cache_policy: who stays in the expert cache (see fomoe.experts.cache).
    cache_share: slots for at most this share of a layer's experts, whatever the budget: what a file
        so much larger than memory would have.
    replicas: files or folders that hold the same model on other drives, read side by side.
    prefetch: reads of predicted experts, "auto" (while they pay), "on" or "off".
    profile: a file of use counts that seeds the cache, and is written at close.
    record_routes: a file that every routing is recorded to (see fomoe.experts.routes).
    car: cache-aware routing; exact routing unless it names a rule.
    car_audit: share of generated tokens that are computed exactly as well, to meter CAR's cost.
    backfill: read what stand-ins displaced while the drive is idle.
    deterministic: with CAR, the same text on any drive: residents change between tokens only.
    device: where layers are computed: "cpu", "cuda:0", "hip:0"; several take turns (cuda:0,cuda:1)
    vram: bytes of each device's memory that may be used; empty plans from what is free there.
    cpu_moe, n_cpu_moe: the processor computes the experts of all layers, or of the first n.
    process_bytes: what the memory plan counts for the process itself; None takes what it has now.
    trace: a file that reads, stalls and compute are recorded to (see fomoe.trace).
    cache_dir: where the measured speed of drives is kept; None measures anew.
    """

    dram: int | None = None
    context: int = 4096
    ubatch: int = 512
    parallel: int = 4
    logit_rows: int = 0
    threads: int | None = None
    cache_type: str = "f16"
    io: Io = "auto"
    direct: Direct = "auto"
    cpu_isa: str = "auto"
    cache_policy: str = "lfu"
    cache_share: float = 1.0
    replicas: tuple[Path, ...] = ()
    prefetch: Mode = "auto"
    profile: Path | None = None
    record_routes: Path | None = None
    car: CarOptions = field(default_factory=CarOptions)
    car_audit: float = 0.0
    backfill: bool = True
    deterministic: bool = False
    device: str = "cpu"
    vram: tuple[int, ...] = ()
    cpu_moe: bool = False
    n_cpu_moe: int = 0
    process_bytes: int | None = None
    trace: Path | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("context", "ubatch", "parallel"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.threads is not None and not 1 <= self.threads <= _MAX_THREADS:
            raise RequestError(f"threads must be 1 to {_MAX_THREADS}, not {self.threads}")
        if self.dram is not None and self.dram < 1:
            raise RequestError(f"dram must be a positive number of bytes, not {self.dram}")
        if not 0.0 < self.cache_share <= 1.0:
            raise RequestError(f"cache_share is a share between 0 and 1, not {self.cache_share}")
        self._check_devices()
        if not 0.0 <= self.car_audit <= 1.0:
            raise RequestError(f"car_audit is a share between 0 and 1, not {self.car_audit}")
        for name, allowed in (
            ("prefetch", ("auto", "on", "off")),
            ("cache_type", ("f16", "f32")),
            ("io", ("auto", "uring", "threads")),
            ("direct", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise RequestError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )

    def _check_devices(self) -> None:
        count = len(self.device.split(","))
        if len(self.vram) not in (0, 1, count):
            raise RequestError(
                f"vram has {len(self.vram)} sizes for {count} devices: give one for all or one each"
            )
        if any(size < 1 for size in self.vram):
            raise RequestError("vram must be a positive number of bytes")
        if self.n_cpu_moe < 0:
            raise RequestError(f"n_cpu_moe must be 0 or more, not {self.n_cpu_moe}")
        if self.device == "cpu" and not self.vram and (self.cpu_moe or self.n_cpu_moe):
            raise RequestError("cpu_moe is for a device beside the processor: name one (--device)")


def parse_sizes(sizes: str | int | Sequence[str | int]) -> tuple[int, ...]:
    """Bytes from "14GiB", or from several sizes: "14GiB,10GiB", or a sequence."""
    if isinstance(sizes, int):
        return (sizes,)
    parts = sizes.split(",") if isinstance(sizes, str) else sizes
    return tuple(parse_size(part) for part in parts)
