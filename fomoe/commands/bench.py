"""`fomoe bench`: llama-bench's tests, flags and table, and what the experts cost."""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from fomoe import host
from fomoe.bench import BenchResult, BenchTest, TokenSource, run_sample, warm_up
from fomoe.bench_table import FORMATS, Run
from fomoe.commands.common import add_engine_arguments, open_engine, read_text
from fomoe.engine import Engine
from fomoe.errors import RequestError
from fomoe.kernels.bandwidth import (
    BYTES_PER_THREAD,
    LEAST_BYTES_PER_THREAD,
    measure_read_bandwidth,
)
from fomoe.needs import PROCESS
from fomoe.plan import MemoryPlan

_MAX_TESTS = 10_000  # of one flag: a range is written quickly
_PAGE_BYTES = 2 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tests", "Numbers are lists (512,1024) or ranges (128-512+128, 128-1024*2)."
    )
    add = group.add_argument
    add("-p", "--n-prompt", type=_numbers, action="extend", metavar="N,...",
        help="tokens of a prompt, 0 for no such test (default: 512)")  # fmt: skip
    add("-n", "--n-gen", type=_numbers, action="extend", metavar="N,...",
        help="tokens to generate, 0 for no such test (default: 128)")  # fmt: skip
    add("-pg", type=_pair, action="append", default=[], metavar="PP,TG",
        help="a prompt and what is generated after it, timed together")  # fmt: skip
    add("-d", "--n-depth", type=_numbers, action="extend", metavar="N,...",
        help="tokens in the context before a test begins (default: 0)")  # fmt: skip
    add("-r", "--repetitions", type=int, default=5, metavar="N",
        help="times that each test runs (default: %(default)s)")  # fmt: skip
    add("--text", type=Path, metavar="FILE",
        help="tokens of a text, which route as text does, instead of random ones")  # fmt: skip
    add("--cold", action="store_true",
        help="begin every repetition with no expert in memory, the model opened anew (not with"
        " --profile, --trace, --record-routes or --stats)")  # fmt: skip
    add("--no-warmup", action="store_true", help="begin as the test before left the cache")
    add("-o", "--output", choices=sorted(FORMATS), default="md",
        help="format of the table (default: %(default)s)")  # fmt: skip
    add("--stats", action="store_true", help="the engine's figures on stderr at the end")
    add_engine_arguments(parser, context=None)


def run(args: argparse.Namespace) -> Coroutine[Any, Any, int]:
    tests = _tests(args)
    if args.repetitions < 1:
        raise RequestError("-r must be at least 1")
    _check_cold(args)
    needed = max(test.total_tokens for test in tests)
    context = args.ctx_size or needed
    if context < needed:
        raise RequestError(f"the tests need a context of {needed} tokens, -c gives {context}")
    text = read_text(args.text, what="text", flags="--text FILE") if args.text else None
    return _run(args, tests, context, text)


async def _run(
    args: argparse.Namespace, tests: list[BenchTest], context: int, text: str | None
) -> int:
    quiet = args.output != "md"
    output = FORMATS[args.output](sys.stdout)
    opening = open_engine(args, quiet=quiet, context=context)  # refuses bad options
    threads = args.threads or host.num_processors()
    # Before the engine takes its memory, so that the budget is kept.
    memory_rate = _memory_rate(threads, args.dram)
    knows_peak = host.forget_peak()  # else the peak may be the measurement's
    warms_up = not (args.cold or args.no_warmup)
    engine: Engine | None = None
    try:
        engine = await opening
        same = _same_plan(engine.plan)
        ids = None if text is None else engine.tokenizer.encode(text)
        source = TokenSource(engine.loaded.hp.vocab_size, ids)
        source.require(sum(test.total_tokens for test in tests) * (args.repetitions + warms_up))
        output.begin(Run.of(engine, threads, memory_rate, source.kind))
        for test in tests:
            result = BenchResult(test)
            if warms_up:
                await warm_up(engine, test, source)
            for _ in range(args.repetitions):
                if args.cold:
                    await engine.close()
                    engine = None  # what it holds must go before the next one comes
                    gc.collect()
                    engine = await open_engine(args, quiet=True, context=context, **same)
                result.samples.append(await run_sample(engine, test, source))
            output.row(result)
        output.end()
        if args.stats:
            stats = engine.stats()
            if not knows_peak:
                stats.peak_bytes = 0
            print(*stats.lines(), sep="\n", file=sys.stderr)
    finally:
        if engine is not None:
            await engine.close()
    return 0


def _check_cold(args: argparse.Namespace) -> None:
    """Refuse what one opening would leave to the next, or tell of the last one alone."""
    if not args.cold:
        return
    for flag in ("profile", "trace", "record_routes", "stats"):
        if getattr(args, flag):
            raise RequestError(
                "--cold opens the model anew for every repetition: leave out"
                f" --{flag.replace('_', '-')}"
            )


def _memory_rate(threads: int, budget: int | None) -> float | None:
    """Bytes per second that the threads read from memory, measured within the budget and what is
    free. None where too little of it is left."""
    room = host.available_bytes()
    if budget is not None:
        room = min(room, budget - host.resident_bytes())
    nbytes = min(BYTES_PER_THREAD, room // threads) // _PAGE_BYTES * _PAGE_BYTES
    if nbytes < LEAST_BYTES_PER_THREAD:
        return None
    try:
        return measure_read_bandwidth(threads, nbytes)
    except (OSError, RuntimeError):  # memory or threads that the process may not have (ulimit)
        return None


def _same_plan(plan: MemoryPlan) -> dict[str, Any]:
    """Options that give this plan again, though the process has grown meanwhile."""
    return {
        "dram": plan.budget,
        "vram": tuple(device.budget for device in plan.devices),
        "process_bytes": dict(plan.fixed)[PROCESS],
    }


def _tests(args: argparse.Namespace) -> list[BenchTest]:
    """In llama-bench's order: for each depth, prompts, then generation, then pairs."""
    prompts = [512] if args.n_prompt is None else args.n_prompt
    generated = [128] if args.n_gen is None else args.n_gen
    tests = []
    for depth in args.n_depth or [0]:
        tests += [BenchTest(prompt=n, depth=depth) for n in prompts if n]
        tests += [BenchTest(generated=n, depth=depth) for n in generated if n]
        tests += [BenchTest(prompt=p, generated=n, depth=depth) for p, n in args.pg]
    if not tests:
        raise RequestError("no test is left: give -p, -n or -pg")
    return tests


def _numbers(text: str) -> list[int]:
    """ "512,1024", "128-512+128" (steps), "128-1024*2" (factors), "1-4"."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?", part)
        if not match:
            raise argparse.ArgumentTypeError(f"{part!r} is neither a number nor a range")
        first, last = int(match[1]), int(match[2] or match[1])
        step = int(match[4] or 1)
        if step < 1 + (match[3] == "*") or (match[3] == "*" and not first):
            raise argparse.ArgumentTypeError(f"{part!r} never ends")
        number = first
        while number <= last:
            if len(numbers) == _MAX_TESTS:
                raise argparse.ArgumentTypeError(f"{part!r} is more than {_MAX_TESTS} tests")
            numbers.append(number)
            number = number * step if match[3] == "*" else number + step
    return numbers


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match or not int(match[1]) + int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not PP,TG, such as 512,128")
    return int(match[1]), int(match[2])
