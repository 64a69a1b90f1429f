"""What copies and the processor take on this machine, measured when an engine is opened.

Owns: the measurements. Does not know: who goes by them (experts/placement.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fomoe.experts.device_layout import DeviceLayout
from fomoe.experts.layer import Resident
from fomoe.experts.placement import Costs
from fomoe.host_experts import HostExperts
from fomoe.kernels.device import Device
from fomoe.kernels.ops import MoeSpec, Routing
from fomoe.memory import reached
from fomoe.models import LayerParameters

_ROUNDS = 3
_COPIES = 8
_MANY_TOKENS = 32


async def measure_costs(
    device: Device,
    helper: HostExperts | None,
    layers: Sequence[tuple[LayerParameters, DeviceLayout]],
    memory: int,
    nbytes: int,
) -> dict[int, Costs]:
    """The costs of an expert of each layer. `memory`: nbytes of host memory, prepared; its contents
    count as experts. Layers of one shape are measured once.

    Without a helper the processor is the device: nothing is gained by a copy, so its side is free.
    """
    known: dict[tuple[MoeSpec, int], Costs] = {}
    result = {}
    for parameters, layout in layers:
        spec = parameters.moe
        key = spec, layout.expert_bytes
        if key not in known:
            copy_s = await _copy_seconds(device, memory, nbytes, layout.expert_bytes)
            one = many = 0.0
            if helper:
                experts, kept = _experts(layout)
                one = _host_seconds(helper, spec, experts, 1)
                many = _host_seconds(helper, spec, experts, min(_MANY_TOKENS, len(helper.h)))
                del kept
            per_token = max(many - one, 0.0) / (_MANY_TOKENS - 1)
            known[key] = Costs(copy_s, max(one - per_token, 0.0), per_token)
        result[parameters.index] = known[key]
    return result


async def _copy_seconds(device: Device, memory: int, nbytes: int, expert_bytes: int) -> float:
    """Seconds that the copy of an expert to the device takes among others."""
    size = min(expert_bytes, nbytes)
    target = device.address(device.array((size,), np.uint8))
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for i in range(_COPIES):
            source = memory + i * size % max(nbytes - size, 1)
            device.uploads.copy(target, source, size)
        await reached(device, device.uploads.record())
        best = min(best, time.perf_counter() - begin)
    return best / _COPIES * expert_bytes / size


def _experts(layout: DeviceLayout) -> tuple[list[Resident], npt.NDArray[np.uint8]]:
    """Experts of zeros, one for each round so that no cache has them, and what keeps them."""
    memory = np.full(_ROUNDS * layout.slot_bytes, 0, np.uint8)
    base = int(memory.ctypes.data)
    return [layout.resident(i, base + i * layout.slot_bytes) for i in range(_ROUNDS)], memory


def _host_seconds(
    helper: HostExperts, spec: MoeSpec, experts: Sequence[Resident], tokens: int
) -> float:
    """Seconds that the processor takes for one expert that so many tokens picked."""
    best = float("inf")
    for expert in experts:
        picks = (expert[0] + np.arange(spec.top_k)) % spec.num_experts
        ids = np.tile(picks.astype(np.int32), (tokens, 1))
        weights = np.zeros((tokens, spec.top_k), np.float32)
        logits = np.zeros((tokens, spec.num_experts), np.float32)
        helper.h[:tokens] = 0
        helper.begin(spec, Routing(h=None, logits=logits, ids=ids, weights=weights))
        begin = time.perf_counter()
        helper.run([expert])
        best = min(best, time.perf_counter() - begin)
        helper.finish()
    return best
