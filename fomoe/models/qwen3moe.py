"""qwen3moe: Qwen3 MoE, 30B-A3B and 235B-A22B. Attention in every layer, no shared expert.

Owns: how the architecture composes the shared parts.
"""

from __future__ import annotations

from fomoe.gguf import GgufFile
from fomoe.models.base import HyperParameters, LayerParameters, WeightSource
from fomoe.models.blocks import Backends, Builder, Layer, Model, attention_weights
from fomoe.models.outline import Outline

FFN_NORM = "ffn_norm.weight"


def describe(gguf: GgufFile) -> HyperParameters:
    outline = Outline(gguf)
    attention = outline.attention(gated=False)
    layers = []
    for i in range(outline.num_layers):
        outline.use(f"blk.{i}.attn_norm.weight", outline.hidden)
        outline.use_attention(i, attention)
        outline.use(f"blk.{i}.{FFN_NORM}", outline.hidden)
        moe = outline.moe(i, default_ff=outline.dense_ff_share())
        layers.append(
            LayerParameters(index=i, attention=attention, delta=None, moe=moe, shared_ff=0)
        )
    return outline.finish(layers)


def build(hp: HyperParameters, ops: Backends, weights: WeightSource, *, max_tokens: int) -> Model:
    builder = Builder(hp, ops, weights, max_tokens)
    layers = []
    for p in hp.layers:
        assert p.attention
        layers.append(Layer(builder, p, attention_weights(builder, p.index, p.attention), FFN_NORM))
    return Model(builder, layers)
