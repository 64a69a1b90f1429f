"""The processor, where it computes a model by itself: what stands beside a fleet of devices.

Owns: what it holds in memory besides experts, and the order in which that is made. Does not know:
steps, devices (fleet.py does, and has the same methods).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from typing import Any

from fomoe import host, models
from fomoe.config import EngineOptions
from fomoe.experts.device_tier import DeviceTier
from fomoe.experts.layout import REGION_ALIGNMENT
from fomoe.gguf import GgufFile
from fomoe.io.arena import HUGE_PAGE_BYTES, Arena
from fomoe.io.reader import Reader
from fomoe.kernels.cpu import CpuOps
from fomoe.kernels.ops import Tensor
from fomoe.memory import prepare
from fomoe.models import HyperParameters, Model
from fomoe.places import Place
from fomoe.state import LayerArrays, in_arena, kv_bytes, recurrent_bytes
from fomoe.trace import Tracer
from fomoe.weights import DenseWeights, Progress, region_bytes


class Processor:
    """All layers on `options.threads` threads, from weights in the arena."""

    plans = ()  # of devices
    zero = None  # arrays are filled at once

    def __init__(
        self,
        gguf: GgufFile,
        hp: HyperParameters,
        options: EngineOptions,
        shapes: Mapping[str, Any],
    ) -> None:
        self._gguf, self._hp, self._options, self._shapes = gguf, hp, options, shapes
        self._threads = options.threads or host.num_processors()
        self.table: Tensor | None = None  # the embedding, where it is held
        self.array: LayerArrays

    def host_bytes(self, alignment: int) -> list[tuple[str, int]]:
        """What it takes of the host's memory besides experts, (name, bytes)."""
        hp, options = self._hp, self._options
        infos = (self._gguf.tensors[name] for name in hp.dense_tensors)
        dense = sum(region_bytes(info, REGION_ALIGNMENT) for info in infos)
        workspace = models.buffer_bytes(hp, options.ubatch)
        workspace += CpuOps.workspace_bytes(self._threads, options.ubatch, **self._shapes)
        states = options.parallel * (2 if options.car_audit else 1)  # an audit keeps copies
        return [
            ("dense weights", dense + HUGE_PAGE_BYTES),
            ("KV cache", kv_bytes(hp.layers, options.context, options.cache_type)),
            ("recurrent state", recurrent_bytes(hp.layers) * states),
            ("workspace", workspace),
        ]

    async def load(
        self,
        names: Collection[str],
        arena: Arena,
        reader: Reader,
        progress: Progress | None,
        exits: AsyncExitStack,
    ) -> tuple[Model, float]:
        """The model, its tensors `names` being in the arena; and the rate of reading, GB/s."""
        self.array = in_arena(arena)
        weights = DenseWeights(self._gguf, names, arena, reader.alignment)
        rate = await weights.load(reader, progress)
        ops = CpuOps(self._threads, self._options.ubatch, self._options.cpu_isa)
        exits.callback(ops.close)
        ops.reserve(**self._shapes)
        if self._hp.embedding in names:
            self.table = weights.tensor(self._hp.embedding)
        return models.build(self._hp, ops, weights, max_tokens=self._options.ubatch), rate

    async def prepare(self, arena: Arena, reader: Reader, address: int, nbytes: int) -> None:
        """As memory.prepare."""
        await prepare(arena, reader, address, nbytes)

    def tiers(self, tracer: Tracer | None) -> dict[int, DeviceTier]:
        """Experts lie in host memory alone."""
        return {}

    async def places(self, tiers: Mapping[int, DeviceTier]) -> list[Place]:
        """The processor needs none."""
        return []
