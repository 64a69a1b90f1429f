"""The whole engine on toy models: files, reads, cache, compute, sequences."""

import asyncio
import contextlib
import dataclasses
import struct

import numpy as np
import pytest
from toy import K_TOY, write_toy

import fomoe
from fomoe import Engine, Sampling

GREEDY = Sampling(temperature=0.0)
PROMPT = "the thing on the other side of there, "
TOY = dataclasses.replace(K_TOY, layers=5, experts=16, top_k=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


@pytest.fixture(autouse=True)
def small_process(monkeypatch):
    """Budgets must not depend on what other tests have brought into this process."""
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 96 << 20)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 60))


async def text_of(engine, prompt=PROMPT, n=24, **options):
    options = {"sampling": GREEDY, "ignore_eos": True} | options
    return [t.id async for t in engine.generate(prompt, max_tokens=n, **options)]


async def minimum(model):
    """The least budget that works, as the refusal names it."""
    with pytest.raises(fomoe.BudgetError) as refusal:
        await Engine.open(model, dram=1 << 20, context=256, ubatch=64)
    return int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20


def test_text_does_not_depend_on_the_budget(model):
    async def main():
        results = []
        for dram in (await minimum(model), "1GiB"):
            async with Engine.open(model, dram=dram, context=256, ubatch=64) as engine:
                results.append((await text_of(engine), engine.plan, engine.stats()))
        return results

    (small, small_plan, small_stats), (large, large_plan, large_stats) = run(main())
    assert small == large
    assert large_plan.all_resident
    assert small_plan.num_slots < large_plan.num_slots
    assert small_stats.generation.hit_rate < large_stats.generation.hit_rate
    assert small_stats.generation.expert_bytes > large_stats.generation.expert_bytes


@pytest.mark.parametrize("options", [{"io": "threads"}, {"direct": "off"}, {"io": "uring"}])
def test_text_does_not_depend_on_how_it_is_read(model, options):
    async def main():
        texts = []
        for more in ({}, options):
            async with Engine.open(model, dram="200MiB", context=256, **more) as engine:
                texts.append(await text_of(engine))
        return texts

    first, second = run(main())
    assert first == second


def test_generation_continues_what_teacher_forcing_says(model):
    async def main():
        async with Engine.open(model, context=256, cache_type="f32") as engine:
            ids = engine.tokenizer.encode(PROMPT)
            new = await text_of(engine, ids)
            return ids, new, await engine.logits(ids + new)

    ids, new, logits = run(main())
    assert logits.shape[0] == len(ids) + len(new)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits[len(ids) - 1 : -1].argmax(axis=1), new)


def test_sequences_share_steps_and_do_not_disturb_each_other(model):
    prompts = ["the other", "in there, on the ring", "a stone"]

    async def main():
        async with Engine.open(model, context=512, parallel=2) as engine:
            alone = [await text_of(engine, p) for p in prompts]
            together = await asyncio.gather(*(text_of(engine, p) for p in prompts))
        return alone, together

    alone, together = run(main())
    assert alone == together


def test_a_cancelled_generation_leaves_the_others_alone(model):
    async def main():
        async with Engine.open(model, context=512, parallel=3) as engine:
            alone = await text_of(engine)
            doomed = asyncio.create_task(text_of(engine, "there", n=200))
            kept = asyncio.create_task(text_of(engine))
            stream = engine.generate("on", max_tokens=100, sampling=GREEDY, ignore_eos=True)
            await anext(stream)
            await stream.aclose()
            doomed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await doomed
            assert await kept == alone
            assert await text_of(engine) == alone

    run(main())


def test_closing_ends_generations(model):
    async def main():
        engine = await Engine.open(model, context=512)
        generation = asyncio.create_task(text_of(engine, n=400))
        await asyncio.sleep(0.05)
        await engine.close()
        with pytest.raises(fomoe.ClosedError):
            await generation
        with pytest.raises(fomoe.ClosedError):
            await text_of(engine)
        await engine.close()

    run(main())


def test_stops(model):
    async def main():
        async with Engine.open(model, context=128) as engine:
            plain = [t async for t in engine.generate(PROMPT, sampling=GREEDY, max_tokens=20)]
            text = "".join(t.text for t in plain)
            stop = text[5:8]
            cut = [t async for t in engine.generate(PROMPT, sampling=GREEDY, stop=[stop])]
            assert "".join(t.text for t in cut) == text[: text.index(stop)]
            assert cut[-1].finish_reason == "stop"
            assert plain[-1].finish_reason == "length"
            full = [t async for t in engine.generate(PROMPT, sampling=GREEDY, ignore_eos=True)]
            assert len(full) + len(engine.tokenizer.encode(PROMPT)) == 128

    run(main())


def test_requests_that_cannot_be_served(model):
    async def main():
        async with Engine.open(model, context=64) as engine:
            for prompt, why in (
                ([1] * 64, "context holds 64"),
                ("", "no tokens"),
                ([10**6], "outside the vocabulary"),
            ):
                with pytest.raises(fomoe.RequestError, match=why):
                    await text_of(engine, prompt)
            assert len(await text_of(engine, n=3)) == 3

    run(main())


def test_bad_options_name_themselves(model):
    with pytest.raises(fomoe.RequestError, match="contxt"):
        Engine.open(model, contxt=3)
    with pytest.raises(fomoe.RequestError, match="not a size"):
        Engine.open(model, dram="lots")
    with pytest.raises(fomoe.RequestError, match="cache_type"):
        Engine.open(model, cache_type="q8_0")


def test_vocabulary_that_does_not_fit_the_embedding(model, tmp_path):
    data = bytearray(model.read_bytes())
    for name in (b"token_embd.weight", b"output.weight"):
        field = struct.pack("<Q", len(name)) + name
        if field in data:
            rows = data.index(field) + len(field) + 4 + 8  # behind the number of dimensions, ne[0]
            data[rows : rows + 8] = struct.pack("<Q", TOY.vocab - 1)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)

    async def main():
        await Engine.open(path, context=256)

    with pytest.raises(fomoe.FormatError, match=rf"{TOY.vocab} tokens, but {TOY.vocab - 1} embed"):
        run(main())


def test_tokens_are_handed_out_one_by_one(model, monkeypatch):
    """However fast a step is: who waits for a token gets it before the next one is computed."""
    monkeypatch.setattr("fomoe.forward._YIELD_NS", 10**12)

    async def main():
        async with Engine.open(model, dram="1GiB", context=256, ubatch=64) as engine:
            seen = 0
            async for _ in engine.generate([1, 2, 3], max_tokens=24, ignore_eos=True):
                seen += 1
                assert engine.stats().generation.steps <= seen

    run(main())
