"""Recordings of runs that never were: a drive, a cache and layers acted out on a virtual clock."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path

from fomoe.trace import Tracer
from fomoe.trace_format import Kind, Part, Source

US = 1000
EXPERT_BYTES = 2 << 20


class Actor:
    """Acts out a run of `layers` layers that keep `slots` experts each, least recently used first
    out, over a drive of 1 GB/s that takes two reads at a time."""

    def __init__(
        self,
        tracer: Tracer,
        *,
        layers: int,
        experts: int,
        slots: int,
        top_k: int,
        gbps: float = 1.0,
    ) -> None:
        self.tracer = tracer
        self.layers, self.experts, self.slots, self.top_k = layers, experts, slots, top_k
        self.read_ns = EXPERT_BYTES
        self.now = 1_000_000
        self.drive_free = 0
        self.tokens = 0
        self.random = random.Random(1)
        self.resident: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(layers)]

    def compute(self, part: Part, time: int, layer: int = -1, expert: int = -1, n: int = 0) -> None:
        self.tracer.event(
            Kind.COMPUTE, self.now, self.now + time, layer, expert, self.tokens, part, n
        )
        self.now += time

    def step(self, tokens: int = 1) -> None:
        begin = self.now
        self.compute(Part.EMBED, 20 * US)
        for layer in range(self.layers):
            self.layer(layer, tokens)
            self.now += 5 * US
        self.compute(Part.HEAD, 300 * US * tokens)
        self.tracer.event(
            Kind.STEP, begin, self.now, token=self.tokens, a=tokens, b=int(tokens > 1)
        )
        self.tokens += tokens
        self.compute(Part.SAMPLE, 40 * US)
        self.now += 60 * US

    def layer(self, layer: int, tokens: int) -> None:
        begin = self.now
        self.compute(Part.MIX, 150 * US * tokens, layer)
        self.compute(Part.ROUTE, 10 * US, layer)
        picked = {
            min(int(self.random.expovariate(1 / (self.experts / 4))), self.experts - 1)
            for _ in range(self.top_k * min(tokens, 8))
        }
        slots = self.resident[layer]
        missing = []
        for expert in sorted(picked):
            hit = expert in slots
            source = Source.RESIDENT if hit else Source.MISSING
            self.tracer.event(Kind.USE, self.now, self.now, layer, expert, self.tokens, 1, source)
            slots[expert] = None
            slots.move_to_end(expert)
            if not hit:
                missing.append((self.read(layer, expert), expert))
        while len(slots) > self.slots:
            old, _ = slots.popitem(last=False)
            self.tracer.event(Kind.EVICT, self.now, self.now, layer, old, self.tokens)
        n = len(picked) - len(missing)
        self.compute(Part.RESIDENT, 60 * US * n, layer, n=n)
        self.compute(Part.SHARED, 50 * US, layer)
        for landed, expert in missing:
            if landed > self.now:
                self.tracer.event(Kind.STALL, self.now, landed, layer, expert, self.tokens)
                self.now = landed
            self.now += 30 * US
            self.compute(Part.LANDED, 60 * US, layer, expert, 1)
        self.compute(Part.FINISH, 5 * US, layer)
        self.tracer.event(Kind.LAYER, begin, self.now, layer, token=self.tokens)

    def read(self, layer: int, expert: int) -> int:
        start = max(self.now + 5 * US, self.drive_free - self.read_ns)  # two in flight
        landed = max(start, self.drive_free) + self.read_ns
        self.drive_free = landed
        self.tracer.event(
            Kind.READ, self.now, landed, layer, expert, self.tokens, EXPERT_BYTES, start - self.now
        )
        return landed


def record(
    path: Path,
    *,
    prompt: int = 16,
    decode: int = 40,
    layers: int = 6,
    experts: int = 64,
    slots: int = 24,
    top_k: int = 4,
    capacity: int = 1 << 16,
) -> Path:
    """A recording of a prompt step and decode steps."""
    info = {
        "model": "acted-moe",
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "expert_bytes": EXPERT_BYTES,
        "drive_gbps": 1.25,
        "options": {"dram": "16GiB", "threads": 2},
    }
    with Tracer.create(path, capacity=capacity, info=info) as tracer:
        actor = Actor(tracer, layers=layers, experts=experts, slots=slots, top_k=top_k)
        if prompt:
            actor.step(prompt)
        for _ in range(decode):
            actor.step()
    return path
