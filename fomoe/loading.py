"""Opening a model: from a path to everything a step needs, in the order that fails early and leaks
nothing.

Owns: that order, and undoing it. Does not know: steps, sequences.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe import host, models
from fomoe.config import EngineOptions, format_size
from fomoe.errors import FormatError, RequestError
from fomoe.experts.cache import ExpertCache, make_policy
from fomoe.experts.car import CacheAwareRouter
from fomoe.experts.device_tier import DeviceTier
from fomoe.experts.layout import REGION_ALIGNMENT, ExpertLayout
from fomoe.experts.predict import Prefetcher
from fomoe.experts.profile import parse, seed_order, serialise, write_atomically
from fomoe.experts.routes import RouteShape, RouteWriter
from fomoe.experts.slots import SlotPool
from fomoe.experts.store import ExpertStore
from fomoe.experts.tiered import TieredStore
from fomoe.fleet import open_fleet
from fomoe.gguf import GgufFile
from fomoe.io.arena import Arena
from fomoe.io.open import open_reader
from fomoe.io.probe import Drive, probe_drive
from fomoe.io.queued import ReadOptions
from fomoe.io.reader import Reader
from fomoe.kernels.cpu import CpuOps
from fomoe.memory import Background, prepare
from fomoe.models import HyperParameters, Model
from fomoe.places import Place
from fomoe.plan import LayerNeed, MemoryPlan, make_plan
from fomoe.residency import Residency
from fomoe.state import StatePool, in_arena, kv_bytes, recurrent_bytes
from fomoe.tokenizer import Tokenizer
from fomoe.trace import Tracer
from fomoe.weights import DenseWeights, EmbeddingRows, embedding_row_room, region_bytes

# What the interpreter, the allocator and the thread stacks take beyond what is counted below.
_ALLOWANCE = 48 << 20
_PROCESS_GRAIN = 64 << 20
_HUGE_PAGE = 2 << 20
# What reads ahead are judged by where the drive has not been measured (buffered, or a small file).
_UNMEASURED_BYTES_PER_S = 1e9
_LATENCY_S = 1e-4

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
    tokenizer = Tokenizer.from_gguf(gguf)
    if tokenizer.vocab_size != hp.vocab_size:
        raise FormatError(
            f"{gguf.paths[0]}: {tokenizer.vocab_size} tokens, but {hp.vocab_size} embeddings"
        )
    await asyncio.to_thread(tokenizer.prepare)  # before the plan, which counts what is resident
    _check_outputs(gguf, options)
    threads = options.threads or host.num_processors()
    shapes = _shapes(gguf, hp)
    async with AsyncExitStack() as exits:
        drive = await probe_drive(
            max(gguf.paths, key=lambda shard: shard.stat().st_size),
            cache=options.cache_dir,
            io=options.io,
            direct=options.direct,
        )
        reader = open_reader(
            gguf.paths,
            loop=asyncio.get_running_loop(),
            io=options.io,
            direct=options.direct,
            replicas=options.replicas,
            options=drive.options() if drive else None,
        )
        exits.push_async_callback(reader.close)
        layouts = _layouts(gguf, hp, reader.alignment)
        fleet = open_fleet(options, gguf, hp, layouts, shapes, exits)
        if fleet:
            held = fleet.host_bytes(reader.alignment)
        else:
            held = _held(
                gguf, hp, options, CpuOps.workspace_bytes(threads, options.ubatch, **shapes)
            )
        table = gguf.tensors[hp.embedding]
        table_bytes = 0 if fleet or hp.tied_head else region_bytes(table, reader.alignment)
        plan = _plan(gguf, hp, options, layouts, held, table_bytes)
        if fleet:
            plan = replace(plan, devices=tuple(fleet.plans))
        if on_plan:
            on_plan(plan)
        tracer = None
        if options.trace:
            tracer = Tracer.create(options.trace, info=_trace_info(gguf, hp, layouts, options))
            exits.callback(tracer.close)
            # A recording shows every rate beside the drive's own.
            if drive is not None:
                tracer.describe({"drive_gbps": drive.bytes_per_second / 1e9})
        arena = Arena(plan.total_bytes)
        arena.attach(reader)
        # Closing is idempotent; memory goes after the reader says that nothing is in flight.
        exits.callback(arena.close)
        exits.push_async_callback(reader.close)
        held_table = None
        if fleet:
            model, rate = await fleet.load(arena, reader, progress, exits)
        else:
            names = {*hp.dense_tensors, *[hp.embedding] * plan.holds_embedding}
            weights = DenseWeights(gguf, [*names], arena, reader.alignment)
            rate = await weights.load(reader, progress)
            ops = CpuOps(threads, options.ubatch, options.cpu_isa)
            exits.callback(ops.close)
            ops.reserve(**shapes)
            model = models.build(hp, ops, weights, max_tokens=options.ubatch)
            held_table = weights.tensor(hp.embedding) if hp.embedding in names else None
        embedding = EmbeddingRows(table, options.ubatch, arena, reader, held_table)
        states = StatePool(
            hp,
            context=options.context,
            parallel=options.parallel,
            cache_type=options.cache_type,
            array=fleet.array if fleet else in_arena(arena),
            zero=fleet.zero if fleet else None,
        )
        pools = _pools(plan, arena)
        tiers = fleet.tiers(tracer) if fleet else None
        store = _store(hp, options, layouts, pools, plan, reader, tracer, tiers)
        places = await fleet.places(tiers) if fleet and tiers else ()
        residency = _residency(gguf, hp, options, layouts, store, drive, tracer, exits)
        background = Background()
        exits.push_async_callback(background.close)
        for pool in dict.fromkeys(pools):
            ready = fleet.prepare if fleet else prepare
            background.start(ready(arena, reader, pool.base, pool.nbytes))
        if residency.uses is not None:
            seeding = store.seed(seed_order(residency.uses, list(plan.quota)))
            if options.deterministic:
                # Who is resident at the first token must not depend on how soon it is asked for.
                await seeding
                await store.settle()
            else:
                background.start(seeding)
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
            embedding=embedding,
            tracer=tracer,
            drive=drive,
            places=places,
            load_gb_per_second=rate,
            exits=exits.pop_all(),
        )


def _check_outputs(gguf: GgufFile, options: EngineOptions) -> None:
    """Refuse now what could not be written in the end, or would do harm."""
    flags = {
        "--trace": options.trace,
        "--record-routes": options.record_routes,
        "--profile": options.profile,
    }
    seen: dict[Path, str] = {}
    for flag, path in flags.items():
        if path is None:
            continue
        if path.is_dir():
            raise RequestError(f"{flag} {path}: a folder; name a file in it")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise RequestError(f"{flag} {path}: {path.parent} is no folder that can be written to")
        if path.exists() and any(path.samefile(shard) for shard in gguf.paths):
            raise RequestError(f"{flag} {path}: that is the model; it would be overwritten")
        other = seen.setdefault(path.resolve(), flag)
        if other != flag:
            raise RequestError(f"{other} and {flag} name the same file: {path}")


def _layouts(gguf: GgufFile, hp: HyperParameters, alignment: int) -> list[ExpertLayout]:
    layouts = []
    for layer in hp.layers:
        tensors = gguf.experts(layer.index)
        if tensors is None:
            raise FormatError(f"{gguf.paths[0]}: layer {layer.index} has no expert tensors")
        layouts.append(ExpertLayout(tensors, alignment))
    return layouts


def _shapes(gguf: GgufFile, hp: HyperParameters) -> dict[str, Any]:
    """What a backend sizes its scratch memory by."""
    dense = (gguf.tensors[name].shape for name in hp.dense_tensors)
    return {
        "widths": sorted({shape[-1] for shape in dense if len(shape) > 1}),
        "attention": list(dict.fromkeys(p.attention for p in hp.layers if p.attention)),
        "delta": list(dict.fromkeys(p.delta for p in hp.layers if p.delta)),
        "moe": list(dict.fromkeys(p.moe for p in hp.layers)),
        "shared_ff": max(p.shared_ff for p in hp.layers),
    }


def _held(
    gguf: GgufFile, hp: HyperParameters, options: EngineOptions, workspace: int
) -> list[tuple[str, int]]:
    """What the processor needs in memory to compute by itself, the workspace last."""
    dense = sum(region_bytes(gguf.tensors[name], REGION_ALIGNMENT) for name in hp.dense_tensors)
    states = options.parallel + (options.car_audit > 0)
    return [
        ("dense weights", dense + _HUGE_PAGE),
        ("KV cache", kv_bytes(hp.layers, options.context, options.cache_type)),
        ("recurrent state", recurrent_bytes(hp.layers) * states),
        ("workspace", models.buffer_bytes(hp, options.ubatch) + workspace),
    ]


def _plan(
    gguf: GgufFile,
    hp: HyperParameters,
    options: EngineOptions,
    layouts: list[ExpertLayout],
    held: list[tuple[str, int]],
    embedding_bytes: int,
) -> MemoryPlan:
    """`held`: what is kept in memory beside the process and the experts, (name, bytes)."""
    process = host.resident_bytes() + _ALLOWANCE
    if options.deterministic:
        # What is resident must not depend on a megabyte that the process happens to take.
        process = -(-process // _PROCESS_GRAIN) * _PROCESS_GRAIN
    rows = embedding_row_room(gguf.tensors[hp.embedding]) * options.ubatch
    fixed = [("process", process), *held[:-1], (held[-1][0], held[-1][1] + rows)]
    needs = [
        LayerNeed(
            slot_bytes=layout.slot_bytes,
            num_experts=layout.num_experts,
            top_k=layer.moe.top_k,
        )
        for layout, layer in zip(layouts, hp.layers, strict=True)
    ]
    per_token = sum(
        layout.expert_bytes * layer.moe.top_k
        for layout, layer in zip(layouts, hp.layers, strict=True)
    )
    return make_plan(
        budget=options.dram,
        available=host.available_bytes() + host.resident_bytes(),
        fixed=[(name, size) for name, size in fixed if size],
        layers=needs,
        expert_bytes_per_token=per_token,
        embedding_bytes=embedding_bytes,
        cache_share=options.cache_share,
    )


def _pools(plan: MemoryPlan, arena: Arena) -> list[SlotPool]:
    """The slots of every layer; layers of one size of expert share a pool."""
    pools: dict[int, SlotPool] = {}
    for c in plan.classes:
        num_slots = c.transit + sum(plan.quota[i] for i in c.layers)
        base = arena.allocate(num_slots * c.slot_bytes, _HUGE_PAGE)
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
    tiers: dict[int, DeviceTier] | None,
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
    gguf: GgufFile,
    hp: HyperParameters,
    options: EngineOptions,
    layouts: list[ExpertLayout],
    store: ExpertStore,
    drive: Drive | None,
    tracer: Tracer | None,
    exits: AsyncExitStack,
) -> Residency:
    top_k = max(layer.moe.top_k for layer in hp.layers)
    recorder = None
    if options.record_routes:
        try:
            file = exits.enter_context(options.record_routes.open("wb"))
        except OSError as error:
            raise RequestError(
                f"cannot record routes to {options.record_routes}: {error.strerror}"
            ) from error
        shape = RouteShape(
            layers=hp.num_layers,
            experts=max(layer.moe.num_experts for layer in hp.layers),
            top_k=top_k,
            predicted=top_k,
            logits=True,
            model=gguf.name,
            fingerprint=gguf.fingerprint,
            expert_bytes=[layout.expert_bytes for layout in layouts],
        )
        recorder = RouteWriter(file, shape)
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
        recorder=recorder,
        uses=_profile(gguf, hp, options, exits),
        tracer=tracer,
    )


def _background_bytes(drive: Drive | None) -> int:
    """What a read that nobody waits for has in flight."""
    read_options = drive.options() if drive else ReadOptions()
    return read_options.background_read_bytes * read_options.background_depth


def _profile(
    gguf: GgufFile, hp: HyperParameters, options: EngineOptions, exits: AsyncExitStack
) -> npt.NDArray[np.float32] | None:
    """Use counts from earlier runs, halved; written back when the engine closes. A profile that
    cannot serve is refused with one line, and the run goes on cold."""
    path = options.profile
    if path is None:
        return None
    experts = max(layer.moe.num_experts for layer in hp.layers)
    fingerprint = gguf.fingerprint.encode()
    uses: npt.NDArray[np.float32] = np.zeros((hp.num_layers, experts), np.float32)
    if path.exists():
        try:
            uses = parse(path.read_bytes(), fingerprint, hp.num_layers, experts) * np.float32(0.5)
        except (FormatError, OSError) as error:
            _log.warning("profile %s is not used: %s; starting cold", path, error)

    def save() -> None:
        try:
            write_atomically(path, serialise(uses, fingerprint))
        except OSError as error:
            _log.warning("profile %s could not be written: %s", path, error)

    exits.callback(save)
    return uses


def _trace_info(
    gguf: GgufFile, hp: HyperParameters, layouts: list[ExpertLayout], options: EngineOptions
) -> dict[str, object]:
    return {
        "model": gguf.name,
        "fingerprint": gguf.fingerprint,
        "layers": hp.num_layers,
        "experts": max(layer.moe.num_experts for layer in hp.layers),
        "top_k": max(layer.moe.top_k for layer in hp.layers),
        "expert_bytes": max(layout.expert_bytes for layout in layouts),
        "threads": options.threads or host.num_processors(),
        "options": _given(options),
    }


def _given(options: EngineOptions) -> dict[str, object]:
    """The options that are not as they would be by themselves, as people write them."""
    usual = EngineOptions()
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    given = {name: value for name, value in given.items() if value != getattr(usual, name)}
    if options.dram is not None:
        given["dram"] = format_size(options.dram)
    return {name: value for name, value in given.items() if name not in ("trace", "cache_dir")}
