"""Flags that all commands with a model share, and how they become an engine.

Owns: names of flags (llama.cpp's where it has them), the plan and progress on stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from fomoe.config import parse_size, parse_sizes
from fomoe.demo import DEMO_MODEL
from fomoe.engine import Engine, Opening
from fomoe.errors import RequestError
from fomoe.experts.car_options import CarOptions
from fomoe.plan import MemoryPlan


def add_engine_arguments(parser: argparse.ArgumentParser, context: int | None = 4096) -> None:
    """All flags of an engine. context: the default of -c; None: what the command needs."""
    _add_model_arguments(parser, context)
    _add_device_arguments(parser)
    _add_expert_arguments(parser)
    _add_car_arguments(parser)
    group = parser.add_argument_group("recordings")
    group.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="record reads, stalls and compute, for tools/trace",
    )  # fmt: skip
    group.add_argument(
        "--record-routes",
        type=Path,
        metavar="FILE",
        help="record every routing, for tools/simulate",
    )


def _add_model_arguments(parser: argparse.ArgumentParser, context: int | None) -> None:
    group = parser.add_argument_group("model, memory and processor")
    group.add_argument(
        "-m", "--model", type=Path, metavar="FILE",
        help="GGUF file, any shard of a split one (default: the demo model)",
    )  # fmt: skip
    group.add_argument(
        "--dram", type=_size, metavar="SIZE",
        help="what the process may use in all, such as 16GiB (default: planned from what is free)",
    )  # fmt: skip
    group.add_argument(
        "-c", "--ctx-size", type=int, default=context, metavar="N",
        help="tokens of context, shared by all that runs at once"
        f" (default: {context or 'what is needed'})",
    )  # fmt: skip
    group.add_argument(
        "-ub", "--ubatch-size", type=int, default=512, metavar="N",
        help="tokens of a prompt computed in one step (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "-ctk", "--cache-type", choices=("f16", "f32"), default="f16",
        help="element type of the key and value cache (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "-t", "--threads", type=int, metavar="N", help="compute threads (default: all processors)"
    )
    group.add_argument(
        "--cpu-isa", choices=("auto", "scalar", "avx2", "avx512", "amx"), default="auto",
        help="use no more than this instruction set (default: what the processor has)",
    )  # fmt: skip


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--device", default="cpu", metavar="NAME",
        help="where layers are computed: cpu, cuda:0, hip:0; several take turns, as in"
        " cuda:0,cuda:1 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--vram", type=_sizes, default=(), metavar="SIZE",
        help="what may be used of each device's memory, such as 14GiB, or 14GiB,10GiB (default:"
        " planned from what is free)",
    )  # fmt: skip
    group.add_argument(
        "--cpu-moe", action="store_true",
        help="the processor computes all experts, the device everything else",
    )  # fmt: skip
    group.add_argument(
        "--n-cpu-moe", type=int, default=0, metavar="N",
        help="the processor computes the experts of the first N layers (default: %(default)s)",
    )  # fmt: skip


def _add_expert_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experts (how they are read, who stays in memory)")
    group.add_argument(
        "--io", choices=("auto", "uring", "threads"), default="auto",
        help="how files are read: io_uring or preadv threads (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--direct", choices=("auto", "on", "off"), default="auto",
        help="read past the page cache, O_DIRECT (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--replica", type=Path, action="append", default=[], metavar="PATH",
        help="the same file on another drive, or its folder: reads are shared between them"
        " (repeatable)",
    )  # fmt: skip
    group.add_argument(
        "--cache-policy", default="lfu", metavar="NAME",
        help="who stays in memory: lfu, lfru, lru (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--cache-share", type=float, default=1.0, metavar="SHARE",
        help="slots for at most this share of the experts, for a small model as if it were large"
        " (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--prefetch", choices=("auto", "on", "off"), default="auto",
        help="read predicted experts ahead: auto stops when it does not pay (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--profile", type=Path, metavar="FILE",
        help="use counts of earlier runs: seeds the cache, and is updated at the end",
    )  # fmt: skip


def _add_car_arguments(parser: argparse.ArgumentParser) -> None:
    usual = CarOptions()
    group = parser.add_argument_group("cache-aware routing (changes what is computed)")
    group.add_argument(
        "--car", default="off", nargs="?", const="on", metavar="RULE",
        help="let resident experts stand in for ones that would stall: budget:SHARE (what "
        "--car alone does, with 0.28), light:TIMES, ratio:TAU, prior:LAMBDA, max-rank:J,M "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--car-top-j", type=int, metavar="N",
        help=f"the true best N experts are never replaced (default: {usual.top_j})",
    )  # fmt: skip
    group.add_argument(
        "--car-max-mass", type=float, metavar="SHARE",
        help="at most this share of a layer's weight is moved to stand-ins"
        f" (default: {usual.max_mass:g})",
    )  # fmt: skip
    group.add_argument(
        "--car-weights", choices=("dampen", "renorm"),
        help=f"what stand-ins lack in probability is dropped, or made up for (default:"
        f" {usual.weights})",
    )  # fmt: skip
    group.add_argument(
        "--car-audit", type=float, default=0.0, metavar="SHARE",
        help="compute this share of tokens exactly as well and report the KL divergence"
        " (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--no-backfill", dest="backfill", action="store_false",
        help="do not read replaced experts while the drive is idle",
    )  # fmt: skip
    group.add_argument(
        "--deterministic", action="store_true", help="with --car: the same text on any drive"
    )


def open_engine(args: argparse.Namespace, *, quiet: bool = False, **more: Any) -> Opening:
    """An engine as the flags say. Unless `quiet`, stderr shows the plan, then a bar."""
    options: dict[str, Any] = {
        "dram": args.dram,
        "vram": args.vram,
        "context": args.ctx_size,
        "parallel": 1,
        "ubatch": args.ubatch_size,
        "threads": args.threads,
        "cache_type": args.cache_type,
        "io": args.io,
        "direct": args.direct,
        "replicas": tuple(args.replica),
        "cpu_isa": args.cpu_isa,
        "cache_policy": args.cache_policy,
        "cache_share": args.cache_share,
        "prefetch": args.prefetch,
        "profile": args.profile,
        "record_routes": args.record_routes,
        "car": CarOptions.parse(
            args.car,
            top_j=args.car_top_j,
            max_mass=args.car_max_mass,
            weights=args.car_weights,
        ),
        "car_audit": args.car_audit,
        "backfill": args.backfill,
        "deterministic": args.deterministic,
        "trace": args.trace,
        "device": args.device,
        "cpu_moe": args.cpu_moe,
        "n_cpu_moe": args.n_cpu_moe,
    }
    return Engine.open(
        args.model or DEMO_MODEL,
        on_plan=None if quiet else show_plan,
        progress=None if quiet else LoadBar(),
        **(options | more),
    )


def show_plan(plan: MemoryPlan) -> None:
    print("memory plan", *plan.lines(), sep="\n", file=sys.stderr)


class LoadBar:
    """A progress bar for the dense weights, on a terminal only."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if not sys.stderr.isatty() or (now - self._shown < 0.1 and done < total):
            return
        self._shown = now
        rate = done / max(now - self._begin, 1e-9) / 1e9
        filled = 30 * done // total
        bar = "#" * filled + "." * (30 - filled)
        end = "\n" if done == total else "\r"
        print(f"dense weights [{bar}] {rate:5.2f} GB/s ", end=end, file=sys.stderr, flush=True)


def read_text(path: Path | None, *, what: str, flags: str) -> str:
    """The text of a file, or of standard input without one. Raises RequestError, which calls it
    `what` and names the `flags` that give it. Not for a running event loop: a pipe may take its
    time."""
    if path is not None:
        where = str(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RequestError(f"cannot read the {what} from {where}: {error.strerror}") from error
    elif sys.stdin is None or sys.stdin.isatty():
        raise RequestError(f"no {what}: give one with {flags} or on standard input")
    else:
        where = "standard input"
        data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the {what} from {where} is not UTF-8 text: {error}") from error


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return parse_sizes(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
