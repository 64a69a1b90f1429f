"""Decoding and prompts of a large model's shapes on a device, beside what the hardware allows.

Owns: the file (real shapes, random weights, as many layers as asked for), runs under memory budgets
and their bound. Does not know: kernels, the card. tools/gpu_check runs it: a JSON array on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fomoe.bench import BenchTest, TokenSource, decode_bytes, run_sample, warm_up
from fomoe.engine import Engine
from fomoe.experts.car import CarOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import toy  # type: ignore[import-not-found]

LARGE = toy.Toy(
    hidden=4096, heads=32, kv_heads=2, head_dim=256, rope_dims=64, experts=512, top_k=10, ff=1024,
    shared_ff=1024, k_heads=16, v_heads=64, state_dim=128, vocab=248320, dense_type="Q4_K",
    gate_type="Q4_K", up_type="Q4_K", down_types=("Q6_K", "Q4_K"), embed_type="Q4_K", align=4096,
)  # fmt: skip
TINY = toy.Toy()
# A layer's experts are 3.9 GB; what is free must hold them and leave some.
LAYER_BYTES, HEAD_BYTES, MAX_LAYERS = 4_000_000_000, 1_400_000_000, 8


def write(path: Path, layers: int) -> None:
    """The file with `layers` layers, 0 for as many as the disk holds."""
    if not layers:
        free = shutil.disk_usage(path.parent).free
        layers = min(MAX_LAYERS, int((free * 0.8 - HEAD_BYTES) // LAYER_BYTES))
        if layers < 1:
            raise SystemExit(f"{path.parent} has {free / 1e9:.1f} GB free: a layer takes 4 GB")
    toy.write_toy(path, replace(LARGE, layers=layers))


def bound_seconds(
    engine: Engine, read: float, copied: float, rates: dict[str, float]
) -> dict[str, float]:
    """Seconds of a token in which each part moves its bytes: max(drive, link, device memory)."""
    drive = engine.loaded.drive
    seconds = {
        "device_memory": decode_bytes(engine) / 1e9 / rates["copy_gb_per_second"],
        "link": copied / 1e9 / rates["to_device_gb_per_second"],
    }
    if drive is not None:
        seconds["drive"] = read / drive.bytes_per_second
    return seconds


async def measure(
    args: argparse.Namespace, vram: str, car: str, rates: dict[str, float]
) -> dict[str, Any]:
    """Rates of generation and of a prompt under one budget."""
    generation, prompt = BenchTest(generated=args.n_gen), BenchTest(prompt=args.n_prompt)
    async with Engine.open(
        args.model, dram=args.dram, vram=() if args.tiny else vram, device=args.device,
        car=CarOptions.parse(car), context=args.n_gen + args.n_prompt,
    ) as engine:  # fmt: skip
        source = TokenSource(engine.loaded.hp.vocab_size)
        await warm_up(engine, generation, source)
        before = copied_bytes(engine)
        samples = [await run_sample(engine, generation, source) for _ in range(args.repetitions)]
        tokens = args.repetitions * args.n_gen
        copied = (copied_bytes(engine) - before) / tokens
        read = sum(s.expert_bytes for s in samples) / tokens
        seconds = statistics.median(s.seconds for s in samples) / args.n_gen
        bound = bound_seconds(engine, read, copied, rates)
        await warm_up(engine, prompt, source)
        prompt_seconds = (await run_sample(engine, prompt, source)).seconds
        return {
            "vram": vram,
            "car": car,
            "tokens_per_second": 1 / seconds,
            "prompt_tokens_per_second": args.n_prompt / prompt_seconds,
            "read_bytes_per_token": read,
            "copied_bytes_per_token": copied,
            "bound_seconds": bound,
            "seconds_over_bound": seconds / max(bound.values()),
            "plan": engine.plan.lines(),
            "stats": engine.stats().lines(),
        }


def copied_bytes(engine: Engine) -> int:
    return sum(device.tier.copied_bytes for device in engine.stats().devices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="written if it is not there")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the disk holds")
    parser.add_argument("--tiny", action="store_true", help="a file of 2 MB instead")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--vram", default="16GiB,24GiB")
    parser.add_argument("--dram", default=None)
    parser.add_argument("--car", default="off,on")
    parser.add_argument("--n-gen", type=int, default=32)
    parser.add_argument("--n-prompt", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rates", type=json.loads, required=True, help="the card's limits, JSON")
    args = parser.parse_args()
    if not args.model.exists():
        if args.tiny:
            toy.write_toy(args.model, TINY)
        else:
            write(args.model, args.layers)
    runs = [
        asyncio.run(measure(args, vram, car, args.rates))
        for vram in args.vram.split(",")
        for car in args.car.split(",")
    ]
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
