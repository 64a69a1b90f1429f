"""The devices of an engine, from their names to places where layers are computed.

Owns: which device computes which layer, what each will hold, and the order in which that is made.
Does not know: steps, which kinds of device there are (kernels/open_device.py does).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import numpy as np

from fomoe import host, models
from fomoe.config import EngineOptions
from fomoe.device_plan import DevicePlan, make_device_plan
from fomoe.device_weights import DeviceWeights, bounce_bytes
from fomoe.errors import RequestError, UnsupportedError
from fomoe.experts.cache import ExpertCache, make_policy
from fomoe.experts.device_layout import DeviceLayout
from fomoe.experts.device_offer import make_offers
from fomoe.experts.device_slots import DeviceSlots
from fomoe.experts.device_tier import DeviceTier
from fomoe.experts.layout import ExpertLayout
from fomoe.gguf import GgufFile
from fomoe.host_experts import HostExperts
from fomoe.io.arena import Arena
from fomoe.io.reader import Reader
from fomoe.kernels.cpu import CpuOps
from fomoe.kernels.device import Device, DeviceOps
from fomoe.kernels.open_device import open_device
from fomoe.kernels.ops import SHORT_STEP, Tensor
from fomoe.measure import measure_costs
from fomoe.memory import prepare, reached
from fomoe.models import HEAD_ROWS, HyperParameters, LayerParameters, Model
from fomoe.places import Place
from fomoe.plan import LayerNeed
from fomoe.state import kv_bytes, recurrent_bytes
from fomoe.trace import Tracer
from fomoe.weights import DenseWeights, Progress, region_bytes

_log = logging.getLogger(__name__)


class Fleet:
    """Layers take turns: layer i is computed by device i modulo their number. The first one has the
    embedding and the head. A Processor (processor.py) stands in its place where there are none."""

    table: Tensor | None = None  # the embedding, where it is held in host memory

    def __init__(
        self,
        devices: Sequence[Device],
        gguf: GgufFile,
        hp: HyperParameters,
        options: EngineOptions,
        layouts: Sequence[ExpertLayout],
        shapes: Mapping[str, Any],
        exits: AsyncExitStack,
    ) -> None:
        self.devices = devices
        self._gguf, self._hp, self._options, self._shapes = gguf, hp, options, shapes
        self._layouts = [DeviceLayout(layout) for layout in layouts]
        num_pinned = len(hp.layers) if options.cpu_moe else options.n_cpu_moe
        self._pinned = frozenset(range(min(num_pinned, len(hp.layers))))
        self._threads = options.threads or host.num_processors()
        self._infos = [gguf.tensors[name] for name in hp.dense_tensors]
        self._unpinned = ""
        threads = max(self._threads // len(devices), 1)
        self.ops: list[DeviceOps] = []
        for device in devices:
            ops = device.make_ops(threads=threads, max_tokens=options.ubatch, isa=options.cpu_isa)
            exits.callback(ops.close)
            self.ops.append(ops)
            self._check_types(device, ops, len(self.ops) - 1)
        self.helper: CpuOps | None = None
        self.plans = [self._plan(device, n) for n, device in enumerate(devices)]

    def _layers(self, number: int) -> list[LayerParameters]:
        return [p for p in self._hp.layers if p.index % len(self.devices) == number]

    def device_of(self, layer: int) -> Device:
        return self.devices[layer % len(self.devices)]

    def _owner(self, name: str) -> Device:
        """The device that a tensor belongs to."""
        prefix, number, *_ = name.split(".")
        return self.device_of(int(number)) if prefix == "blk" else self.devices[0]

    def _check_types(self, device: Device, ops: DeviceOps, number: int) -> None:
        """Raises UnsupportedError where the device has no kernel for a matrix that it would get."""
        dense = [*self._infos, *[self._gguf.tensors[self._hp.embedding]] * (number == 0)]
        for info in dense:
            if (
                self._owner(info.name) is device
                and len(info.shape) > 1
                and not ops.reads(info.type)
            ):
                raise UnsupportedError(
                    f"{info.name} is of type {info.type.name}, which no kernel of {device.name}"
                    " reads: use --device cpu, or a file without that type"
                )
        for p in self._layers(number):
            types = (p.moe.gate_type, p.moe.up_type, p.moe.down_type)
            unread = [t.name for t in types if not ops.reads(t)]
            if unread and p.index not in self._pinned:
                raise UnsupportedError(
                    f"layer {p.index} has experts of type {unread[0]}, which no kernel of"
                    f" {device.name} reads: leave the experts to the processor with --cpu-moe, use"
                    " --device cpu, or a file without that type"
                )

    # ---- plans ----

    def _plan(self, device: Device, number: int) -> DevicePlan:
        options, own = self._options, self._layers(number)
        if not own:
            raise RequestError(
                f"--device names {len(self.devices)} devices; this model has only"
                f" {len(self._hp.layers)} layers"
            )
        tables = sum(24 * p.moe.num_experts for p in own)
        workspace = models.buffer_bytes(self._hp, options.ubatch)
        workspace += device.workspace_bytes(self.ops[number], **self._shapes)
        workspace += 3 * 4 * options.ubatch * self._hp.hidden + tables
        dense = sum(region_bytes(i, 256) for i in self._infos if self._owner(i.name) is device)
        states = options.parallel * (2 if options.car_audit else 1)  # an audit keeps copies
        fixed = [
            ("dense weights", dense),
            ("KV cache", kv_bytes(own, options.context, options.cache_type)),
            ("recurrent state", recurrent_bytes(own) * states),
            ("workspace", workspace),
            # Steps of each number of sequences have their own.
            ("graphs", device.recorded_bytes * len(own) * min(options.parallel, SHORT_STEP)),
        ]
        needs = {
            p.index: LayerNeed(
                slot_bytes=self._layouts[p.index].slot_bytes,
                num_experts=p.moe.num_experts,
                top_k=p.moe.top_k,
            )
            for p in own
            if p.index not in self._pinned
        }
        alike = sum(other.name == device.name for other in self.devices)
        return make_device_plan(
            name=device.name,
            budget=options.vram[number % len(options.vram)] if options.vram else None,
            free=device.memory()[0] // alike,
            fixed=[(name, size) for name, size in fixed if size],
            layers=needs,
            num_layers=len(own),
        )

    def host_bytes(self, alignment: int) -> list[tuple[str, int]]:
        """What the devices take of the host's memory, (name, bytes)."""
        options, hp = self._options, self._hp
        mailboxes = 4 * min(options.ubatch, HEAD_ROWS) * hp.vocab_size
        workspace = 0
        if not all(device.shares_memory for device in self.devices):
            mailboxes += len(self.devices) * 2 * 4 * options.ubatch * hp.hidden
            moe = {"widths": (), "moe": self._shapes["moe"]}
            workspace = CpuOps.workspace_bytes(self._threads, options.ubatch, **moe)
        return [
            ("weights in passing", bounce_bytes(self._infos, alignment)),
            ("mailboxes", mailboxes),
            ("workspace", workspace),
        ]

    # ---- making ----

    async def load(
        self,
        names: Collection[str],
        arena: Arena,
        reader: Reader,
        progress: Progress | None,
        exits: AsyncExitStack,
    ) -> tuple[Model, float]:
        """The model, its tensors `names` being in the devices, but for an embedding that is held;
        and the rate of reading, GB/s."""
        # Closed before the arena is, and once no copy of experts is under way.
        for device in self.devices:
            exits.callback(device.unpin)
            exits.callback(device.synchronize)
        dense = [name for name in names if name in self._hp.dense_tensors]
        weights = DeviceWeights(self._gguf, dense, self._owner, arena, reader.alignment)
        self._bounce = weights.bounce, weights.bounce_bytes
        await self.prepare(arena, reader, *self._bounce)
        rate = await weights.load(reader, reached, progress)
        held = DenseWeights(self._gguf, set(names).difference(dense), arena, reader.alignment)
        if self._hp.embedding in held:
            await held.load(reader)
            self.table = held.tensor(self._hp.embedding)
        for ops in self.ops:
            ops.reserve(**self._shapes)
        if not all(device.shares_memory for device in self.devices):
            self.helper = CpuOps(self._threads, self._options.ubatch, self._options.cpu_isa)
            exits.callback(self.helper.close)
            self.helper.reserve(widths=(), moe=self._shapes["moe"])
        by_layer = [self.ops[p.index % len(self.devices)] for p in self._hp.layers]
        model = models.build(self._hp, by_layer, weights, max_tokens=self._options.ubatch)
        for device in self.devices:
            device.synchronize()
        return model, rate

    async def prepare(self, arena: Arena, reader: Reader, address: int, nbytes: int) -> None:
        """As memory.prepare, and pinned for the devices where the system lets them."""
        await prepare(arena, reader, address, nbytes, self._pin)

    def _pin(self, address: int, nbytes: int) -> None:
        if self._unpinned:
            return
        for device in self.devices:
            try:
                device.pin(address, nbytes)
            except OSError as error:
                self._unpinned = str(error)
                _log.warning(
                    "memory cannot be pinned for %s (%s): copies are slower; raise ulimit -l",
                    device.name,
                    error,
                )
                return

    def array(self, layer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """As state.LayerArrays."""
        return self.device_of(layer).array(shape, dtype)

    def zero(self, layer: int, array: Any) -> None:
        """As state.Zero."""
        self.device_of(layer).compute.call(partial(array.__setitem__, ..., 0))

    def tiers(self, tracer: Tracer | None) -> dict[int, DeviceTier]:
        """By layer, the experts of the device that computes it."""
        tiers = {}
        for number, (device, plan) in enumerate(zip(self.devices, self.plans, strict=True)):
            own = self._layers(number)
            slots = {}
            for c in plan.classes:
                capacity = sum(plan.quota[i] for i in c.layers)
                made = DeviceSlots(device, c.slot_bytes, capacity, c.staging)
                slots.update(dict.fromkeys(c.layers, made))
            none = DeviceSlots(device, 0, 0, 0)
            caches = {
                p.index: ExpertCache(
                    p.moe.num_experts,
                    plan.quota.get(p.index, 0),
                    make_policy(self._options.cache_policy, p.moe.num_experts),
                )
                for p in own
            }
            tier = DeviceTier(
                device,
                {p.index: self._layouts[p.index] for p in own},
                caches,
                {p.index: slots.get(p.index, none) for p in own},
                number=number,
                tracer=tracer,
            )
            tiers.update(dict.fromkeys(caches, tier))
        return tiers

    async def places(self, tiers: Mapping[int, DeviceTier]) -> list[Place]:
        """Of each layer, in order."""
        hp, options = self._hp, self._options
        made = []
        for number, (device, ops) in enumerate(zip(self.devices, self.ops, strict=True)):
            helper = None
            if self.helper and not device.shares_memory:
                helper = HostExperts(self.helper, device, hp.hidden)
            own = self._layers(number)
            costs = await measure_costs(
                device, helper, [(p, self._layouts[p.index]) for p in own], *self._bounce
            )
            made.append(
                Place(
                    device,
                    ops,
                    tiers[number],
                    hidden=hp.hidden,
                    max_tokens=options.ubatch,
                    costs=costs,
                    pinned=self._pinned,
                    fixed=options.deterministic,
                    helper=helper,
                    offers=make_offers(device, ops, options.car, {p.index: p.moe for p in own}),
                )
            )
        return [made[p.index % len(made)] for p in hp.layers]


def open_fleet(
    options: EngineOptions,
    gguf: GgufFile,
    hp: HyperParameters,
    layouts: Sequence[ExpertLayout],
    shapes: Mapping[str, Any],
    exits: AsyncExitStack,
) -> Fleet | None:
    """The devices that the options name; None where the processor computes by itself."""
    names = [name.strip() for name in options.device.split(",")]
    if names == ["cpu"] and not options.vram:
        return None
    devices = []
    for name in names:
        devices.append(open_device(name))
        exits.callback(devices[-1].close)
    return Fleet(devices, gguf, hp, options, layouts, shapes, exits)
