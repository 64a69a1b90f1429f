"""The engine on devices: threads of the host stand for them, slow at random, so that what is
ordered wrongly shows. Whatever the devices and budgets, the text is that of the processor alone."""

import asyncio
import contextlib
import random
import threading

import numpy as np
import pytest
from device_rig import (
    OPTIONS,
    PROMPT,
    TOY,
    Devices,
    assert_all_slots_are_somewhere,
    least,
    text_of,
    tiers,
)
from faulty_reader import FaultyReader
from toy import write_toy

import fomoe
from fomoe import Engine
from fomoe.io.open import open_reader
from fomoe.tracing.perfetto import write_chrome_trace
from fomoe.tracing.recording import read_recording
from fomoe.tracing.summary import summarise
from fomoe.tracing.text import render
from fomoe.turn import do_begin


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


@pytest.fixture
def devices(monkeypatch):
    return Devices(monkeypatch)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 300))


@pytest.mark.parametrize("side", ["copy", "host", "both"])
@pytest.mark.parametrize("names", ["cpu", "cpu,cpu", "cpu,cpu,cpu"])
def test_text_is_that_of_the_processor(model, expected, devices, names, side):
    devices.chosen = side

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
    devices.chosen = side

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


@pytest.mark.parametrize("names", ["cpu", "cpu,cpu"])
def test_nothing_is_waited_for_where_every_expert_is_there(model, expected, devices, names):
    devices.chosen = "copy"

    async def main():
        async with Engine.open(model, device=names, vram="1GiB", **OPTIONS) as engine:
            places = engine.loaded.places
            # There is room for all of them: they come by themselves.
            while any(place.tier.room(i) for i, place in enumerate(places)):  # noqa: ASYNC110
                await asyncio.sleep(1e-3)
            assert await text_of(engine) == expected
            assert all(place.tier.holds_all(i) for i, place in enumerate(places))
            held = threading.Event()
            devices.made[0].compute.call(held.wait)
            begun = []
            for device in devices.made:
                note_begun(device.compute, begun)
            text = asyncio.create_task(text_of(engine, "t", n=1))
            while len(begun) < len(places):  # noqa: ASYNC110
                await asyncio.sleep(1e-3)
            assert not text.done()
            held.set()
            await text
            assert begun == list(range(len(places)))
            assert_all_slots_are_somewhere(engine)

    run(main())


def note_begun(stream, begun):
    """Note the layers that a stream is given to begin."""
    call = stream.call

    def noted(work):
        if getattr(work, "func", None) is do_begin:
            begun.extend(turn.index for turn in work.args[0])
        call(work)

    stream.call = noted


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

    devices.chosen = "copy"
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


def test_copies_are_recorded(model, devices, tmp_path):
    devices.chosen = "copy"

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
    tracks = (tmp_path / "trace.json").read_text()
    assert "copy 0 to device 0" in tracks
    assert "copy 0 to device 1" in tracks


def test_the_embedding_is_held_where_every_expert_is(model, expected):
    async def main():
        async with Engine.open(model, device="cpu,cpu", **OPTIONS) as engine:
            assert engine.plan.holds_embedding
            assert not engine.loaded.embedding.must_read([5])
            return await text_of(engine)

    assert run(main()) == expected
