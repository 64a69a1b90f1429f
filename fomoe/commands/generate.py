"""`fomoe generate`: continue a prompt, streaming text to stdout and figures to stderr."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from fomoe.commands.common import add_engine_arguments, open_engine, read_prompt
from fomoe.engine import Engine
from fomoe.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt (else -f, else stdin)")
    parser.add_argument(
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


async def run(args: argparse.Namespace) -> int:
    sampling = sampling_from(args)
    prompt = read_prompt(args)
    stop = asyncio.Event()
    # Ctrl-C ends the generation, keeps what was generated and prints the figures; a second one,
    # when the handler is gone, ends the program.
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        async with open_engine(args) as engine:
            print(f"reading with {engine.loaded.reader.describe()}", file=sys.stderr)
            return await _generate(args, engine, prompt, sampling, stop)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _generate(
    args: argparse.Namespace, engine: Engine, prompt: str, sampling: Sampling, stop: asyncio.Event
) -> int:
    limit = None if args.n_predict < 0 else args.n_predict
    tokens: list[int] = []
    text: list[str] = []
    reason = "length"
    if not args.json:
        print(prompt, end="", flush=True)

    async def consume() -> None:
        nonlocal reason
        async for token in engine.generate(
            prompt, sampling=sampling, max_tokens=limit, ignore_eos=args.ignore_eos
        ):
            tokens.append(token.id)
            text.append(token.text)
            reason = token.finish_reason or reason
            if not args.json:
                print(token.text, end="", flush=True)

    generation = asyncio.create_task(consume())
    interrupted = asyncio.create_task(stop.wait())
    await asyncio.wait([generation, interrupted], return_when=asyncio.FIRST_COMPLETED)
    interrupted.cancel()
    if not generation.done():
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        reason = "interrupted"
        generation.cancel()
        await asyncio.wait([generation])
    if not generation.cancelled() and (error := generation.exception()):
        raise error
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
    return 130 if reason == "interrupted" else 0
