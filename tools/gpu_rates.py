"""What a card can do, and what the kernels make of it.

Owns: timing of copies and kernels on a device. Does not know: models, files, the engine. Without a
GPU (TRITON_INTERPRET=1) it runs tiny shapes in Triton's interpreter: whether it works, not how
fast. tools/gpu_check runs it as a program: JSON, an object a line, on stdout, each as soon as it is
known. A kernel that fails is told of, and leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fomoe.kernels.gpu import matmul, matvec, moe
from fomoe.kernels.gpu.launch import arch_of
from fomoe.kernels.gpu.weights import GpuWeight
from fomoe.kernels.ops import MoeSpec
from fomoe.kernels.table import QUANT_TYPES, QuantType

Run = Callable[[], dict[str, Any]]

TYPES = {t.name: t for t in QUANT_TYPES.values()}
IN_GRAPH = 8
# Where the float16 scales of a block lie: random bytes there could be infinite.
HALVES = {
    "Q8_0": (0,), "Q5_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
}  # fmt: skip
NAMES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "IQ4_XS", "MXFP4", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """`rows` and `cols` of a matrix, `tokens` of a prompt; the experts of a layer, of which `slots`
    are in memory; bytes of the copies; the side of a square product; repetitions."""

    rows: int
    cols: int
    tokens: int
    hidden: int
    ff: int
    top_k: int
    slots: int
    copy_bytes: int
    square: int
    repeat: int


# Qwen3.5-397B. The rows are many, so that the last-level cache holds little of them.
LARGE = Sizes(
    rows=65536, cols=4096, tokens=2048, hidden=4096, ff=1024, top_k=10, slots=160,
    copy_bytes=1 << 30, square=8192, repeat=20,
)  # fmt: skip
TINY = Sizes(
    rows=8, cols=256, tokens=9, hidden=256, ff=256, top_k=2, slots=2, copy_bytes=1 << 16,
    square=32, repeat=1,
)  # fmt: skip


class Device:
    """The device that is measured, and its clock."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gpu = torch.device(name).type == "cuda"

    def seconds(self, run: Callable[[int], object], repeat: int) -> float:
        """The median time of a `run(i)` on the device: IN_GRAPH of them, as one graph, so that the
        processor's launches are not in it."""
        times = []
        if not self.gpu:
            for i in range(repeat):
                begin = time.perf_counter()
                run(i)
                times.append(time.perf_counter() - begin)
            return statistics.median(times)
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(IN_GRAPH):
                run(i)
        graph.replay()
        for _ in range(repeat):
            begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin_event.record()
            graph.replay()
            end_event.record()
            end_event.synchronize()
            times.append(begin_event.elapsed_time(end_event) / 1e3 / IN_GRAPH)
        return statistics.median(times)

    def random(self, shape: tuple[int, ...], dtype: Any = torch.float32) -> Any:
        return torch.randn(shape, dtype=dtype, device=self.name)


def random_bytes(type_: QuantType, rows: int, cols: int, device: str) -> Any:
    """A random matrix of sane scales on the device."""
    if type_.block_size == 1:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[type_.name]
        return torch.randn((rows, cols), dtype=dtype, device=device).view(torch.uint8).flatten()
    num = rows * cols // type_.block_size
    blocks = torch.randint(0, 256, (num, type_.block_bytes), dtype=torch.uint8, device=device)
    scale = torch.from_numpy(np.float16(0.01).reshape(1).view(np.uint8)).to(device)
    for offset in HALVES.get(type_.name, ()):
        blocks[:, offset : offset + 2] = scale
    if type_.name == "MXFP4":
        blocks[:, 0] = 120
    return blocks.flatten()


def limits(device: Device, sizes: Sizes) -> dict[str, float]:
    """The card's own rates: copies on it and to it from pinned memory, and bfloat16 products."""
    a = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device.name)
    b = torch.empty_like(a)
    copy = 2 * sizes.copy_bytes / device.seconds(lambda _: b.copy_(a), sizes.repeat)
    pinned = torch.empty(min(sizes.copy_bytes, 256 << 20), dtype=torch.uint8, pin_memory=device.gpu)
    part = a[: pinned.numel()]
    to_device = device.seconds(lambda _: part.copy_(pinned, non_blocking=True), sizes.repeat)
    to_host = device.seconds(lambda _: pinned.copy_(part, non_blocking=True), sizes.repeat)
    x, y = (device.random((sizes.square,) * 2, torch.bfloat16) for _ in range(2))
    product = device.seconds(lambda _: x @ y, sizes.repeat)
    return {
        "copy_gb_per_second": copy / 1e9,
        "to_device_gb_per_second": pinned.numel() / to_device / 1e9,
        "to_host_gb_per_second": pinned.numel() / to_host / 1e9,
        "bf16_tflops": 2 * sizes.square**3 / product / 1e12,
    }


def products(device: Device, sizes: Sizes, name: str) -> dict[str, Any]:
    """One token: GB/s of weights. A prompt: TFLOP/s."""
    data = random_bytes(TYPES[name], sizes.rows, sizes.cols, device.name)
    one = decode_seconds(device, sizes, TYPES[name], data)
    rows = min(sizes.rows, 8192)
    many = prompt_seconds(device, sizes, TYPES[name], data, rows)
    return {
        "gb_per_second": data.numel() / one / 1e9,
        "prompt_tflops": 2 * sizes.tokens * rows * sizes.cols / many / 1e12,
    }


def decode_seconds(device: Device, sizes: Sizes, type_: QuantType, data: Any) -> float:
    """The matrix of all rows times one token."""
    weight = GpuWeight(rows=sizes.rows, cols=sizes.cols, type=type_, data=data)
    x, out = device.random((1, sizes.cols)), device.random((1, sizes.rows))
    return device.seconds(lambda _: matvec.matvec(x, [weight], [out]), sizes.repeat)


def prompt_seconds(device: Device, sizes: Sizes, type_: QuantType, data: Any, rows: int) -> float:
    """The matrix of the first `rows` rows times a prompt's tokens."""
    part = data[: rows * type_.row_bytes(sizes.cols)]
    weight = GpuWeight(rows=rows, cols=sizes.cols, type=type_, data=part)
    x, out = device.random((sizes.tokens, sizes.cols)), device.random((sizes.tokens, rows))
    return device.seconds(lambda _: matmul.matmul(x, weight, out), sizes.repeat)


class Experts:
    """A layer's experts in device memory, `slots` of them, picked at random."""

    def __init__(self, device: Device, sizes: Sizes, down_type: str) -> None:
        q4_k, down = TYPES["Q4_K"], TYPES[down_type]
        self.spec = MoeSpec(
            num_experts=sizes.slots, top_k=sizes.top_k, hidden=sizes.hidden, ff=sizes.ff,
            gate_type=q4_k, up_type=q4_k, down_type=down,
        )  # fmt: skip
        shapes = [(q4_k, sizes.ff, sizes.hidden)] * 2 + [(down, sizes.hidden, sizes.ff)]
        self.matrices = [
            [random_bytes(*shape, device.name) for shape in shapes] for _ in range(sizes.slots)
        ]
        addresses = [[m.data_ptr() for m in expert] for expert in self.matrices]
        self.table = torch.tensor(addresses, dtype=torch.int64, device=device.name)
        self.device, self.sizes = device, sizes

    def pick(self, tokens: int) -> Any:
        rng = np.random.default_rng(0)
        ids = [rng.permutation(self.sizes.slots)[: self.sizes.top_k] for _ in range(tokens)]
        return torch.from_numpy(np.array(ids, np.int32)).to(self.device.name)

    def buffers(self, tokens: int) -> tuple[Any, Any, Any, Any]:
        sizes, picks = self.sizes, tokens * self.sizes.top_k
        h, x = (self.device.random((tokens, sizes.hidden)) for _ in range(2))
        return (
            h,
            x,
            self.device.random((picks, sizes.ff)),
            self.device.random((picks, sizes.hidden)),
        )

    def decode(self) -> dict[str, Any]:
        """One token: gate and up, down, the sum; other experts at every repetition."""
        first = self.pick(1)
        draws = [(first + self.sizes.top_k * i) % self.sizes.slots for i in range(IN_GRAPH)]
        h, x, act, out = self.buffers(1)
        weights = torch.rand((1, self.sizes.top_k), device=self.device.name)

        def run(i: int) -> None:
            moe.gate_up(self.spec, h, draws[i], self.table, act)
            moe.down(self.spec, act, draws[i], self.table, out)
            moe.combine(x, out, weights)

        seconds = self.device.seconds(run, self.sizes.repeat)
        nbytes = sum(m.numel() for m in self.matrices[0]) * self.sizes.top_k
        return {"gb_per_second": nbytes / seconds / 1e9}

    def prompt(self) -> dict[str, Any]:
        tokens = self.sizes.tokens
        ids = self.pick(tokens)
        h, x, act, out = self.buffers(tokens)
        weights = torch.rand((tokens, self.sizes.top_k), device=self.device.name)

        def run(_: int) -> None:
            groups = matmul.group(ids, self.sizes.slots)
            matmul.grouped_gate_up(self.spec, h, groups, self.table, act)
            matmul.grouped_down(self.spec, act, groups, self.table, out)
            moe.combine(x, out, weights)

        seconds = self.device.seconds(run, -(-self.sizes.repeat // 4))
        flops = 6 * tokens * self.sizes.top_k * self.sizes.hidden * self.sizes.ff
        return {"prompt_tflops": flops / seconds / 1e12}


def describe(device: Device) -> dict[str, Any]:
    import triton

    made = {"torch": torch.__version__, "triton": triton.__version__, "arch": arch_of(device.name)}
    if not device.gpu:
        return {"name": "none: Triton's interpreter", **made}
    free, total = torch.cuda.mem_get_info(device.name)
    name = torch.cuda.get_device_name(device.name)
    return {"name": name, "memory_bytes": total, "free_bytes": free, **made}


def rows(device: Device, sizes: Sizes, tiny: bool) -> Iterator[tuple[str, str, Run]]:
    """What is measured: a kernel, its type, and what measures it."""
    for name in ("Q4_K",) if tiny else NAMES:
        yield "matvec", name, partial(products, device, sizes, name)
    for down_type in ("Q6_K",) if tiny else ("Q4_K", "Q6_K"):
        experts = Experts(device, sizes, down_type)
        yield "moe, one token", f"Q4_K, {down_type}", experts.decode
        yield "moe, prompt", f"Q4_K, {down_type}", experts.prompt
        del experts


def measured(run: Run) -> dict[str, Any]:
    try:
        return run()
    except Exception as error:  # of compiling, launching or of memory: whatever it is, it is told
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def tell(part: dict[str, Any]) -> None:
    print(json.dumps(part), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--describe", action="store_true", help="only say what the device is")
    args = parser.parse_args()
    device, sizes = Device(args.device), TINY if args.tiny else LARGE
    if device.gpu and not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} sees no GPU: is the driver there (nvidia-smi, rocminfo)?"
        )
    tell({"device": describe(device)})
    if args.describe:
        return
    tell({"limits": limits(device, sizes)})
    for kernel, type_name, run in rows(device, sizes, args.tiny):
        tell({"kernels": [{"kernel": kernel, "type": type_name, **measured(run)}]})


if __name__ == "__main__":
    main()
