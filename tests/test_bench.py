"""`fomoe bench`: what is computed and timed, flags, formats; and Engine.feed, which it rests on."""

import argparse
import asyncio
import csv
import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from toy import K_TOY, write_toy

from fomoe import CarOptions, Engine, RequestError, host
from fomoe.bench import BenchResult, BenchTest, Sample, TokenSource, run_sample, warm_up
from fomoe.cli import main
from fomoe.commands.bench import _memory_rate as measures_memory
from fomoe.commands.bench import _numbers, _pair
from fomoe.config import format_size
from fomoe.kernels.bandwidth import measure_read_bandwidth
from fomoe.kernels.open_device import backend_name, card_name

TOY = dataclasses.replace(K_TOY, layers=3, experts=16, top_k=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 60))


def test_feed_gives_the_logits_after_each_piece(model):
    tokens = [5, 9, 2, 7, 7, 3, 11, 4]

    async def both():
        async with Engine.open(model, context=64, ubatch=4, cache_type="f32") as engine:
            pieces = [tokens[:5], tokens[5:6], tokens[6:]]
            fed = [logits async for logits in engine.feed(pieces, max_tokens=8)]
            return fed, await engine.logits(tokens)

    fed, whole = run(both())
    for logits, last in zip(fed, (4, 5, 7), strict=True):
        np.testing.assert_allclose(logits, whole[last], atol=2e-3 * np.abs(whole).max())


def test_feed_refuses_what_was_not_announced(model):
    async def feed(pieces, max_tokens):
        async with Engine.open(model, context=64) as engine:
            async for _ in engine.feed(pieces, max_tokens=max_tokens):
                pass
            assert [t async for t in engine.generate([1, 2], max_tokens=2, ignore_eos=True)]

    run(feed([[1, 2], [3]], 3))
    for pieces, max_tokens, message in (
        ([[1, 2], [3, 4]], 3, "than the 3 that were announced"),
        ([[1], []], 3, "no tokens"),
        ([[10**6]], 3, "outside the vocabulary"),
        ([[1]], 65, "do not fit into a context of 64"),
    ):
        with pytest.raises(RequestError, match=message):
            run(feed(pieces, max_tokens))


@pytest.mark.parametrize(
    ("test", "name", "steps"),
    [
        (BenchTest(prompt=10), "pp10", 2),
        (BenchTest(generated=5), "tg5", 5),
        (BenchTest(prompt=9, generated=2), "pp9+tg2", 4),
        (BenchTest(generated=3, depth=16), "tg3 @ d16", 3),
    ],
)
def test_a_test_computes_its_tokens_and_no_others(model, test, name, steps):
    async def sample():
        async with Engine.open(model, context=64, ubatch=8) as engine:
            taken = await run_sample(engine, test, TokenSource(TOY.vocab))
            stats = engine.stats()
            return taken, stats.prompt.steps + stats.generation.steps

    taken, all_steps = run(sample())
    assert test.name == name
    assert all_steps == steps + test.depth // 8
    assert taken.picks == test.timed_tokens * TOY.layers * TOY.top_k
    assert taken.seconds > 0
    assert taken.expert_bytes > 0 or test.depth


def test_stand_ins_are_for_all_generated_tokens_and_no_others(model):
    async def metered(test):
        car = CarOptions.parse("on")
        async with Engine.open(model, context=64, cache_share=0.5, car=car) as engine:
            await run_sample(engine, test, TokenSource(TOY.vocab))
            return engine.stats().residency.car.token_layers

    assert run(metered(BenchTest(generated=5))) == 5 * TOY.layers
    assert run(metered(BenchTest(prompt=6, generated=2))) == 2 * TOY.layers


@pytest.mark.parametrize(
    ("test", "prompt", "generation"),
    [
        (BenchTest(generated=3), 0, 3),
        (BenchTest(generated=3, depth=16), 16, 3),
        (BenchTest(prompt=9, depth=8), 17, 0),
        (BenchTest(prompt=9, generated=2, depth=8), 17, 2),
    ],
)
def test_what_is_computed_together_is_a_prompt_at_any_depth(model, test, prompt, generation):
    async def sample():
        async with Engine.open(model, context=64, ubatch=8) as engine:
            await run_sample(engine, test, TokenSource(TOY.vocab))
            return engine.stats()

    stats = run(sample())
    assert (stats.prompt.tokens, stats.generation.tokens) == (prompt, generation)


def test_warm_up_leaves_nothing_to_read(model):
    async def sample():
        async with Engine.open(model, context=64) as engine:
            test = BenchTest(generated=4)
            await warm_up(engine, test, TokenSource(TOY.vocab))
            return await run_sample(engine, test, TokenSource(TOY.vocab))

    taken = run(sample())
    assert taken.hits == taken.picks
    assert taken.expert_bytes == 0


def test_figures_of_a_result():
    result = BenchResult(BenchTest(generated=10))
    costs = {"picks": 40, "hits": 30, "expert_bytes": 30 << 20, "stall_seconds": 0.6}
    result.samples.append(Sample(cold=True, seconds=1.0, **costs))
    assert result.cache == "cold"
    result.samples.append(Sample(cold=False, seconds=2.0, **costs))
    assert result.cache == "mixed"
    assert result.rates == [10.0, 5.0]
    assert result.hit_rate == 0.75
    assert result.mib_per_token == 3.0
    assert result.stall_share == pytest.approx(0.4)
    assert result.read_gb_per_second == pytest.approx((60 << 20) / 3e9)
    assert result.to_dict()["avg_ts"] == 7.5


def test_a_text_is_used_once():
    source = TokenSource(100, [1, 2, 3, 4, 5])
    assert [source.take(2), source.take(2)] == [[1, 2], [3, 4]]
    with pytest.raises(RequestError, match="the text has 5 tokens, the tests need 6"):
        source.take(2)


def test_numbers_as_llama_bench_reads_them():
    assert _numbers("512,8") == [512, 8]
    assert _numbers("1-4") == [1, 2, 3, 4]
    assert _numbers("128-512+128") == [128, 256, 384, 512]
    assert _numbers("128-1024*2,7") == [128, 256, 512, 1024, 7]
    assert _pair("512,128") == (512, 128)
    for text in ("", "1-", "a", "1-8*1", "0-8*2", "1-8+0", "-1", "1-1000000000"):
        with pytest.raises(argparse.ArgumentTypeError):
            _numbers(text)
    for text in ("512", "0,0", "1,2,3"):
        with pytest.raises(argparse.ArgumentTypeError):
            _pair(text)


def test_memory_is_read_at_some_rate():
    assert 1e8 < measure_read_bandwidth(2, 1 << 20) < 1e13


def test_the_memory_is_measured_within_the_budget(monkeypatch):
    measured = []
    monkeypatch.setattr(
        "fomoe.commands.bench.measure_read_bandwidth",
        lambda threads, nbytes: measured.append(threads * nbytes) or 20e9,
    )
    resident = host.resident_bytes()
    monkeypatch.setattr(host, "resident_bytes", lambda: resident)
    assert measures_memory(2, None) == 20e9
    assert measures_memory(2, resident + (200 << 20)) == 20e9
    assert measured == [512 << 20, 200 << 20]
    monkeypatch.setattr(host, "available_bytes", lambda: 160 << 20)
    measures_memory(2, 64 << 30)
    assert measured[2:] == [160 << 20]
    assert measures_memory(2, resident + (100 << 20)) is None
    assert measures_memory(2, resident - 1) is None
    assert len(measured) == 3


def test_memory_that_the_process_may_not_have_is_not_measured(monkeypatch):
    def refused(threads, nbytes):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("fomoe.commands.bench.measure_read_bandwidth", refused)
    assert measures_memory(1, None) is None


@pytest.fixture(autouse=True)
def known_memory_rate(monkeypatch):
    monkeypatch.setattr("fomoe.commands.bench._memory_rate", lambda threads, budget: 20e9)


def bench(capsys, model, *arguments):
    status = main(["bench", "-m", str(model), "-p", "8", "-n", "4", "-r", "2", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("how", "caches"),
    [(["--cold"], ["cold"] * 3), (["--no-warmup"], ["mixed", "warm", "warm"]), ([], ["warm"] * 3)],
)
def test_json_has_the_names_of_llama_bench(capsys, model, how, caches):
    status, out, _ = bench(capsys, model, "-pg", "4,2", "-o", "json", "-t", "1", *how)
    assert status == 0
    rows = json.loads(out)
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [
        (8, 0, 0), (0, 4, 0), (4, 2, 0),
    ]  # fmt: skip
    assert all(len(r["samples_ts"]) == 2 and r["avg_ts"] > 0 for r in rows)
    assert [r["cache"] for r in rows] == caches
    assert rows[0]["n_threads"] == 1
    assert (rows[0]["mib_per_token"] > 0) == bool(how)


def test_other_formats_hold_the_same(capsys, model):
    _, out, err = bench(capsys, model, "-o", "csv", "--stats")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [r["n_gen"] for r in rows] == ["0", "4"]
    assert "generation" in err
    _, out, _ = bench(capsys, model, "-o", "jsonl", "-d", "8")
    assert [json.loads(line)["n_depth"] for line in out.splitlines()] == [8, 8]
    _, out, err = bench(capsys, model)
    assert "| t/s |" in " ".join(out.splitlines()[0].split())
    assert [line.split("|")[6].strip() for line in out.splitlines()[2:4]] == ["pp8", "tg4"]
    assert "memory plan" in err
    assert "read 20.0 GB/s from memory\ntg4: " in out


def test_a_memory_rate_that_is_not_known_is_not_printed(capsys, model, monkeypatch):
    monkeypatch.setattr("fomoe.commands.bench._memory_rate", lambda threads, budget: None)
    _, out, _ = bench(capsys, model)
    assert "the memory's rate: not measured\ntg4: " in out
    assert "of that" not in out
    _, out, _ = bench(capsys, model, "-o", "json")
    assert json.loads(out)[0]["memory_gb_per_second"] is None


@pytest.mark.parametrize("flags", [[], ["--device", "cpu,cpu"]])
def test_a_plan_is_kept_though_the_process_grows(capsys, model, monkeypatch, flags):
    plans, resident = [], itertools.count(100 << 20, 16 << 20)

    def noted(engine, test, source):
        plans.append(engine.plan)
        return run_sample(engine, test, source)

    monkeypatch.setattr("fomoe.commands.bench.run_sample", noted)
    monkeypatch.setattr(host, "resident_bytes", lambda: next(resident))
    status, _, err = bench(capsys, model, "--cold", *flags)
    assert status == 0, err
    assert len(plans) == 4
    assert len({(p.budget, p.fixed, p.quota) for p in plans}) == 1
    assert len({tuple(d.quota.items()) for p in plans for d in p.devices[:1]}) < 2
    assert f"of {format_size(plans[0].budget)} " in err


def test_figures_of_no_peak_leave_it_out(capsys, model, monkeypatch):
    _, _, err = bench(capsys, model, "--stats")
    assert "memory      " in err
    monkeypatch.setattr(host, "forget_peak", lambda: False)
    _, _, err = bench(capsys, model, "--stats")
    assert "memory      " not in err


def test_devices_are_named(capsys, model):
    """The layers of threads that stand for a device are the processor's, too."""
    flags = ["--device", "cpu,cpu", "--n-cpu-moe", "2"]
    _, out, _ = bench(capsys, model, *flags, "-o", "json")
    row = json.loads(out)[0]
    assert (row["backends"], row["devices"], row["gpu_info"]) == ("CPU", "cpu,cpu", "")
    assert (row["n_gpu_layers"], row["n_cpu_moe"]) == (3, 2)
    assert row["device_memory_budget"] > 0
    _, out, _ = bench(capsys, model, *flags)
    header, _, first, *_ = ([c.strip() for c in line.split("|")] for line in out.splitlines())
    cells = dict(zip(header, first, strict=True))
    assert (cells["backend"], cells["ngl"], cells["n_cpu_moe"]) == ("CPU", "3", "2")
    assert "on cpu, cpu: memory for 33 % of the experts" in out
    _, out, _ = bench(capsys, model, "-o", "json")
    row = json.loads(out)[0]
    assert (row["backends"], row["devices"], row["n_gpu_layers"]) == ("CPU", "cpu", 0)


def test_a_card_is_named(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    assert [card_name(name) for name in ("cpu", "cuda", "hip:1")] == [None, "Card 0", "Card 1"]
    assert [backend_name(n) for n in ("cpu", "cuda:0", "hip:1")] == ["CPU", "CUDA", "ROCm"]


def test_text_and_bad_requests(capsys, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the thing on the other side of there " * 40)
    status, out, _ = bench(capsys, model, "--text", str(text), "-o", "json")
    assert status == 0
    assert json.loads(out)[0]["tokens"] == "text"
    for arguments, message in (
        (["--text", str(tmp_path / "none")], "cannot read the text"),
        (["--text", str(tmp_path)], "Is a directory"),
        (["--text", "/dev/null"], "the text has 0 tokens, the tests need"),
        (["-c", "4"], "need a context of 8 tokens, -c gives 4"),
        (["-r", "0"], "-r must be at least 1"),
        (["-t", "-1"], "threads must be 1 to 4096, not -1"),
        (["--cold", "--stats"], "opens the model anew for every repetition: leave out --stats"),
        (["--cold", "--profile", "p"], "leave out --profile"),
        (["--cold", "--trace", "t"], "leave out --trace"),
        (["--cold", "--record-routes", "r"], "leave out --record-routes"),
    ):
        status, out, err = bench(capsys, model, *arguments)
        assert (status, message in err, out) == (1, True, ""), err
    assert main(["bench", "-p", "0", "-n", "0"]) == 1
