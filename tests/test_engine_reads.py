"""The engine and its reads: the text does not depend on when bytes land, or from which drive."""

import asyncio
import dataclasses
import itertools
import shutil
import time
from functools import partial

import pytest
from faulty_reader import FaultyReader
from toy import K_TOY, write_toy

import fomoe
from fomoe import Engine, Sampling
from fomoe.io.open import open_reader
from fomoe.io.probe import Drive, probe_drive
from fomoe.kernels.cpu_layer import CpuLayer
from fomoe.kernels.cpu_moe import CpuMoeCall

TOY = dataclasses.replace(K_TOY, layers=3, experts=16, top_k=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 60))


async def text_of(engine, n=16):
    greedy = Sampling(temperature=0.0)
    tokens = engine.generate("the thing on ", max_tokens=n, sampling=greedy, ignore_eos=True)
    return [token.id async for token in tokens]


async def minimum(model):
    """The least budget that works, as the refusal names it."""
    with pytest.raises(fomoe.BudgetError) as refusal:
        await Engine.open(model, dram=1 << 20, context=256, ubatch=64)
    return int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20


def late(seeds, *args, **options):
    return FaultyReader(open_reader(*args, **options), next(seeds), max_delay_s=0.003)


@pytest.mark.parametrize("io", ["threads", "uring"])
def test_text_does_not_depend_on_when_reads_land(model, io, monkeypatch):
    async def main():
        dram = await minimum(model)
        async with Engine.open(model, dram=dram, context=256, ubatch=64, io=io) as engine:
            prompt = await text_of(engine)
        monkeypatch.setattr("fomoe.loading.open_reader", partial(late, itertools.count()))
        texts = []
        for budget in (dram, dram + (2 << 20)):
            async with Engine.open(model, dram=budget, context=256, ubatch=64, io=io) as engine:
                texts.append(await text_of(engine))
        return prompt, texts

    expected, texts = run(main())
    assert texts == [expected] * 2


def test_nothing_is_begun_early_while_the_compute_thread_computes(model, monkeypatch):
    """Experts of a prompt land while the next layer's router is asked: the pool has one caller."""
    asked, early, guess, start = [], [], CpuLayer.guess, CpuMoeCall.start
    begun = []

    def slow_guess(layer, x):
        asked.append(x)
        time.sleep(0.01)
        try:
            return guess(layer, x)
        finally:
            asked.pop()

    def noted_start(call, expert):
        early.append(bool(asked))
        begun.append(start(call, expert))
        return begun[-1]

    monkeypatch.setattr(CpuLayer, "guess", slow_guess)
    monkeypatch.setattr(CpuMoeCall, "start", noted_start)
    delayed = partial(late, itertools.count())
    monkeypatch.setattr("fomoe.loading.open_reader", delayed)

    async def main():
        async with Engine.open(model, context=256, ubatch=64) as engine:
            dram = engine.plan.fixed_bytes + engine.plan.slot_bytes // 2
        options = {"context": 256, "ubatch": 64, "threads": 2}
        async with Engine.open(model, dram=dram, **options) as engine:
            assert not engine.plan.all_resident
            await engine.logits([7 + i for i in range(40)])

    run(main())
    assert any(begun)
    assert not any(early)


def test_copies_on_other_drives_are_read_too(model, tmp_path):
    shutil.copy(model, tmp_path)

    async def main():
        texts = []
        dram = await minimum(model)
        for replicas in ((), (tmp_path,)):
            async with Engine.open(
                model, dram=dram, context=256, ubatch=64, replicas=replicas
            ) as engine:
                texts.append(await text_of(engine))
                described = engine.loaded.reader.describe()
        return texts, described

    (alone, shared), described = run(main())
    assert alone == shared
    assert f"{tmp_path}: " in described


@pytest.mark.parametrize(("drives", "rate"), [(2, 3e9), (1, 1e9)])
def test_the_ceiling_is_that_of_all_drives(model, tmp_path, monkeypatch, drives, rate):
    shutil.copy(model, tmp_path)

    async def measured(path, **_):
        own = 1e9 if path == model else 2e9
        return Drive(read_bytes=1 << 20, depth=8, bytes_per_second=own)

    monkeypatch.setattr("fomoe.loading.probe_drive", measured)
    names = {tmp_path / model.name: "second" if drives == 2 else "first"}
    monkeypatch.setattr("fomoe.loading.device_name", lambda path: names.get(path, "first"))

    async def main():
        async with Engine.open(model, context=64, replicas=(tmp_path,)) as engine:
            return engine.loaded.drives_bytes_per_second

    assert run(main()) == rate


def test_how_a_drive_is_read_best_is_remembered(model, tmp_path, monkeypatch):
    monkeypatch.setattr("fomoe.loading.probe_drive", partial(probe_drive, smallest_bytes=0))

    async def main():
        async with Engine.open(model, context=256, cache_dir=tmp_path / "cache") as engine:
            return engine.loaded.reader.direct, await text_of(engine, n=2)

    direct, _ = run(main())
    assert direct == (tmp_path / "cache" / "drives.json").exists()


def test_dense_weights_are_the_same_in_pieces(model, monkeypatch):
    # The budget counts what the process holds, and other tests may have imported a lot.
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 100 << 20)

    async def main():
        async with Engine.open(model, dram="300MiB", context=256, ubatch=64) as engine:
            return await text_of(engine)

    whole = run(main())
    monkeypatch.setattr("fomoe.weights._GROUP_BYTES", 8192)
    assert run(main()) == whole
