"""qwen35moe: Qwen3.5 and Qwen3.6 MoE.

Owns: what sets the architecture apart from hybrid.py. V heads are tiled (V head h reads K head
h % k_heads). RoPE has sections for time, height and width, which are one and the same for text: it
is plain RoPE, as in transformers. (llama.cpp leaves a pair unturned whose section is too short for
it: pair 7 with [4, 2, 2]. Real models' [11, 11, 10] have no such pair.)
"""

from __future__ import annotations

from fomoe.gguf import GgufFile
from fomoe.kernels.ops import DeltaSpec, Tensor
from fomoe.models import hybrid
from fomoe.models.base import HyperParameters, WeightSource
from fomoe.models.blocks import Backends, Builder, Model
from fomoe.models.outline import Outline


def describe(gguf: GgufFile) -> HyperParameters:
    outline = Outline(gguf)
    attention, delta = outline.attention(gated=True), outline.delta(tiled=True)
    gate_rows = {"ssm_beta.weight": delta.v_heads, "ssm_alpha.weight": delta.v_heads}
    return hybrid.describe(outline, attention, delta, gate_rows)


def build(hp: HyperParameters, ops: Backends, weights: WeightSource, *, max_tokens: int) -> Model:
    return hybrid.build(hp, ops, weights, max_tokens, _gates)


def _gates(builder: Builder, layer: int, spec: DeltaSpec) -> tuple[Tensor, Tensor]:
    beta = builder.tensor(f"blk.{layer}.ssm_beta.weight")
    return beta, builder.tensor(f"blk.{layer}.ssm_alpha.weight")
