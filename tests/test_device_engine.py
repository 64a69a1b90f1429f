"""The engine on devices: threads of the host stand for them, slow at random, so that what is
ordered wrongly shows. Whatever the devices and budgets, the text is that of the processor alone."""

import asyncio
import contextlib
import dataclasses
import random
import time

import numpy as np
import pytest
from faulty_reader import FaultyReader
from toy import K_TOY, write_toy

import fomoe
from fomoe import Engine, Sampling
from fomoe.experts.placement import Costs
from fomoe.io.open import open_reader
from fomoe.kernels.device_host import HostDevice
from fomoe.tracing.perfetto import write_chrome_trace
from fomoe.tracing.recording import read_recording
from fomoe.tracing.summary import summarise
from fomoe.tracing.text import render

TOY = dataclasses.replace(K_TOY, layers=5, experts=32, top_k=4)
GREEDY = Sampling(temperature=0.0)
PROMPT = "the thing on the other side of there, in the ring, "
OPTIONS = {"context": 256, "ubatch": 64, "threads": 2}
# Which side is faster decides where experts are computed; "both": half and half.
COSTS = {"copy": Costs(1e-9, 1.0, 1.0), "host": Costs(1.0, 1e-9, 0.0), "both": Costs(1.0, 0.9, 0.0)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


@pytest.fixture(scope="module")
def expected(model):
    """The text of the processor alone."""

    async def main():
        async with Engine.open(model, **OPTIONS) as engine:
            return await text_of(engine)

    return run(main())


@pytest.fixture(autouse=True)
def small_process(monkeypatch):
    """Budgets must not depend on what other tests have brought into this process."""
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 100 << 20)
    monkeypatch.setattr("fomoe.plan._SLACK", 3 << 20)


@pytest.fixture
def devices(monkeypatch):
    """Opens devices whose streams pause at random; `costs(name)` says what is faster."""
    rng = random.Random(0)
    made = []

    def pause():
        if rng.random() < 0.3:
            time.sleep(rng.random() * 1e-3)

    def opened(name):
        made.append(HostDevice(f"cpu{len(made)}", pause=pause, **made_with))
        return made[-1]

    async def costs(device, helper, layers, *memory):
        return {p.index: COSTS[chosen[0]] for p, _ in layers}

    made_with, chosen = {}, ["both"]
    monkeypatch.setattr("fomoe.fleet.open_device", opened)
    monkeypatch.setattr("fomoe.fleet.measure_costs", costs)
    made_of = dataclasses.make_dataclass("Devices", ["made", "with_", "chosen"])
    return made_of(made, made_with, chosen)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 300))


async def text_of(engine, prompt=PROMPT, n=16, **options):
    options = {"sampling": GREEDY, "ignore_eos": True} | options
    return [t.id async for t in engine.generate(prompt, max_tokens=n, **options)]


async def least(model, option, **options):
    """The least budget that works, as the refusal names it."""
    with pytest.raises(fomoe.BudgetError) as refusal:
        await Engine.open(model, **{option: 1 << 16}, **options)
    return int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20


def tiers(engine):
    return list(dict.fromkeys(place.tier for place in engine.loaded.places))


def assert_all_slots_are_somewhere(engine):
    """Every slot of every device is free, staging, or an expert's; nothing is held on the host."""
    for tier in tiers(engine):
        pools = {id(s.slots): s.slots for s in tier._layers.values()}.values()
        for pool in pools:
            layers = [s for s in tier._layers.values() if s.slots is pool]
            slots = [
                s.cache.lookup(int(e)) for s in layers for e in np.flatnonzero(s.cache.resident)
            ]
            slots += pool.free + [slot for slot, _ in pool.ring]
            assert len(slots) == len(set(slots)) == pool.num_slots
        assert not any(s.ahead for s in tier._layers.values())
    store = engine.loaded.store
    assert not any(layer.held for layer in store._layers)
    assert not any(store._steps)


@pytest.mark.parametrize("side", ["copy", "host", "both"])
@pytest.mark.parametrize("names", ["cpu", "cpu,cpu", "cpu,cpu,cpu"])
def test_text_is_that_of_the_processor(model, expected, devices, names, side):
    devices.chosen[0] = side

    async def main():
        options = OPTIONS | {"device": names, "vram": "1GiB"}
        async with Engine.open(model, **options) as engine:
            text = await text_of(engine)
            assert text == await text_of(engine)
            assert_all_slots_are_somewhere(engine)
            return text, [tier.stats for tier in tiers(engine)]

    text, stats = run(main())
    assert text == expected
    assert len(stats) == len(devices.made) == names.count("cpu")
    assert all(s.pick_hits for s in stats)
    assert any(s.host_uses for s in stats) == (side != "copy")


@pytest.mark.parametrize("names", ["cpu", "cpu,cpu"])
@pytest.mark.parametrize("side", ["copy", "host", "both"])
def test_text_does_not_depend_on_budgets(model, expected, devices, names, side):
    devices.chosen[0] = side

    async def main():
        options = OPTIONS | {"device": names}
        vram = await least(model, "vram", **options)
        dram = await least(model, "dram", vram=vram, **options)
        async with Engine.open(model, dram=dram, vram=vram, **options) as engine:
            assert all(not plan.all_resident for plan in engine.plan.devices)
            assert not engine.plan.all_resident
            text = await text_of(engine)
            assert_all_slots_are_somewhere(engine)
            return text, engine.stats(), [tier.stats for tier in tiers(engine)]

    text, stats, tier_stats = run(main())
    assert text == expected
    assert stats.generation.expert_reads
    if side != "host":
        assert all(s.copied for s in tier_stats)


def test_pinned_experts_never_come_to_the_device(model, expected, devices):
    async def main():
        texts = []
        for more in ({"cpu_moe": True}, {"n_cpu_moe": 3}):
            async with Engine.open(model, device="cpu,cpu", **OPTIONS, **more) as engine:
                texts.append(await text_of(engine))
                copied = sum(tier.stats.copied for tier in tiers(engine))
                assert bool(copied) == ("n_cpu_moe" in more)
                assert sum(tier.stats.host_uses for tier in tiers(engine))
        return texts

    devices.chosen[0] = "copy"
    assert run(main()) == [expected, expected]


def test_the_processor_helps_a_device_that_cannot_read_its_memory(model, expected, devices):
    devices.with_["shares_memory"] = False

    async def main():
        logits = []
        for more in ({}, {"device": "cpu,cpu", "cpu_moe": True}, {"device": "cpu,cpu"}):
            async with Engine.open(model, **OPTIONS, **more) as engine:
                ids = engine.tokenizer.encode(PROMPT)
                logits.append(await engine.logits(ids))
                for tier in tiers(engine):
                    assert tier.stats.host_uses
        return logits

    alone, pinned, both = run(main())
    for other in (pinned, both):
        # The same products; sums by device and processor are added up in another order.
        assert np.abs(alone - other).max() < 1e-4 * np.abs(alone).max()


def test_many_sequences_and_cancelled_ones(model, expected, devices):
    async def main():
        vram = await least(model, "vram", device="cpu,cpu", **OPTIONS)
        async with Engine.open(model, device="cpu,cpu", vram=vram, **OPTIONS) as engine:
            for seed in range(6):
                doomed = asyncio.create_task(text_of(engine, "there", n=50))
                kept = asyncio.create_task(text_of(engine))
                await asyncio.sleep(random.Random(seed).random() * 0.05)
                doomed.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await doomed
                assert await kept == expected
            gone = asyncio.create_task(text_of(engine, n=50))
            await asyncio.sleep(0.02)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            await asyncio.sleep(0.05)
            assert await text_of(engine) == expected
            assert_all_slots_are_somewhere(engine)

    run(main())


def test_closing_in_the_middle_of_copies(model, devices):
    async def main():
        for seed in range(8):
            engine = await Engine.open(model, device="cpu,cpu", **OPTIONS)
            running = asyncio.create_task(text_of(engine, n=100))
            await asyncio.sleep(random.Random(seed).random() * 0.04)
            await engine.close()
            with contextlib.suppress(fomoe.ClosedError):
                await running
            assert all(device.failure() is None for device in devices.made)

    run(main())


def test_a_failed_read_ends_its_generation_only(model, expected, devices, monkeypatch):
    failing = [False]

    def opened(*args, **options):
        reader = open_reader(*args, **options)
        return FaultyReader(reader, 0, 5e-4, fails=lambda r: failing[0] and "expert" in r.what)

    monkeypatch.setattr("fomoe.loading.open_reader", opened)

    async def main():
        options = OPTIONS | {"device": "cpu,cpu"}
        vram = await least(model, "vram", **options)
        dram = await least(model, "dram", vram=vram, **options)
        async with Engine.open(model, dram=dram, vram=vram, **options) as engine:
            for _ in range(3):
                failing[0] = True
                with pytest.raises(fomoe.ReadError, match=r"layer \d expert \d+"):
                    await text_of(engine, "there, in the ring, others")
                failing[0] = False
                assert await text_of(engine) == expected
            assert_all_slots_are_somewhere(engine)

    run(main())


def test_a_failure_of_a_device_ends_the_engine(model, devices):
    async def main():
        engine = await Engine.open(model, device="cpu,cpu", **OPTIONS)
        await text_of(engine, n=2)
        devices.made[1].compute.call(lambda: 1 / 0)
        with pytest.raises(fomoe.ClosedError, match="division by zero"):
            await text_of(engine)
        with pytest.raises(ZeroDivisionError):
            await engine.close()

    run(main())


def test_plans_are_shown_and_refused_with_what_would_do(model, devices):
    async def main():
        lines = []
        vram = await least(model, "vram", device="cpu,cpu", **OPTIONS)
        async with Engine.open(
            model, device="cpu,cpu", vram=[vram, vram + (1 << 20)], **OPTIONS,
            on_plan=lambda plan: lines.extend(plan.lines()),
        ) as engine:  # fmt: skip
            first, second = engine.plan.devices
        assert (first.budget, second.budget) == (vram, vram + (1 << 20))
        assert first.total_bytes <= first.budget
        assert [line for line in lines if line.startswith("memory of")] == [
            "memory of cpu2, 3 layers", "memory of cpu3, 2 layers",
        ]  # fmt: skip
        assert sum("dense weights" in line for line in lines) == 2
        with pytest.raises(fomoe.BudgetError, match=r"more than the .* that are free on"):
            await Engine.open(model, device="cpu", vram="900TiB", **OPTIONS)
        with pytest.raises(fomoe.RequestError, match="only 5 layers"):
            await Engine.open(model, device=",".join(["cpu"] * 6), **OPTIONS)
        with pytest.raises(fomoe.RequestError, match="3 sizes for 2 devices"):
            await Engine.open(model, device="cpu,cpu", vram="1G,1G,1G", **OPTIONS)

    run(main())


def test_car_and_audits_on_devices(model, devices):
    car = fomoe.CarOptions.parse("prior:0.5") if hasattr(fomoe, "CarOptions") else None

    async def main():
        options = OPTIONS | {"device": "cpu,cpu"}
        vram = await least(model, "vram", **options)
        dram = await least(model, "dram", vram=vram, **options)
        async with Engine.open(
            model, dram=dram, vram=vram, car=car, car_audit=0.5, **options
        ) as engine:
            await text_of(engine, n=24)
            stats = engine.stats().residency.car
            assert stats.substitutions
            assert stats.audits
            assert_all_slots_are_somewhere(engine)

    if car is None:
        from fomoe.experts.car_options import CarOptions

        car = CarOptions.parse("prior:0.5")
    run(main())


def test_copies_are_recorded(model, devices, tmp_path):
    devices.chosen[0] = "copy"

    async def main():
        path = tmp_path / "copies.trace"
        async with Engine.open(model, device="cpu,cpu", trace=path, **OPTIONS) as engine:
            await text_of(engine)
            return path, sum(tier.stats.copied for tier in tiers(engine))

    path, copied = run(main())
    summary = summarise(read_recording(path))
    assert summary.copies.experts == copied
    assert f"Copies to devices: {copied:,} experts" in render(summary)
    with (tmp_path / "trace.json").open("w") as out:
        write_chrome_trace(summary, out)
    assert (tmp_path / "trace.json").read_text().count("copies to device") == 2


def test_the_embedding_is_held_where_every_expert_is(model, expected):
    async def main():
        async with Engine.open(model, device="cpu,cpu", **OPTIONS) as engine:
            assert engine.plan.holds_embedding
            assert not engine.loaded.embedding.must_read([5])
            return await text_of(engine)

    assert run(main()) == expected
