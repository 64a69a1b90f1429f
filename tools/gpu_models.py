"""Decoding and a prompt of a model on a device under one memory budget, beside what the hardware
allows.

Owns: the run and its bound, in the time it is given. Does not know: kernels, the card, the file.
tools/gpu_check runs it: JSON, an object a line, on stdout, each as soon as it is known.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fomoe.bench import BenchTest, Sample, TokenSource, decode_bytes, run_sample
from fomoe.engine import Engine
from fomoe.experts.car_options import CarOptions
from fomoe.host import resident_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_launches import record

PROMPT_SHARE = 0.6  # of the time, that a prompt may be expected to take
MANY = 16  # tokens that kernels for many compute, as few as there are: each needs other experts
READY_SECONDS, READY_BYTES = 0.3, 16 << 20  # memory that grows by less a time is ready
PROFILED = 4  # tokens
FILL_SHARE = 0.4  # of the time, that all experts may take to come to a card that has room for them
PROFILE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that experts' reads and copies to devices had moved, and their uses, and those that the
    processor computed, at some time."""

    copied: int
    uses: int
    host_uses: int

    @staticmethod
    def of(engine: Engine) -> Moved:
        tiers = [device.tier for device in engine.stats().devices]
        return Moved(
            sum(t.copied_bytes for t in tiers),
            sum(t.uses for t in tiers),
            sum(t.host_uses for t in tiers),
        )


class Run:
    """A model that is open, and the time it may take."""

    def __init__(
        self, engine: Engine, args: argparse.Namespace, end: float, free: int | None
    ) -> None:
        self.engine, self.args, self.end, self.free = engine, args, end, free
        self.rates: dict[str, float] = args.rates
        self.source = TokenSource(engine.loaded.hp.vocab_size)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    async def all(self) -> None:
        tell({"plan": self.engine.plan.lines()})
        await self.warm_up()
        tell({"prompt": await self.prompt()})
        await self.fill()
        tell({"generation": await self.generation()})
        tell({"memory": self.memory()})
        tell({"launches": await self.launches()})
        tell({"stats": self.engine.stats().lines()})

    async def warm_up(self) -> None:
        """Compile the kernels, of a few tokens and of many, while the memory of the host is still
        made ready; and wait until that is over, as far as its growth shows."""
        for test in (BenchTest(prompt=MANY), BenchTest(generated=2)):
            await run_sample(self.engine, test, self.source)
        before = 0
        while (now := resident_bytes()) > before + READY_BYTES:
            before = now
            await asyncio.sleep(READY_SECONDS)

    async def prompt(self) -> dict[str, Any]:
        """The first long prompt, when little is in memory: it also fills the caches."""
        drive = self.engine.loaded.drive
        plan = self.engine.plan
        if drive:
            experts = plan.num_experts * plan.streamed_bytes_per_token
            experts //= sum(p.moe.top_k for p in self.engine.loaded.hp.layers)
            expected = experts / drive.bytes_per_second
            if expected > PROMPT_SHARE * self.left:
                return {
                    "not measured": f"reading every expert takes {expected:.0f} s of the"
                    f" {self.left:.0f} that are left"
                }
        before = Moved.of(self.engine)
        sample = await run_sample(self.engine, BenchTest(prompt=self.args.n_prompt), self.source)
        after = Moved.of(self.engine)
        bound = self.bound(sample.expert_bytes, after.copied - before.copied)
        return {
            "tokens": self.args.n_prompt,
            "tokens_per_second": self.args.n_prompt / sample.seconds,
            "read_bytes": sample.expert_bytes,
            "copied_bytes": after.copied - before.copied,
            "bound_seconds": bound,
            "seconds_over_bound": over(sample.seconds, bound),
        }

    async def fill(self) -> None:
        """Let all experts come to the devices, where those have room for everyone."""
        places, end = self.engine.loaded.places, time.monotonic() + FILL_SHARE * self.left
        if all(device.all_resident for device in self.engine.plan.devices):
            while any(p.tier.room(i) for i, p in enumerate(places)):
                if time.monotonic() > end:
                    return
                await asyncio.sleep(READY_SECONDS)

    def memory(self) -> dict[str, Any]:
        """What was planned of the card's memory, and what is used."""
        if self.free is None:
            return {"not measured": "there is no GPU"}
        planned = sum(device.total_bytes for device in self.engine.plan.devices)
        return {
            "planned_bytes": planned,
            "used_bytes": self.free - self.engine.loaded.places[0].device.memory()[0],
        }

    async def generation(self) -> dict[str, Any]:
        """Tokens one by one in pieces, after a piece that is not counted, as long as there is time:
        one piece at the least."""
        test = BenchTest(generated=self.args.n_gen)
        await run_sample(self.engine, test, self.source)
        samples: list[Sample] = []
        before, begin = Moved.of(self.engine), time.monotonic()
        while len(samples) < self.args.repetitions:
            samples.append(await run_sample(self.engine, test, self.source))
            each = (time.monotonic() - begin) / len(samples)
            if self.left < each + PROFILE_SECONDS:
                break
        after, tokens = Moved.of(self.engine), len(samples) * self.args.n_gen
        read = sum(s.expert_bytes for s in samples) / tokens
        copied = (after.copied - before.copied) / tokens
        uses = after.uses - before.uses
        host_share = (after.host_uses - before.host_uses) / uses if uses else 0.0
        bound = self.bound(read, copied) | {"device_memory": self.memory_seconds(host_share)}
        seconds = statistics.median(s.seconds for s in samples) / self.args.n_gen
        places = self.engine.loaded.places
        return {
            "tokens": tokens,
            "all_on_device": all(p.tier.holds_all(i) for i, p in enumerate(places)),
            "tokens_per_second": 1 / seconds,
            "read_bytes_per_token": read,
            "copied_bytes_per_token": copied,
            "host_share": host_share,
            "bound_seconds": bound,
            "seconds_over_bound": over(seconds, bound),
        }

    def bound(self, read: float, copied: float) -> dict[str, float]:
        """Seconds in which the drive and the link move so many bytes."""
        drive = self.engine.loaded.drive
        seconds = {"link": copied / 1e9 / self.rates["to_device_gb_per_second"]}
        if drive is not None:
            seconds["drive"] = read / drive.bytes_per_second
        return seconds

    def memory_seconds(self, host_share: float) -> float:
        """Seconds in which the card reads the weights of a token, but for the experts that the
        processor computes."""
        experts = self.engine.plan.streamed_bytes_per_token
        here = decode_bytes(self.engine) - host_share * experts
        return here / 1e9 / self.rates["copy_gb_per_second"]

    async def launches(self) -> dict[str, Any]:
        test = BenchTest(generated=PROFILED)
        decode = partial(run_sample, self.engine, test, self.source)
        file = self.args.model.with_name("profile.json")
        return await record(decode, PROFILED, self.engine.loaded.hp.num_layers, file)


def free_memory(device: str) -> int | None:
    """Bytes of the card that are free before anything is loaded; None of the processor."""
    if device.startswith("cpu"):
        return None
    import torch

    return int(torch.cuda.mem_get_info(int(device.partition(":")[2] or "0"))[0])


def over(seconds: float, bound: dict[str, float]) -> float | None:
    most = max(bound.values())
    return seconds / most if most else None


def tell(part: dict[str, Any]) -> None:
    print(json.dumps(part), flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--vram", default="", help="(default: what is free)")
    parser.add_argument("--dram", default=None)
    parser.add_argument("--car", default="off")
    parser.add_argument("--n-gen", type=int, default=8, help="tokens of a piece")
    parser.add_argument("--n-prompt", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=8, help="pieces at the most")
    parser.add_argument("--seconds", type=float, default=120, help="what it may take in all")
    parser.add_argument("--rates", type=json.loads, required=True, help="the card's limits, JSON")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    context = args.n_prompt + args.n_gen
    free = free_memory(args.device)
    async with Engine.open(
        args.model, dram=args.dram, vram=args.vram or (), device=args.device, context=context,
        ubatch=args.n_prompt, car=CarOptions.parse(args.car), cache_dir=args.model.parent,
    ) as engine:  # fmt: skip
        await Run(engine, args, end, free).all()


if __name__ == "__main__":
    asyncio.run(main())
