"""Launches and gaps of decoded tokens, from what torch's profiler records of the card.

Owns: the recording, and what it says: kernels and launches per layer, and the time in which no
kernel runs. Does not know: models, kernels. Nothing is guessed: where the profiler gives no kernels
the answer is the reason.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

Event = dict[str, Any]
# What the host calls: cudaLaunchKernel, cuLaunchKernelEx, hipModuleLaunchKernel, cudaGraphLaunch.
LAUNCH = re.compile(r"(cuda|cu|hip)(Ext)?(Module)?Launch(Cooperative)?Kernel")
GRAPH_LAUNCH = re.compile(r"(cuda|cu|hip)GraphLaunch")


async def record(
    decode: Callable[[], Awaitable[object]], tokens: int, layers: int, file: Path
) -> dict[str, Any]:
    """What `decode` makes the card do, which computes so many tokens: `figures`, or, under the key
    "not measured", why there are none. `file`: where the trace may lie meanwhile."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return {"not measured": "there is no GPU"}
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            await decode()
        events = await asyncio.to_thread(exported, profiler, file)
    except Exception as error:  # of any library that a profiler needs: it is told
        return {"not measured": f"torch's profiler failed: {type(error).__name__}: {error}"}
    return figures(events, tokens, layers)


def exported(profiler: Any, file: Path) -> list[Event]:
    """The events of its Chrome trace."""
    profiler.export_chrome_trace(str(file))
    try:
        events: list[Event] = json.loads(file.read_text())["traceEvents"]
    finally:
        file.unlink()
    return events


def figures(events: Iterable[Event], tokens: int, layers: int) -> dict[str, Any]:
    """Of a Chrome trace's events, times in microseconds. `kernels`, `launches` (by the host, of
    kernels by themselves), `graph launches`, `copies`, `busy us` and `idle us` (of the card,
    between the first kernel and the last) are per layer and token, embedding and head counted in;
    `median gap us` is the time between a kernel and the next."""
    complete = [e for e in events if e.get("ph") == "X"]
    kernels = sorted((e["ts"], e["ts"] + e["dur"]) for e in complete if e.get("cat") == "kernel")
    if not kernels:
        return {"not measured": "torch's profiler saw no kernels on the card"}
    calls = [str(e["name"]) for e in complete if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    copies = sum(e.get("cat") == "gpu_memcpy" for e in complete)
    gaps, end, busy = [], kernels[0][0], 0.0
    for begin, finish in kernels:
        if begin >= end:
            gaps.append(begin - end)
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    span = end - kernels[0][0]
    per = tokens * layers
    return {
        "tokens": tokens,
        "kernels": len(kernels) / per,
        "launches": sum(bool(LAUNCH.match(name)) for name in calls) / per,
        "graph launches": sum(bool(GRAPH_LAUNCH.match(name)) for name in calls) / per,
        "copies": copies / per,
        "busy us": busy / per,
        "idle us": (span - busy) / per,
        "median gap us": statistics.median(gaps[1:]) if len(gaps) > 1 else 0.0,
    }
