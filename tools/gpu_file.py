"""A file of a large model's shapes with random weights, of as many layers as are worth their time.

Owns: the shapes, the choice of the number of layers, and writing: what layers have alike is made
once, and lies on the drive, not in the page cache, when it is done. Does not know: what the file is
for. tools/gpu_check runs it: JSON, an object a line, on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from fomoe.io.probe import probe_drive

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import toy  # type: ignore[import-not-found]

LARGE = toy.Toy(
    hidden=4096, heads=32, kv_heads=2, head_dim=256, rope_dims=64, experts=512, top_k=10, ff=1024,
    shared_ff=1024, k_heads=16, v_heads=64, state_dim=128, vocab=248320, dense_type="Q4_K",
    gate_type="Q4_K", up_type="Q4_K", down_types=("Q6_K", "Q4_K"), embed_type="Q4_K", align=4096,
)  # fmt: skip
WHOLE = 60  # layers of Qwen3.5-397B
LEAST = 2  # one of each kind of layer
PROBE_BYTES = 512 << 20
LEFT_FREE = 2 << 30


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second of the drive."""

    write: float
    read: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A number of layers, and what it is for the sake of."""

    layers: int
    because: str


class Tensors:
    """The contents of the file: what layers have alike is made once, routers each time."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._made: dict[tuple[str, tuple[int, ...], str], tuple[Any, Any]] = {}

    def get(self, name: str, shape: tuple[int, ...], type_name: str) -> tuple[Any, Any]:
        """Values or raw blocks, and their type."""
        kind = name.split(".", 2)[2] if name.startswith("blk.") else name
        # Gate and up are as good as each other.
        key = ("experts" if kind.endswith("_exps.weight") else kind), shape, type_name
        if kind != "ffn_gate_inp.weight" and key in self._made:
            return self._made[key]
        self._made[key] = toy.random_tensor(self._rng, name, shape, type_name)
        return self._made[key]


def shapes(layers: int) -> toy.Toy:
    """`layers` layers, the last of which has attention where they are too few for one by turns."""
    few = None if layers >= LARGE.interval else (True,) * (layers - 1) + (False,)
    return replace(LARGE, layers=layers, recurrent_layers=few)


def num_bytes(shape: toy.Toy) -> int:
    """Of all tensors, but for what the small ones' types fall back to."""
    total = 0
    for _, dims, type_name in toy.tensor_plan(shape):
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
        total += int(np.prod(dims)) // block_size * block_bytes
    return total


def measure(folder: Path) -> Rates:
    """What the drive of a folder does."""
    path = folder / "probe"
    data = np.random.default_rng(1).integers(0, 256, PROBE_BYTES, dtype=np.uint8)
    begin = time.perf_counter()
    try:
        with path.open("wb") as file:
            data.tofile(file)
            os.fsync(file.fileno())
        write = PROBE_BYTES / (time.perf_counter() - begin)
        drive = asyncio.run(probe_drive(path, cache=None, io="auto", direct="auto"))
    finally:
        path.unlink(missing_ok=True)
    return Rates(write, drive.bytes_per_second if drive else write)


def choose(free: int, rates: Rates, write_seconds: float, read_seconds: float) -> Choice:
    """The most layers that a drive with `free` bytes holds, that are written in the time given, and
    whose bytes are all read in the time given."""
    head = num_bytes(shapes(LEAST)) - num_bytes(shapes(LEAST + 2)) + num_bytes(shapes(LEAST))
    layer = (num_bytes(shapes(LEAST + 2)) - num_bytes(shapes(LEAST))) / 2
    limits = {
        f"what the disk holds, {free / 1e9:.0f} GB being free": free - LEFT_FREE,
        f"what is written at {rates.write / 1e9:.2f} GB/s in {write_seconds:.0f} s": rates.write
        * write_seconds,
        f"what is read at {rates.read / 1e9:.2f} GB/s in {read_seconds:.0f} s": rates.read
        * read_seconds,
    }
    because, room = min(limits.items(), key=lambda item: item[1])
    layers = int((room - head) / layer)
    if layers >= WHOLE:
        return Choice(WHOLE, "the whole model")
    return Choice(layers, because)


def write(path: Path, shape: toy.Toy) -> None:
    """The file; its bytes are on the drive in the end, and not in the page cache."""
    tensors, plan = Tensors(), list(toy.tensor_plan(shape))
    writer = toy.begin_file(path, shape)
    for name, dims, type_name in plan:
        data, type_ = tensors.get(name, dims, type_name)
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    descriptor = writer.fout[0].fileno()
    with ThreadPoolExecutor(1) as pool:
        flushed: Future[None] | None = None
        for name, dims, type_name in plan:
            writer.write_tensor_data(tensors.get(name, dims, type_name)[0])
            if flushed:
                flushed.result()
            # While the next tensor is copied into the page cache: two of them are there at most.
            flushed = pool.submit(flush, descriptor)
    writer.close()


def flush(descriptor: int) -> None:
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, help="(default: chosen)")
    parser.add_argument("--tiny", action="store_true", help="a file of 2 MB instead")
    parser.add_argument("--write-seconds", type=float, default=120)
    parser.add_argument("--read-seconds", type=float, default=60)
    args = parser.parse_args()
    shape, rates, choice = toy.Toy(), None, Choice(toy.Toy().layers, "tiny")
    if not args.tiny:
        free = shutil.disk_usage(args.path.parent).free
        rates = measure(args.path.parent)
        choice = choose(free, rates, args.write_seconds, args.read_seconds)
        if args.layers:
            choice = Choice(args.layers, "given")
        if choice.layers < LEAST:
            raise SystemExit(
                f"{args.path.parent}: {LEAST} layers and the head are"
                f" {num_bytes(shapes(LEAST)) / 1e9:.0f} GB, more than {choice.because}:"
                " name a folder on a larger or faster drive with --work, or give more --minutes"
            )
        shape = shapes(choice.layers)
    about: dict[str, Any] = {"layers": choice.layers, "because": choice.because}
    if rates:
        about |= {"write_gb_per_second": rates.write / 1e9, "read_gb_per_second": rates.read / 1e9}
    print(json.dumps({"file": about}), flush=True)
    begin = time.perf_counter()
    write(args.path, shape)
    about = {"bytes": args.path.stat().st_size, "seconds": time.perf_counter() - begin}
    print(json.dumps({"file": about}), flush=True)


if __name__ == "__main__":
    main()
