"""The same input gives the same text: whatever the memory, the reads, the threads and the steps."""

import asyncio

import pytest

import fomoe
from fomoe import Engine, Sampling
from fomoe.demo import DEMO_MODEL

PROMPT = (
    "It was a bright morning, and the old captain stood at the window of his house above the "
    "harbour, looking at the ships that had come in with the night's wind. "
) * 2


def text(sampling=Sampling(temperature=0.0), **options):  # noqa: B008  # frozen
    async def main():
        async with Engine.open(DEMO_MODEL, **({"context": 256} | options)) as engine:
            tokens = engine.generate(PROMPT, max_tokens=24, sampling=sampling, ignore_eos=True)
            return [token.id async for token in tokens], engine.plan

    return asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture(scope="module")
def expected():
    ids, plan = text()
    assert plan.all_resident
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"threads": 3},
        {"io": "threads", "direct": "off"},
        {"prefetch": "off"},
        {"prefetch": "on"},
        {"cache_policy": "lru"},
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", ["least", "half"])
def test_text_depends_on_nothing_but_the_input(expected, options, budget, monkeypatch):
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 100 << 20)
    monkeypatch.setattr("fomoe.plan._SLACK", 0)
    with pytest.raises(fomoe.BudgetError) as refusal:
        text(dram=1, **options)
    dram = int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20
    ids, plan = text(dram=dram + (8 << 20 if budget == "half" else 0), **options)
    assert plan.num_slots < (160 if budget == "half" else 32)
    assert ids == expected


@pytest.mark.parametrize("ubatch", [16, 64])
def test_pieces_of_a_prompt_change_nothing_but_roundings(ubatch):
    """Sums over tokens are grouped by steps: equal but for the last digits, which quantised
    activations make a little more of."""

    async def logits(**options):
        async with Engine.open(DEMO_MODEL, context=256, cache_type="f32", **options) as engine:
            return await engine.logits(engine.tokenizer.encode(PROMPT))

    whole, pieces = (asyncio.run(logits(ubatch=n)) for n in (512, ubatch))
    error = float(((whole - pieces) ** 2).sum() / (whole**2).sum())
    print(f"NMSE {error:.2e}")
    assert error < 1e-4
    assert (whole.argmax(axis=1) == pieces.argmax(axis=1)).mean() > 0.95


def test_a_seed_draws_the_same_text(monkeypatch):
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 100 << 20)
    drawn = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=11)
    assert text(drawn)[0] == text(drawn, dram="180MiB", io="threads")[0]
