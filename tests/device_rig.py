"""Engines on devices that threads of the host stand for, slow at random, so that what is ordered
wrongly shows.

Owns: making those, and what their tests share.
"""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import numpy as np
import pytest
from toy import K_TOY

import fomoe
from fomoe import Engine, Sampling
from fomoe.experts.placement import Costs
from fomoe.kernels.device_host import HostDevice

TOY = dataclasses.replace(K_TOY, layers=5, experts=32, top_k=4)
GREEDY = Sampling(temperature=0.0)
PROMPT = "the thing on the other side of there, in the ring, "
OPTIONS: dict[str, Any] = {"context": 256, "ubatch": 64, "threads": 2}
# Which side is faster decides where experts are computed; "both": half and half.
COSTS = {"copy": Costs(1e-9, 1.0, 1.0), "host": Costs(1.0, 1e-9, 0.0), "both": Costs(1.0, 0.9, 0.0)}


class Devices:
    """Opens devices whose streams pause at random; `chosen` says what is faster."""

    def __init__(self, monkeypatch: Any) -> None:
        self.made: list[HostDevice] = []
        self.with_: dict[str, Any] = {}
        self.chosen = "both"
        self._rng = random.Random(0)
        monkeypatch.setattr("fomoe.fleet.open_device", self._open)
        monkeypatch.setattr("fomoe.fleet.measure_costs", self._costs)
        # Budgets must not depend on what other tests have brought into this process.
        monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 100 << 20)
        monkeypatch.setattr("fomoe.plan._SLACK", 3 << 20)

    def _pause(self) -> None:
        if self._rng.random() < 0.3:
            time.sleep(self._rng.random() * 1e-3)

    def _open(self, name: str) -> HostDevice:
        self.made.append(HostDevice(f"cpu{len(self.made)}", pause=self._pause, **self.with_))
        return self.made[-1]

    async def _costs(self, device: Any, helper: Any, layers: Any, *memory: Any) -> dict[int, Costs]:
        return {p.index: COSTS[self.chosen] for p, _ in layers}


async def text_of(engine: Engine, prompt: str = PROMPT, n: int = 16, **options: Any) -> list[int]:
    options = {"sampling": GREEDY, "ignore_eos": True} | options
    return [t.id async for t in engine.generate(prompt, max_tokens=n, **options)]


async def least(model: Any, option: str, **options: Any) -> int:
    """The least budget that works, as the refusal names it."""
    with pytest.raises(fomoe.BudgetError) as refusal:
        await Engine.open(model, **{option: 1 << 16}, **options)
    return int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20


def tiers(engine: Engine) -> list[Any]:
    return list(dict.fromkeys(place.tier for place in engine.loaded.places))


def assert_all_slots_are_somewhere(engine: Engine) -> None:
    """Every slot of every device is free, staging, or an expert's; nothing is held on the host."""
    for tier in tiers(engine):
        pools = {id(s.slots): s.slots for s in tier._layers.values()}.values()
        for pool in pools:
            layers = [s for s in tier._layers.values() if s.slots is pool]
            slots = [
                s.cache.lookup(int(e)) for s in layers for e in np.flatnonzero(s.cache.resident)
            ]
            slots += [slot for s in layers for slot, _ in s.seeds.values()]
            slots += pool.free + [slot for slot, _ in pool.ring]
            assert len(slots) == len(set(slots)) == pool.num_slots
        assert not any(s.ahead for s in tier._layers.values())
    store = engine.loaded.store
    assert not any(layer.held for layer in store._layers)
    assert not any(store._steps)
