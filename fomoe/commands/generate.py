"""`fomoe generate`: continue a prompt, streaming text to stdout and figures to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from fomoe.commands.common import add_engine_arguments, open_engine, read_text
from fomoe.commands.interruption import Interruption
from fomoe.engine import Engine
from fomoe.errors import RequestError
from fomoe.sampling import Sampling
from fomoe.stats import car_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt (else -f, else stdin)")
    source.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="read the prompt from a file"
    )
    parser.add_argument(
        "-n", "--n-predict", type=int, default=128, metavar="N",
        help="tokens to generate, -1 until the context is full (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of text")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """llama.cpp's sampling flags and defaults."""
    defaults = Sampling()
    group = parser.add_argument_group("sampling")
    for flag, kind, default, text in (
        ("--temp", float, defaults.temperature, "temperature, 0 takes the likeliest token"),
        ("--top-k", int, defaults.top_k, "draw from the k likeliest tokens, 0 is off"),
        ("--top-p", float, defaults.top_p, "draw from the likeliest tokens of this mass, 1 is off"),
        ("--min-p", float, defaults.min_p, "drop tokens below this share of the best, 0 is off"),
        ("--repeat-penalty", float, defaults.repeat_penalty, "penalise repeats, 1 is off"),
        ("--repeat-last-n", int, defaults.repeat_last_n, "tokens that penalties look at, -1: all"),
        ("--presence-penalty", float, defaults.presence_penalty, "penalty of tokens seen, 0: off"),
        ("--frequency-penalty", float, defaults.frequency_penalty, "the same, per occurrence"),
    ):  # fmt: skip
        group.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    group.add_argument(
        "-s", "--seed", type=int, default=-1, metavar="N", help="-1 draws a fresh one (default: -1)"
    )


def sampling_from(args: argparse.Namespace) -> Sampling:
    return Sampling(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
    )


def run(args: argparse.Namespace) -> Coroutine[Any, Any, int]:
    if args.n_predict < -1:
        raise RequestError(f"-n must be 0 or more, or -1, not {args.n_predict}")
    prompt = args.prompt
    if prompt is None:
        prompt = read_text(args.file, what="prompt", flags="-p TEXT, -f FILE")
    return _run(args, prompt, sampling_from(args))


async def _run(args: argparse.Namespace, prompt: str, sampling: Sampling) -> int:
    with Interruption() as interruption:
        # Loading may take long: it is left at the first signal, with everything given back.
        engine = await interruption.unless(_opened(args))
        if engine is None:
            print("\nfomoe: interrupted while loading", file=sys.stderr)
            return interruption.status
        async with engine:
            print(f"reading with {engine.loaded.reader.describe()}", file=sys.stderr)
            return await _generate(args, engine, prompt, sampling, interruption)


class CarTitle:
    """What stand-ins cost, in the title of the terminal while text streams; nothing without a
    terminal or without cache-aware routing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._on = sys.stderr.isatty() and engine.options.car.rule != "off"
        self._shown = 0.0
        self._print("\033[22;0t")  # keep the title that was there

    def show(self) -> None:
        now = time.perf_counter()
        if self._on and now - self._shown > 0.5:
            residency = self._engine.stats().residency
            assert residency is not None
            lines = [" ".join(line.split()) for line in car_lines(residency)]
            if lines:
                self._shown = now
                self._print(f"\033]0;{'; '.join(lines)}\a")

    def close(self) -> None:
        self._print("\033[23;0t")

    def _print(self, sequence: str) -> None:
        if self._on:
            print(sequence, end="", file=sys.stderr, flush=True)


async def _opened(args: argparse.Namespace) -> Engine:
    return await open_engine(args)


async def _generate(
    args: argparse.Namespace,
    engine: Engine,
    prompt: str,
    sampling: Sampling,
    interruption: Interruption,
) -> int:
    limit = None if args.n_predict < 0 else args.n_predict
    ids = engine.encode(prompt)
    tokens: list[int] = []
    text: list[str] = []
    reason = "length"
    if not args.json:
        print(prompt, end="", flush=True)

    title = CarTitle(engine)

    async def consume() -> None:
        nonlocal reason
        async for token in engine.generate(
            ids, sampling=sampling, max_tokens=limit, ignore_eos=args.ignore_eos
        ):
            tokens.append(token.id)
            text.append(token.text)
            reason = token.finish_reason or reason
            if not args.json:
                print(token.text, end="", flush=True)
            title.show()

    await interruption.unless(consume())
    title.close()
    if interruption.status:
        reason = "interrupted"
    stats = engine.stats()
    if args.json:
        result = {
            "prompt": prompt,
            "text": "".join(text),
            "tokens": tokens,
            "finish_reason": reason,
            "stats": stats.to_dict(),
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(flush=True)
        print(file=sys.stderr)
    print(*stats.lines(), sep="\n", file=sys.stderr)
    return interruption.status
