"""`fomoe perplexity`: score a text as llama-perplexity does; keep or compare log-probabilities."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.commands.common import add_engine_arguments, open_engine, read_text
from fomoe.engine import Engine
from fomoe.errors import FormatError, RequestError
from fomoe.outputs import check_outputs, output_flags
from fomoe.perplexity import Score, Window, log_softmax, windows

# Rows scored at once: one of a large vocabulary is a megabyte, and scoring takes several of them.
_ROWS = 16
_BASE_MAGIC = "fomoe log-probabilities 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-f", "--file", type=Path, metavar="FILE", help="the text (default: standard input)")
    add("--chunks", type=int, default=-1, metavar="N", help="windows to score (default: all)")
    add("--stride", "--ppl-stride", type=int, default=0, metavar="N",
        help="let windows overlap, N tokens apart, and score the last N of each (default: 0, they"
        " do not overlap, and the second half of each is scored)")  # fmt: skip
    add("--kl-base", type=Path, metavar="FILE", help="write exact log-probabilities to a file")
    add("--kl", type=Path, metavar="FILE",
        help="compare with such a file: KL divergence, agreement, perplexity ratio")  # fmt: skip
    add("--stepwise", action="store_true",
        help="token by token, as generation computes (always so with --car)")  # fmt: skip
    add("--resume", type=Path, metavar="FILE",
        help="note results in a file, and continue a run that was interrupted")  # fmt: skip
    add_engine_arguments(parser, context=512)


def run(args: argparse.Namespace) -> Coroutine[Any, Any, int]:
    if args.kl and args.kl_base:
        raise RequestError("--kl compares with a file that --kl-base wrote: give one of them")
    if args.kl_base and args.car != "off":
        raise RequestError("--kl-base writes exact log-probabilities: leave --car out")
    return _run(args, read_text(args.file, what="text", flags="-f FILE"))


async def _run(args: argparse.Namespace, text: str) -> int:
    async with open_engine(args, logit_rows=_logit_rows(args)) as engine:
        tokenizer = engine.tokenizer
        ids = tokenizer.encode(text)
        bos = tokenizer.bos_id if tokenizer.adds_bos else None
        todo = windows(ids, args.ctx_size, stride=args.stride, bos=bos)
        if args.chunks >= 0:
            todo = todo[: args.chunks]
        if not todo:
            raise RequestError("--chunks leaves no window to score")
        _check_files(args, engine)
        base = _Base(args, engine, todo)
        journal = _Journal(args, engine, ids)
        total = await _score(args, engine, todo, base, journal)
        print(*total.lines(compared=args.kl is not None), sep="\n")
        print(*engine.stats().lines(), sep="\n", file=sys.stderr)
    return 0


def _logit_rows(args: argparse.Namespace) -> int:
    """Rows of logits in memory at a time: what a step computes, while those of the one before are
    scored, which takes four times as many as are scored at once."""
    step: int = 1 if _is_stepwise(args) else min(args.ubatch_size, args.ctx_size)
    scored: int = args.stride or -(-args.ctx_size // 2)
    steps = 1 if step >= args.ctx_size else 2
    return steps * min(step, scored) + 4 * _ROWS


def _is_stepwise(args: argparse.Namespace) -> bool:
    return bool(args.stepwise or args.car != "off")


def _check_files(args: argparse.Namespace, engine: Engine) -> None:
    inputs = dict.fromkeys(engine.loaded.gguf.paths, "the model")
    inputs |= {path: "what is read" for path in (args.file, args.kl) if path}
    outputs = {"--kl-base": args.kl_base, "--resume": args.resume}
    check_outputs(output_flags(engine.options) | outputs, inputs)


async def _score(
    args: argparse.Namespace, engine: Engine, todo: list[Window], base: _Base, journal: _Journal
) -> Score:
    stepwise = _is_stepwise(args)
    total = Score()
    for done in journal.done[: len(todo)]:
        total.merge(done)
    for number in range(len(journal.done), len(todo)):
        window = todo[number]
        score = Score()
        row = 0
        async for logits in engine.logit_rows(window.tokens, first=window.first, stepwise=stepwise):
            # What follows the last token is not known: its row scores nothing.
            targets = window.targets[row : row + len(logits)]
            for i in range(0, len(targets), _ROWS):
                some = targets[i : i + _ROWS]
                log_probs = log_softmax(logits[i : i + len(some)])
                score.add(log_probs, some, base.exchange(number, row + i, log_probs))
            row += len(logits)
        journal.add(score)
        total.merge(score)
        text = f"[{number + 1}/{len(todo)}] {total.perplexity:.4f}"
        print(text, end=" ", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return total


class _Base:
    """The file of exact log-probabilities: written (--kl-base), compared with (--kl), or neither.

    One line of JSON, padded to a multiple of 4 bytes, then float32 [windows, rows, vocab].
    """

    def __init__(self, args: argparse.Namespace, engine: Engine, todo: list[Window]) -> None:
        self._rows: npt.NDArray[np.float32] | None = None
        self._writes = args.kl_base is not None
        path = args.kl_base or args.kl
        if path is None:
            return
        tokens = hashlib.sha256(repr([w.tokens for w in todo]).encode()).hexdigest()
        vocab = engine.loaded.hp.vocab_size
        rows = len(todo[0].targets)
        header = {"format": _BASE_MAGIC, "tokens": tokens, "shape": [len(todo), rows, vocab]}
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 1) % 4) + b"\n"
        shape = (len(todo), rows, vocab)
        try:
            if not self._writes:
                with path.open("rb") as file:
                    known = file.readline(1 << 16)
                if known != text or path.stat().st_size < len(text) + 4 * math.prod(shape):
                    raise FormatError(
                        f"{path} does not hold log-probabilities of these windows: write it anew "
                        "with --kl-base and the same text, -c, --stride and --chunks"
                    )
            elif not (args.resume and path.exists() and args.resume.exists()):
                path.write_bytes(text)
            mode = "r+" if self._writes else "r"
            if self._writes:
                # Now, since a full drive met through the mapping would kill the process.
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, len(text) + 4 * math.prod(shape))
            self._rows = np.memmap(path, np.float32, mode, len(text), shape)  # type: ignore[call-overload]
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror}") from error

    def exchange(
        self, window: int, row: int, log_probs: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32] | None:
        """Keep rows of a window, or give the exact ones to compare them with."""
        if self._rows is None:
            return None
        place = self._rows[window, row : row + len(log_probs)]
        if self._writes:
            place[...] = log_probs
            return None
        return np.asarray(place)


class _Journal:
    """Results by window in a file, so that an interrupted run can be continued."""

    def __init__(self, args: argparse.Namespace, engine: Engine, ids: list[int]) -> None:
        self.done: list[Score] = []
        self._path: Path | None = args.resume
        if self._path is None:
            return
        settings = {
            "model": engine.loaded.gguf.fingerprint,
            "text": hashlib.sha256(repr(ids).encode()).hexdigest(),
            "context": args.ctx_size,
            "stride": args.stride,
            "stepwise": args.stepwise,
            "kl": str(args.kl),
            "car": str(engine.options.car),
        }
        try:
            if self._path.exists():
                self._read(self._path, settings)
            else:
                self._path.write_text(json.dumps(settings) + "\n")
        except OSError as error:
            raise RequestError(f"{self._path}: {error.strerror}") from error

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        first, *lines = path.read_text().split("\n")
        try:
            same = json.loads(first) == settings
            # The last line is empty, or was being written when the run was interrupted.
            self.done = [Score(**json.loads(line)) for line in lines[:-1]]
        except (ValueError, TypeError) as error:
            raise FormatError(f"{path} is not a file of --resume: {error}") from error
        if not same:
            raise RequestError(f"{path} belongs to another model, text or setting: delete it")
        path.write_text("\n".join([first, *lines[:-1], ""]))

    def add(self, score: Score) -> None:
        self.done.append(score)
        if self._path is None:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(score)) + "\n")
        except OSError as error:
            raise RequestError(f"{self._path}: {error.strerror}") from error
