"""What a model needs: sizes of its experts, of scratch memory, and the plan of the host's memory.

Owns: from a file's tensors and the options to the byte counts that plan.py divides. Does not know:
arrays, what computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fomoe import host
from fomoe.config import EngineOptions
from fomoe.device_plan import DevicePlan
from fomoe.errors import FormatError
from fomoe.experts.layout import ExpertLayout
from fomoe.gguf import GgufFile
from fomoe.models import HyperParameters
from fomoe.plan import LayerNeed, MemoryPlan, make_plan
from fomoe.weights import embedding_row_room, region_bytes

# What the interpreter, the allocator and the thread stacks take beyond what is counted below.
_ALLOWANCE = 48 << 20
_PROCESS_GRAIN = 64 << 20
# What a plan calls the share of the process itself.
PROCESS = "process"


def expert_layouts(gguf: GgufFile, hp: HyperParameters, alignment: int) -> list[ExpertLayout]:
    """Of every layer, for reads of that alignment. Raises FormatError."""
    layouts = []
    for layer in hp.layers:
        tensors = gguf.experts(layer.index)
        if tensors is None:
            raise FormatError(f"{gguf.paths[0]}: layer {layer.index} has no expert tensors")
        layouts.append(ExpertLayout(tensors, alignment))
    return layouts


def scratch_shapes(gguf: GgufFile, hp: HyperParameters) -> dict[str, Any]:
    """What a backend sizes its scratch memory by."""
    dense = (gguf.tensors[name].shape for name in hp.dense_tensors)
    return {
        "widths": sorted({shape[-1] for shape in dense if len(shape) > 1}),
        "attention": list(dict.fromkeys(p.attention for p in hp.layers if p.attention)),
        "delta": list(dict.fromkeys(p.delta for p in hp.layers if p.delta)),
        "moe": list(dict.fromkeys(p.moe for p in hp.layers)),
        "shared_ff": max(p.shared_ff for p in hp.layers),
    }


def embedding_table_bytes(gguf: GgufFile, hp: HyperParameters, alignment: int) -> int:
    """What the embedding would take in host memory beside the dense weights. 0 where it is one of
    them: a head that is tied to it."""
    return 0 if hp.tied_head else region_bytes(gguf.tensors[hp.embedding], alignment)


def _process_bytes(options: EngineOptions) -> int:
    process = host.resident_bytes() + _ALLOWANCE
    if options.deterministic:
        # What is resident must not depend on a megabyte that the process happens to take.
        process = -(-process // _PROCESS_GRAIN) * _PROCESS_GRAIN
    return process


def plan_memory(
    gguf: GgufFile,
    hp: HyperParameters,
    options: EngineOptions,
    layouts: Sequence[ExpertLayout],
    held: Sequence[tuple[str, int]],
    embedding_bytes: int,
    devices: Sequence[DevicePlan],
) -> MemoryPlan:
    """The plan of the host's memory, `devices` having theirs. `held`: what is kept beside the
    process and the experts, (name, bytes), the workspace last. Raises BudgetError."""
    process = options.process_bytes or _process_bytes(options)
    rows = embedding_row_room(gguf.tensors[hp.embedding]) * options.ubatch
    logits = options.logit_rows * hp.vocab_size * 4
    fixed = [(PROCESS, process), *held[:-1], (held[-1][0], held[-1][1] + rows)]
    fixed.append(("logits", logits))
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
    plan = make_plan(
        budget=options.dram,
        available=host.available_bytes() + host.resident_bytes(),
        fixed=[(name, size) for name, size in fixed if size],
        layers=needs,
        expert_bytes_per_token=per_token,
        embedding_bytes=embedding_bytes,
        cache_share=options.cache_share,
    )
    return replace(plan, devices=tuple(devices))
