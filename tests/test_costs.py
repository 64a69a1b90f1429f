"""What a token costs, counted and not timed: the numbers are exact, and a change of one is either
meant or a regression."""

import asyncio
import collections
import dataclasses
import mmap

import pytest
from toy import K_TOY, write_toy

from fomoe import BudgetError, Engine
from fomoe.native import lib

ATTENTION, DELTA = 1, 4  # layers of the toy: every fourth has attention
LAYERS = ATTENTION + DELTA
TOY = dataclasses.replace(K_TOY, layers=LAYERS, experts=48, top_k=4, align=4096)
PICKS = LAYERS * TOY.top_k
# Q4_K and Q6_K have 144 and 210 bytes for 256 weights.
SIZES = [256 * (2 * 144 + down) for down in (144, 210)]
OPTIONS = {"context": 128, "ubatch": 64, "threads": 1}
TOKENS = 8
PROMPT = list(range(40, 72))  # 32 tokens, each its own


class CountedLib:
    """The C library, counting calls by name."""

    def __init__(self, calls):
        self._calls = calls

    def __getattr__(self, name):
        found = getattr(lib, name)
        if not callable(found):
            return found

        def call(*args):
            self._calls[name] += 1
            return found(*args)

        return call


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


@pytest.fixture
def calls(monkeypatch):
    counter = collections.Counter()
    for module in ("cpu", "cpu_layer", "cpu_moe", "cpu_plans"):
        monkeypatch.setattr(f"fomoe.kernels.{module}.lib", CountedLib(counter))
    monkeypatch.setattr("fomoe.io.queued.lib", CountedLib(counter))

    class CountedMap(mmap.mmap):
        def __new__(cls, *args, **options):
            counter["mmap"] += 1
            return super().__new__(cls, *args, **options)

    monkeypatch.setattr("fomoe.kernels.cpu_arrays.mmap.mmap", CountedMap)
    return counter


@pytest.fixture
def spawned(monkeypatch):
    """Tasks and calls in threads that were started: each is a round through the event loop."""
    counter = collections.Counter()

    def counted(owner, name):
        found = getattr(owner, name)

        def call(*args, **options):
            counter[name] += 1
            return found(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(asyncio.BaseEventLoop, "create_task")
    counted(asyncio.BaseEventLoop, "run_in_executor")
    return counter


def counts_of_decode(model, counters, **options):
    """What each counter gained over the last TOKENS of 3 * TOKENS tokens, the engine's own figures
    among them; everything that is made once was made by then. Tokens are those of the prompt: the
    rows of the embedding are known."""

    async def main():
        async with Engine.open(model, **OPTIONS, **options) as engine:
            at = []
            pieces = [PROMPT, *([PROMPT[i]] for i in range(3 * TOKENS))]
            async for _ in engine.feed(pieces, max_tokens=len(PROMPT) + 3 * TOKENS):
                phase = engine.stats().generation
                figures = collections.Counter(
                    reads=phase.expert_reads,
                    bytes=phase.expert_bytes,
                    drive_bytes=engine.loaded.reader.stats.bytes,
                    steps=phase.steps,
                    picks=phase.picks,
                    hits=phase.hits,
                )
                at.append([figures, *(collections.Counter(c) for c in counters)])
            return [
                collections.Counter({k: end[k] - begin[k] for k in end if end[k] != begin[k]})
                for begin, end in zip(at[2 * TOKENS], at[-1], strict=True)
            ]

    return asyncio.run(asyncio.wait_for(main(), 60))


# Layers whose experts are in memory need nothing in between.
COMPUTE_CALLS = {"fomoe_embed_rows": 1, "fomoe_layers_walk": 1, "fomoe_linear_run": 1}


def test_a_token_with_all_experts_in_memory(model, calls, spawned):
    figures, called, started = counts_of_decode(model, [calls, spawned], dram="1GiB")
    del called["fomoe_reader_counts"]  # of the counting above
    # Nothing is read, no scratch is mapped, no array is measured or dequantised anew.
    assert called == {name: n * TOKENS for name, n in COMPUTE_CALLS.items()}
    assert figures == {"steps": TOKENS, "picks": TOKENS * PICKS, "hits": TOKENS * PICKS}
    assert started == {}, "a short step is computed where it is, without a task or a thread"


def test_a_token_that_misses(model, calls, spawned, monkeypatch):
    least = least_budget(model, monkeypatch)
    calls.clear()
    figures, called, started = counts_of_decode(model, [calls, spawned], dram=least, prefetch="off")
    reads = figures["picks"] - figures["hits"]
    assert figures["reads"] == reads > 0, "what misses is read, once, and nothing else"
    # Down projections are of two types in turn, so an expert is of one of two sizes.
    assert reads * min(SIZES) <= figures["bytes"] <= reads * max(SIZES)
    # Direct reads are of whole pages: at most one more at either end of three slices.
    assert figures["bytes"] <= figures["drive_bytes"] <= figures["bytes"] + reads * 3 * 2 * 4096
    assert 0 < called["fomoe_reader_submit"] <= TOKENS * LAYERS, "the misses of a layer go at once"
    # Each layer that misses ends a walk, and the next walk ends its experts; only the last layer's
    # end by themselves. What lands while others are computed is computed together.
    walks = called["fomoe_layers_walk"]
    assert TOKENS < walks <= TOKENS * LAYERS
    assert called["fomoe_moe_pick"] <= walks
    assert called["fomoe_moe_run"] <= walks + reads
    assert called["fomoe_moe_finish"] <= TOKENS
    assert "fomoe_layer_begin" not in called
    assert called["mmap"] == 0
    assert started == {}


def least_budget(model, monkeypatch):
    # What the tests before this one left in memory is not to decide how many slots there are.
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 100 << 20)
    with pytest.raises(BudgetError) as refusal:
        asyncio.run(open_and_close(model, dram=1 << 20))
    return int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20


async def open_and_close(model, **options):
    async with Engine.open(model, **OPTIONS, **options):
        pass


async def reads_of_new_words(model, **options):
    """Reads that were not experts', after each word of 100, 101 and 100 again."""
    async with Engine.open(model, **OPTIONS, **options) as engine:
        reads = []
        async for _ in engine.feed([PROMPT, [100], [101], [100]], max_tokens=64):
            stats = engine.stats()
            experts = stats.prompt.expert_reads + stats.generation.expert_reads
            reads.append(engine.loaded.reader.stats.reads - experts)
    # The dense weights and the prompt's rows come before.
    return [n - reads[0] for n in reads[1:]]


def test_a_new_word_costs_one_read_of_its_embedding(model, monkeypatch):
    budget = least_budget(model, monkeypatch)
    reads = reads_of_new_words(model, dram=budget, prefetch="off")
    assert asyncio.run(asyncio.wait_for(reads, 60)) == [1, 2, 2]


def test_with_everything_in_memory_a_new_word_costs_no_read(model):
    reads = reads_of_new_words(model, dram="1GiB")
    assert asyncio.run(asyncio.wait_for(reads, 60)) == [0, 0, 0]
