"""Opening a model: from a path to everything a step needs, in the order that fails early and leaks
nothing.

Owns: that order, and undoing it. Does not know: steps, sequences.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fomoe import models
from fomoe.config import EngineOptions
from fomoe.errors import FormatError
from fomoe.experts.cache import ExpertCache, make_policy
from fomoe.experts.car import CacheAwareRouter
from fomoe.experts.device_tier import DeviceTier
from fomoe.experts.layout import ExpertLayout
from fomoe.experts.predict import Prefetcher
from fomoe.experts.profile import seed_order
from fomoe.experts.slots import SlotPool
from fomoe.experts.store import ExpertStore
from fomoe.experts.tiered import TieredStore
from fomoe.fleet import Fleet, open_fleet
from fomoe.gguf import GgufFile
from fomoe.io.arena import HUGE_PAGE_BYTES, Arena
from fomoe.io.open import open_reader
from fomoe.io.probe import Drive, device_name, probe_drive
from fomoe.io.queued import ReadOptions
from fomoe.io.reader import Reader
from fomoe.io.replicas import replica_paths
from fomoe.memory import Background
from fomoe.models import HyperParameters, Model
from fomoe.needs import embedding_table_bytes, expert_layouts, plan_memory, scratch_shapes
from fomoe.outputs import Outputs, check_outputs, output_flags
from fomoe.places import Place
from fomoe.plan import MemoryPlan
from fomoe.processor import Processor
from fomoe.residency import Residency
from fomoe.state import StatePool
from fomoe.tokenizer import Tokenizer
from fomoe.trace import Tracer
from fomoe.weights import EmbeddingRows

# What reads ahead are judged by where the drive has not been measured (buffered, or a small file).
_UNMEASURED_BYTES_PER_S = 1e9
_LATENCY_S = 1e-4

# Less than any that counts: after all that were used.
_LEAST_USE = 1e-6

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Loaded:
    """A model that is ready for steps. `close` undoes everything, in reverse."""

    gguf: GgufFile
    hp: HyperParameters
    tokenizer: Tokenizer
    reader: Reader
    plan: MemoryPlan
    model: Model
    store: ExpertStore
    residency: Residency
    states: StatePool
    embedding: EmbeddingRows
    tracer: Tracer | None
    drive: Drive | None
    drives_bytes_per_second: float | None  # of all drives with copies; None: not measured
    places: Sequence[Place]  # of each layer; empty where the processor computes by itself
    load_gb_per_second: float
    exits: AsyncExitStack

    async def close(self) -> None:
        await self.exits.aclose()


async def load(
    path: Path,
    options: EngineOptions,
    on_plan: Callable[[MemoryPlan], None] | None,
    progress: Callable[[int, int], None] | None,
) -> Loaded:
    """Open, plan, allocate, read the dense weights. Raises FomoeError; nothing stays open then."""
    gguf = GgufFile.open(path)
    hp = models.describe(gguf)
    if options.context > hp.context_length:
        _log.warning(
            "a context of %d tokens is more than this model's %d: beyond those it is not itself",
            options.context,
            hp.context_length,
        )
    tokenizer = await _tokenizer(gguf, hp)
    check_outputs(output_flags(options), dict.fromkeys(gguf.paths, "the model"))
    async with AsyncExitStack() as exits:
        drive, drives_rate, reader = await _open_files(gguf, options, exits)
        layouts = expert_layouts(gguf, hp, reader.alignment)
        shapes = scratch_shapes(gguf, hp)
        # What computes the layers: devices, or the processor by itself.
        backend: Fleet | Processor | None = open_fleet(options, gguf, hp, layouts, shapes, exits)
        if backend is None:
            backend = Processor(gguf, hp, options, shapes)
        held = backend.host_bytes(reader.alignment)
        table_bytes = embedding_table_bytes(gguf, hp, reader.alignment)
        plan = plan_memory(gguf, hp, options, layouts, held, table_bytes, backend.plans)
        if on_plan:
            on_plan(plan)
        outputs = Outputs(options, gguf, hp, layouts, exits)
        tracer = outputs.tracer(drives_rate)
        arena = Arena(plan.total_bytes)
        arena.attach(reader)
        # Closing is idempotent; memory goes after the reader says that nothing is in flight.
        exits.callback(arena.close)
        exits.push_async_callback(reader.close)
        names = {*hp.dense_tensors, *[hp.embedding] * plan.holds_embedding}
        model, rate = await backend.load(names, arena, reader, progress, exits)
        embedding = gguf.tensors[hp.embedding]
        rows = EmbeddingRows(embedding, options.ubatch, arena, reader, backend.table)
        states = StatePool(
            hp,
            context=options.context,
            parallel=options.parallel,
            cache_type=options.cache_type,
            array=backend.array,
            zero=backend.zero,
        )
        pools = _pools(plan, arena)
        tiers = backend.tiers(tracer)
        store = _store(hp, options, layouts, pools, plan, reader, tracer, tiers)
        places = await backend.places(tiers)
        residency = _residency(hp, options, store, drive, tracer, outputs)
        background = Background()
        exits.push_async_callback(background.close)
        for pool in dict.fromkeys(pools):
            background.start(backend.prepare(arena, reader, pool.base, pool.nbytes))
        await _seed(options, plan, store, residency, background)
        return Loaded(
            gguf=gguf,
            hp=hp,
            tokenizer=tokenizer,
            reader=reader,
            plan=plan,
            model=model,
            store=store,
            residency=residency,
            states=states,
            embedding=rows,
            tracer=tracer,
            drive=drive,
            drives_bytes_per_second=drives_rate,
            places=places,
            load_gb_per_second=rate,
            exits=exits.pop_all(),
        )


async def _tokenizer(gguf: GgufFile, hp: HyperParameters) -> Tokenizer:
    """Made ready: before the plan, which counts what is resident."""
    tokenizer = Tokenizer.from_gguf(gguf)
    if tokenizer.vocab_size != hp.vocab_size:
        raise FormatError(
            f"{gguf.paths[0]}: {tokenizer.vocab_size} tokens, but {hp.vocab_size} embeddings"
        )
    await asyncio.to_thread(tokenizer.prepare)
    return tokenizer


async def _open_files(
    gguf: GgufFile, options: EngineOptions, exits: AsyncExitStack
) -> tuple[Drive | None, float | None, Reader]:
    """How the drive is read, what all drives with copies give together, and the reader."""
    probe = partial(probe_drive, cache=options.cache_dir, io=options.io, direct=options.direct)
    largest = max(gguf.paths, key=lambda shard: shard.stat().st_size)
    drive = await probe(largest)
    reader = open_reader(
        gguf.paths,
        loop=asyncio.get_running_loop(),
        io=options.io,
        direct=options.direct,
        replicas=options.replicas,
        options=drive.options() if drive else None,
    )
    exits.push_async_callback(reader.close)
    # Copies on one drive share its rate.
    found = {device_name(largest): drive}
    for replica in options.replicas:
        copy = replica_paths(gguf.paths, replica)[gguf.paths.index(largest)]
        name = device_name(copy)
        if name not in found:
            found[name] = await probe(copy)
    rates = [each.bytes_per_second for each in found.values() if each]
    return drive, sum(rates) if len(rates) == len(found) else None, reader


def _pools(plan: MemoryPlan, arena: Arena) -> list[SlotPool]:
    """The slots of every layer; layers of one size of expert share a pool."""
    pools: dict[int, SlotPool] = {}
    for c in plan.classes:
        num_slots = c.transit + sum(plan.quota[i] for i in c.layers)
        base = arena.allocate(num_slots * c.slot_bytes, HUGE_PAGE_BYTES)
        pools.update(dict.fromkeys(c.layers, SlotPool(base, c.slot_bytes, num_slots, c.transit)))
    return [pools[i] for i in range(len(plan.quota))]


def _store(
    hp: HyperParameters,
    options: EngineOptions,
    layouts: list[ExpertLayout],
    pools: list[SlotPool],
    plan: MemoryPlan,
    reader: Reader,
    tracer: Tracer | None,
    tiers: dict[int, DeviceTier],
) -> ExpertStore:
    policies = [
        tiers[layer.index].policy_below(layer.index)
        if tiers
        else make_policy(options.cache_policy, layer.moe.num_experts)
        for layer in hp.layers
    ]
    caches = [
        ExpertCache(layer.moe.num_experts, quota, policy)
        for layer, quota, policy in zip(hp.layers, plan.quota, policies, strict=True)
    ]
    parts: dict[str, Any] = {
        "layouts": layouts,
        "pools": pools,
        "caches": caches,
        "reader": reader,
        "top_k": max(layer.moe.top_k for layer in hp.layers),
        "ordered": options.deterministic,
        "tracer": tracer,
    }
    return TieredStore(tiers, **parts) if tiers else ExpertStore(**parts)


def _residency(
    hp: HyperParameters,
    options: EngineOptions,
    store: ExpertStore,
    drive: Drive | None,
    tracer: Tracer | None,
    outputs: Outputs,
) -> Residency:
    top_k = max(layer.moe.top_k for layer in hp.layers)
    return Residency(
        store,
        CacheAwareRouter(options.car, hp.num_layers, top_k),
        Prefetcher(
            options.prefetch,
            hp.num_layers,
            bytes_per_s=drive.bytes_per_second if drive else _UNMEASURED_BYTES_PER_S,
            latency_s=_LATENCY_S,
            in_flight_bytes=_background_bytes(drive),
        ),
        backfill=options.backfill,
        deterministic=options.deterministic,
        audit_share=options.car_audit,
        recorder=outputs.route_writer(),
        uses=outputs.profile(),
        tracer=tracer,
    )


def _background_bytes(drive: Drive | None) -> int:
    """What a read that nobody waits for has in flight."""
    read_options = drive.options() if drive else ReadOptions()
    return read_options.background_read_bytes * read_options.background_depth


async def _seed(
    options: EngineOptions,
    plan: MemoryPlan,
    store: ExpertStore,
    residency: Residency,
    background: Background,
) -> None:
    """Read the experts that earlier runs used most, in the order in which that pays; and all others
    where devices have room for everyone: a layer whose device has all of its experts never waits
    for the host."""
    uses = residency.uses
    if plan.devices and not options.deterministic and all(d.all_resident for d in plan.devices):
        quotas = {layer: n for d in plan.devices for layer, n in d.quota.items()}
        shape = store.num_layers, max(quotas.values(), default=0)
        uses = np.zeros(shape, np.float32) if uses is None else uses.copy()
        for layer, num_experts in quotas.items():
            uses[layer, :num_experts] += _LEAST_USE
    if uses is None:
        return
    seeding = store.seed(seed_order(uses, store.capacities()))
    if options.deterministic:
        # Who is resident at the first token must not depend on how soon it is asked for.
        await seeding
        await store.settle()
    else:
        background.start(seeding)
