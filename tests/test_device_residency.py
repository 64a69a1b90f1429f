"""Who is on a device, in memory, or stands in: on devices that threads of the host stand for."""

import asyncio
import ctypes
import time

import numpy as np
import pytest
from device_rig import (
    OPTIONS,
    TOY,
    Devices,
    assert_all_slots_are_somewhere,
    least,
    text_of,
    tiers,
)
from toy import write_toy

from fomoe import Engine
from fomoe.experts.car import CacheAwareRouter
from fomoe.experts.car_options import CarOptions
from fomoe.experts.profile import serialise, write_atomically
from fomoe.io.reader import ReadRequest
from fomoe.residency import Residency


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    return Devices(monkeypatch)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 300))


async def small(model, names="cpu,cpu", *, more_vram=0, more_dram=0, **options):
    """Options of the least memory, and more of it."""
    options = OPTIONS | {"device": names} | options
    vram = await least(model, "vram", **options)
    dram = await least(model, "dram", vram=vram, **options)
    return options | {"vram": vram + more_vram, "dram": dram + more_dram}


# ---- stand-ins ----


@pytest.mark.parametrize("rule", ["budget:0.3", "light:1", "ratio:0.35", "prior:0.5"])
@pytest.mark.parametrize("weights", ["dampen", "renorm"])
def test_stand_ins_of_devices_are_the_hosts(model, monkeypatch, rule, weights):
    """Deterministic, what was available before the turn still is when its picks are known: the
    host, asked then, would choose the same. And again, however slow the devices are."""
    car = CarOptions.parse(rule, weights=weights)
    adopt, routed = CacheAwareRouter.adopt, Residency.routed
    checked = []

    def routed_of(self, layer, routing):
        if routing.picked:
            available, limit = self.offer(layer)
            assert limit == self._car.limit
            if car.rule == "prior":
                spare._ranges[:] = self._car._ranges
            spare.limit = limit
            want = spare.select(layer, routing.logits, *routing.picked, available)
            np.testing.assert_array_equal(routing.ids, want.ids)
            np.testing.assert_array_equal(routing.weights, want.weights)
            checked.append(len(want.displaced))
        routed(self, layer, routing)

    spare = CacheAwareRouter(car, TOY.layers, TOY.top_k)
    monkeypatch.setattr(Residency, "routed", routed_of)

    async def main():
        options = await small(model, deterministic=True, car=car)
        texts = []
        for _ in range(2):
            async with Engine.open(model, **options) as engine:
                texts.append(await text_of(engine, n=20))
                stats = engine.stats().residency.car
                assert stats.substitutions
                assert_all_slots_are_somewhere(engine)
        return texts, stats

    (first, second), stats = run(main())
    assert first == second
    assert sum(checked) == 2 * stats.substitutions
    assert len(checked) == 2 * stats.token_layers
    assert adopt is CacheAwareRouter.adopt


def test_stand_ins_and_audits_while_reads_land(model):
    async def main():
        options = await small(model, car=CarOptions.parse("prior:0.5"), car_audit=0.5)
        async with Engine.open(model, **options) as engine:
            await text_of(engine, n=24)
            stats = engine.stats().residency.car
            assert stats.substitutions
            assert stats.audits
            assert_all_slots_are_somewhere(engine)

    run(main())


def test_a_read_that_lands_before_the_picks_are_known_is_no_stall(model):
    async def main():
        async with Engine.open(model, device="cpu,cpu", **OPTIONS) as engine:
            store = engine.loaded.store
            store._read_ns = 1e12
            now = time.perf_counter_ns()
            request = ReadRequest(extents=(), done=lambda request: None, submitted_ns=now)
            store._layers[1].loading[7] = request
            assert not store.available(1)[7]
            store.note_heard(1, 2 * 10**12)
            assert store.available(1)[7]
            assert not store.available(1, in_flight=False)[7]
            del store._layers[1].loading[7]

    run(main())


# ---- experts that leave a device ----


def test_what_a_device_gives_up_stays_in_memory(model, devices):
    """Together the tiers hold nearly as many experts as they have slots, none twice for long."""
    devices.chosen = "copy"

    async def main():
        options = await small(model, "cpu", more_vram=1 << 20, more_dram=1 << 20)
        async with Engine.open(model, **options) as engine:
            await text_of(engine, n=40)
            store, (tier,) = engine.loaded.store, tiers(engine)
            assert tier.stats.lowered
            line = engine.stats().devices[0].line()
            assert f"{tier.stats.lowered} experts copied back to memory" in line
            for layer, state in enumerate(store._layers):
                above, here = tier.resident(layer), state.cache.resident
                assert tier._layers[layer].cache.capacity
                # Copies that moved up leave when the next expert wants their slot.
                assert (above | here).sum() >= above.sum() + here.sum() - TOY.top_k, layer
                assert not state.loading
                for expert in np.flatnonzero(here & ~above):
                    assert_is_expert(engine, layer, int(expert))
            assert_all_slots_are_somewhere(engine)

    run(main())


def assert_is_expert(engine, layer, expert):
    """The expert's bytes in memory are those of the file."""
    state = engine.loaded.store._layers[layer]
    tensors = engine.loaded.gguf.experts(layer)
    parts = [tensors.gate, tensors.up, tensors.down]
    _, *addresses = state.ready[expert]
    for tensor, address in zip(parts, addresses, strict=True):
        nbytes = tensor.nbytes // tensors.num_experts
        with engine.loaded.gguf.paths[tensor.shard].open("rb") as file:
            file.seek(tensor.offset + expert * nbytes)
            wanted = file.read(nbytes)
        assert ctypes.string_at(address, nbytes) == wanted, (layer, expert)


def test_cancelled_in_the_middle_of_copies_down(model, devices):
    devices.chosen = "copy"

    async def main():
        options = await small(model, "cpu", more_vram=1 << 20, more_dram=1 << 20)
        async with Engine.open(model, **options) as engine:
            expected = await text_of(engine, n=12)
            for seed in range(12):
                gone = asyncio.create_task(text_of(engine, "there", n=50))
                await asyncio.sleep(0.01 + seed * 3e-3)
                gone.cancel()
                await asyncio.wait([gone])
            assert await text_of(engine, n=12) == expected
            (tier,) = tiers(engine)
            assert tier.stats.lowered
            for layer, state in enumerate(engine.loaded.store._layers):
                for expert in state.ready:
                    assert_is_expert(engine, layer, expert)
            assert_all_slots_are_somewhere(engine)

    run(main())


# ---- a profile ----


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_profile_seeds_devices_first(model, tmp_path, deterministic):
    async def main():
        options = await small(
            model, more_vram=1 << 20, more_dram=1 << 20, deterministic=deterministic
        )
        path = tmp_path / "uses.profile"
        async with Engine.open(model, **options) as engine:
            plain = await text_of(engine)
            fingerprint = engine.loaded.gguf.fingerprint.encode()
        # Expert i of every layer was used 32 - i times.
        uses = np.tile(np.arange(TOY.experts, 0, -1), (TOY.layers, 1)).astype(np.float32)
        write_atomically(path, serialise(uses, fingerprint))
        async with Engine.open(model, profile=path, **options) as engine:
            store, places = engine.loaded.store, engine.loaded.places
            if not deterministic:
                # In the background, beside the first tokens.
                assert await text_of(engine) == plain
                while any(p.tier.room(i) for i, p in enumerate(places)):  # noqa: ASYNC110
                    await asyncio.sleep(1e-3)
                assert await text_of(engine) == plain
                return
            for layer, place in enumerate(places):
                place.tier.begin(layer)
                place.tier.end(layer)
                above = int(place.tier._layers[layer].cache.capacity)
                here = store._layers[layer].cache.capacity
                assert above
                np.testing.assert_array_equal(
                    np.flatnonzero(place.tier.resident(layer)), np.arange(above)
                )
                np.testing.assert_array_equal(
                    np.flatnonzero(store._layers[layer].cache.resident),
                    np.arange(above, min(above + here, TOY.experts)),
                )
            assert await text_of(engine) == plain
            assert_all_slots_are_somewhere(engine)

    run(main())


def test_closed_while_seeds_are_copied(model, tmp_path):
    async def main():
        options = await small(model, more_vram=1 << 20, more_dram=1 << 20)
        path = tmp_path / "uses.profile"
        async with Engine.open(model, **options) as engine:
            fingerprint = engine.loaded.gguf.fingerprint.encode()
        uses = np.ones((TOY.layers, TOY.experts), np.float32)
        unfinished = []
        for i in range(6):
            write_atomically(path, serialise(uses, fingerprint))
            async with Engine.open(model, profile=path, **options) as engine:
                reader, places = engine.loaded.reader, engine.loaded.places
                await asyncio.sleep(i * 4e-3)
                unfinished.append(any(p.tier.room(j) for j, p in enumerate(places)))
            assert reader.idle()
            assert not any(p.device.failure() for p in places)
        assert any(unfinished)

    run(main())
