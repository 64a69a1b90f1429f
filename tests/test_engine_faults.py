"""The engine when drives fail: who is told, what is said, and that everything else goes on."""

import asyncio
import dataclasses
import os
import shutil
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from faulty_reader import FaultyReader
from toy import K_TOY, write_toy

import fomoe
from fomoe import Engine, Sampling
from fomoe.io.open import open_reader
from fomoe.runner import Runner

TOY = dataclasses.replace(K_TOY, layers=3, experts=32, top_k=4)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 60))


async def text_of(engine, prompt="the thing on ", n=8):
    tokens = engine.generate(prompt, max_tokens=n, sampling=GREEDY, ignore_eos=True)
    return [token.id async for token in tokens]


@pytest.fixture
def drive(monkeypatch):
    """A drive that fails what the test says, once it is told to."""
    drive = SimpleNamespace(fails=lambda request: False)

    def opened(*args, **options):
        reader = open_reader(*args, **options)
        return FaultyReader(reader, 0, 0.0005, fails=lambda request: drive.fails(request))

    monkeypatch.setattr("fomoe.loading.open_reader", opened)
    return drive


@pytest.fixture(autouse=True)
def exact_budgets(monkeypatch):
    """Budgets that leave room for few experts, whatever the test process has grown to."""
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 100 << 20)
    monkeypatch.setattr("fomoe.plan._SLACK", 3 << 20)


@asynccontextmanager
async def open_small(model, **options):
    """An engine with as few expert slots as work."""
    options = {"context": 512, "ubatch": 64} | options
    with pytest.raises(fomoe.BudgetError) as refusal:
        await Engine.open(model, dram=1 << 20, **options)
    dram = int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20
    async with Engine.open(model, dram=dram, **options) as engine:
        assert engine.plan.num_slots < 48
        yield engine


def test_a_failed_read_ends_its_generation_only(model, drive):
    async def main():
        async with open_small(model) as engine:
            expected = await text_of(engine)
            drive.fails = lambda request: "layer 1 expert" in request.what
            with pytest.raises(fomoe.ReadError, match=r"layer 1 expert \d+.*Check the drive"):
                await text_of(engine, "there, in the ring, others")
            drive.fails = lambda request: False
            assert await text_of(engine) == expected

    run(main())


def test_sequences_that_did_not_pick_a_lost_expert_go_on(model, drive, monkeypatch):
    """One sequence meets an expert that cannot be read; the others of its step, which did not pick
    it, end up with what they would have had alone."""
    prompts = ["there, in the ring", "on the other side", "a"]
    rewound = []
    rewind = Runner._rewind

    def noted(runner, sequence):
        rewound.append(sequence.num_computed)
        rewind(runner, sequence)

    monkeypatch.setattr(Runner, "_rewind", noted)

    async def rows(engine):
        ids = engine.tokenizer.encode("the thing there")
        return (await engine.logits(ids)).argmax(axis=1).tolist()

    def all_of(engine):
        return [rows(engine), *(text_of(engine, p) for p in prompts)]

    async def main():
        async with open_small(model, parallel=4, ubatch=4) as engine:
            expected = await asyncio.gather(*all_of(engine))
            for nth in range(1, 64, 9):
                shared = []  # experts that are read while several sequences run

                def once(request, shared=shared, nth=nth):
                    if len(engine._runner.scheduler.running) == 1 or "expert" not in request.what:
                        return False
                    shared.append(request.what)
                    return len(shared) == nth

                drive.fails = once
                results = await asyncio.gather(*all_of(engine), return_exceptions=True)
                for result, alone in zip(results, expected, strict=True):
                    if isinstance(result, fomoe.ReadError):
                        assert shared[nth - 1] in str(result)
                    else:
                        assert result == alone

    run(main())
    assert max(rewound) > 0


def test_dense_weights_that_cannot_be_read(model, drive):
    drive.fails = lambda request: "output_norm" in request.what

    async def main():
        with pytest.raises(fomoe.ReadError, match=r"tensor output_norm\.weight"):
            await Engine.open(model, context=256)

    run(main())


def test_an_embedding_row_that_cannot_be_read(model, drive):
    async def main():
        # Half of the experts: with all of them the whole embedding would be in memory.
        async with Engine.open(model, context=256, cache_share=0.5) as engine:
            drive.fails = lambda request: "token_embd" in request.what
            with pytest.raises(fomoe.ReadError, match="token_embd"):
                await text_of(engine)
            drive.fails = lambda request: False
            assert len(await text_of(engine)) == 8

    run(main())


@pytest.mark.parametrize("io", ["uring", "threads"])
def test_a_file_that_shrinks_under_the_engine(model, tmp_path, io):
    path = tmp_path / "toy.gguf"
    shutil.copy(model, path)

    async def main():
        async with open_small(path, io=io) as engine:
            expected = await text_of(engine)
            size = path.stat().st_size
            os.truncate(path, size // 4)
            with pytest.raises(fomoe.ReadError, match=r"toy\.gguf|file ends before"):
                await text_of(engine)
            shutil.copyfile(model, path)
            assert await text_of(engine) == expected

    run(main())


def test_a_consumer_that_does_not_keep_up_holds_its_sequence_up(model):
    """Logits that nobody takes would fill the memory."""

    async def main():
        async with Engine.open(model, context=512, parallel=2, ubatch=4) as engine:
            ids = engine.tokenizer.encode("there, in the ring " * 8)
            rows = engine.logit_rows(ids)
            parts = [await anext(rows)]
            assert len(await text_of(engine)) == 8
            assert engine._runner.scheduler.running[0]._outputs.qsize() == 1
            parts += [part async for part in rows]
            np.testing.assert_array_equal(np.concatenate(parts), await engine.logits(ids))

    run(main())


def test_a_broken_engine_says_so_to_all(model, monkeypatch):
    """An error of our own ends the engine: who waits is told, and so is who comes later."""

    async def main():
        engine = await Engine.open(model, context=256)
        waiting = [asyncio.create_task(text_of(engine)) for _ in range(3)]

        async def broken(chunks):
            raise AssertionError("broken")

        monkeypatch.setattr(engine._runner.forward, "run", broken)
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, fomoe.ClosedError)
            assert "broken" in str(result)
        with pytest.raises(fomoe.ClosedError, match="broken"):
            await text_of(engine)
        with pytest.raises(AssertionError, match="broken"):
            await engine.close()

    run(main())
