"""Opening, closing and cancelling the engine at any moment: nothing leaks, nothing hangs."""

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import os
import random
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
from faulty_reader import FaultyReader
from toy import K_TOY, write_toy

import fomoe
from fomoe import Engine, Sampling
from fomoe.io.arena import Arena
from fomoe.io.open import open_reader
from fomoe.native import lib

TOY = dataclasses.replace(K_TOY, layers=3, experts=16, top_k=4)
GREEDY = Sampling(temperature=0.0)
OPTIONS = {"context": 512, "ubatch": 32, "parallel": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


@pytest.fixture
def slow_reads(monkeypatch):
    def opened(*args, **options):
        return FaultyReader(open_reader(*args, **options), 1, max_delay_s=0.005)

    monkeypatch.setattr("fomoe.loading.open_reader", opened)


@pytest.fixture(autouse=True)
def mapped(monkeypatch):
    """Addresses of arenas that are mapped; none may be left."""
    addresses = set()
    made, closed = Arena.__init__, Arena.close

    def make(arena, size):
        made(arena, size)
        addresses.add(arena.address)

    def close(arena):
        addresses.discard(arena.address)
        closed(arena)

    monkeypatch.setattr(Arena, "__init__", make)
    monkeypatch.setattr(Arena, "close", close)
    yield addresses
    assert not addresses


@pytest.fixture(autouse=True)
def nothing_leaks():
    gc.collect()
    files, running = open_files(), threads()
    yield
    gc.collect()
    assert open_files() == files
    assert threads() <= running  # pytest's watchdog may have ended meanwhile


def open_files():
    """What descriptors point at; those of Python's own modules come and go with the first use."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(entry))
    return sorted(f for f in found if "toy.gguf" in f or "anon_inode" in f)


def threads():
    """Threads of the process, C's included, without asyncio's for files and names."""
    return len(os.listdir("/proc/self/task")) - len(
        [t for t in threading.enumerate() if t.name.startswith("asyncio")]
    )


def run(main):
    async def checked():
        await asyncio.wait_for(main, 60)
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        assert not left

    asyncio.run(checked())


async def text_of(engine, prompt="the thing on ", n=12):
    tokens = engine.generate(prompt, max_tokens=n, sampling=GREEDY, ignore_eos=True)
    return [token.id async for token in tokens]


def test_generations_cancelled_at_random_moments(model, slow_reads):
    """Some are cancelled, some left in the middle, some fail in their consumer; all others are as
    if they had been alone."""
    rng = random.Random(5)
    prompts = ["the other", "in there, on the ring " * 4, "a stone", "s"]

    async def leave(engine, prompt, after):
        with contextlib.suppress(ZeroDivisionError):
            number = 0
            async for _ in engine.generate(prompt, sampling=GREEDY, ignore_eos=True):
                number += 1
                if number == after:
                    raise ZeroDivisionError

    async def main():
        async with Engine.open(model, **OPTIONS) as engine:
            alone = [await text_of(engine, p) for p in prompts]
            kept, doomed = [], []
            for _ in range(40):
                which = rng.randrange(len(prompts))
                kind = rng.randrange(3)
                if kind == 0:
                    task = asyncio.create_task(text_of(engine, prompts[which]))
                    kept.append((which, task))
                elif kind == 1:
                    task = asyncio.create_task(text_of(engine, prompts[which], n=100))
                    asyncio.get_running_loop().call_later(rng.random() * 0.2, task.cancel)
                    doomed.append(task)
                else:
                    doomed.append(
                        asyncio.create_task(leave(engine, prompts[which], rng.randrange(1, 9)))
                    )
                await asyncio.sleep(rng.random() * 0.01)
            for which, task in kept:
                assert await task == alone[which]
            await asyncio.gather(*doomed, return_exceptions=True)
            assert await text_of(engine, prompts[0]) == alone[0]
            await asyncio.sleep(0.01)  # the last one's share is given back before the next step
            states = engine._loaded.states
            assert len(states._free_pages) == OPTIONS["context"] // 64
            assert len(states._free_states) == OPTIONS["parallel"]

    run(main())


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01, 0.03])
@pytest.mark.parametrize("prompt", ["the ring", "in there, on the ring " * 16])
def test_closing_while_reads_are_in_flight_and_compute_runs(model, slow_reads, delay, prompt):
    async def main():
        engine = await Engine.open(model, **OPTIONS)
        generation = asyncio.create_task(text_of(engine, prompt, n=100))
        await asyncio.sleep(delay)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        closing.cancel()  # it goes on all the same
        await engine.close()
        with pytest.raises(asyncio.CancelledError):
            await closing
        with pytest.raises(fomoe.ClosedError):
            await generation

    run(main())


class CancelledAt:
    """Awaits something, and cancels the task that does so `delay` seconds into its n-th wait."""

    def __init__(self, awaitable, n, delay):
        self.awaitable = awaitable
        self.n = n
        self.delay = delay
        self.waits = 0

    def __await__(self):
        inner = self.awaitable.__await__()
        resume = partial(inner.send, None)
        while True:
            try:
                future = resume()
            except StopIteration as end:
                return end.value
            self.waits += 1
            if self.waits == self.n:
                task = asyncio.current_task()
                asyncio.get_running_loop().call_later(self.delay, task.cancel)
            try:
                yield future
                resume = partial(inner.send, None)
            except BaseException as error:
                resume = partial(inner.throw, error)


@pytest.mark.parametrize("delay", [0, 0.001, 0.004])
def test_opening_is_cancelled_whatever_it_waits_for(model, slow_reads, delay):
    async def wait_for(opening):
        return await opening

    async def main():
        for n in itertools.count(1):
            opening = CancelledAt(Engine.open(model, **OPTIONS), n, delay)
            try:
                engine = await asyncio.create_task(wait_for(opening))
            except asyncio.CancelledError:
                continue
            await engine.close()
            if opening.waits < n:
                break
        assert n > 3, "opening waits for the tokenizer, the drive and the dense weights at least"

    run(main())


@pytest.mark.parametrize(
    "stage",
    [
        "fomoe.loading.models.describe",
        "fomoe.loading.probe_drive",
        "fomoe.loading.open_reader",
        "fomoe.loading.plan_memory",
        "fomoe.loading.Arena",
        "fomoe.processor.DenseWeights.load",
        "fomoe.processor.CpuOps.reserve",
        "fomoe.processor.models.build",
        "fomoe.loading.StatePool",
        "fomoe.loading._store",
        "fomoe.loading._residency",
    ],
)
def test_opening_fails_at_any_stage(model, monkeypatch, stage, tmp_path):
    def fail(*_, **__):
        raise ZeroDivisionError(stage)

    monkeypatch.setattr(stage, fail)

    async def main():
        with pytest.raises(ZeroDivisionError):
            await Engine.open(model, trace=tmp_path / "trace", **OPTIONS)

    run(main())


def test_memory_is_not_freed_before_the_last_read_has_landed(model, monkeypatch):
    """The reader says when it is idle; only then is the arena unmapped."""
    readers = []

    def opened(*args, **options):
        readers.append(FaultyReader(open_reader(*args, **options), 1, max_delay_s=0.02))
        return readers[-1]

    monkeypatch.setattr("fomoe.loading.open_reader", opened)
    idle = []
    unmap = lib.fomoe_memory_unmap

    class Lib:
        def __getattr__(self, name):
            return getattr(lib, name)

        def fomoe_memory_unmap(self, address, size):
            idle.append(readers[0].idle())
            return unmap(address, size)

    monkeypatch.setattr("fomoe.io.arena.lib", Lib())

    async def main():
        async with Engine.open(model, **OPTIONS) as engine:
            async for _ in engine.generate("the ring", sampling=GREEDY):
                assert not readers[0].idle() or engine.plan.all_resident
                break

    run(main())
    assert idle == [True]


def test_ctrl_c_in_a_program_of_the_user(model, slow_reads):
    """asyncio.run turns it into a cancellation of the main task, then raises; a shell's background
    job, which these tests may be, would begin with the signal ignored."""

    async def main():
        async with Engine.open(model, **OPTIONS) as engine:
            async for token in engine.generate("the ring", sampling=GREEDY, ignore_eos=True):
                if token.text is not None:
                    os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
    finally:
        signal.signal(signal.SIGINT, before)


def test_more_sequences_than_run_at_once_wait_their_turn(model):
    async def main():
        async with Engine.open(model, **OPTIONS) as engine:
            alone = await text_of(engine)
            assert await asyncio.gather(*(text_of(engine) for _ in range(10))) == [alone] * 10
            # A waiting request whose consumer leaves makes room for those behind it.
            whole = asyncio.create_task(text_of(engine, n=400))
            stuck = asyncio.create_task(text_of(engine, n=400))
            behind = asyncio.create_task(text_of(engine))
            await asyncio.sleep(0.05)
            stuck.cancel()
            assert await behind == alone
            whole.cancel()
            with pytest.raises(fomoe.RequestError, match="do not fit into a context of 512"):
                await engine.logits([1] * 513)
            with pytest.raises(fomoe.RequestError, match="max_tokens must be 0 or more"):
                await text_of(engine, n=-1)

    run(main())


def test_an_error_of_the_user_closes_everything(model, slow_reads):
    async def main():
        async with Engine.open(model, **OPTIONS) as engine:
            async for _ in engine.generate("the ring", sampling=GREEDY, ignore_eos=True):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main())


def test_background_work_that_fails_is_told_and_done_without(model, monkeypatch, caplog):
    async def no_memory(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("fomoe.processor.prepare", no_memory)

    async def main():
        async with Engine.open(model, **OPTIONS) as engine:
            assert len(await text_of(engine)) == 12

    run(main())
    assert "Cannot allocate memory" in caplog.text
