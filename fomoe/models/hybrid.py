"""What Qwen3-Next and Qwen3.5 share: layers of gated delta-net with gated attention in between,
routed experts and a shared one in all of them.

Owns: the layer. Does not know: in which tensors the delta-net's gates are, how its heads pair up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fomoe.kernels.ops import AttentionSpec, AttentionWeights, DeltaSpec, DeltaWeights, Tensor
from fomoe.models.base import HyperParameters, LayerParameters, WeightSource
from fomoe.models.blocks import Backends, Builder, Layer, Model, attention_weights, delta_weights
from fomoe.models.outline import Outline

# The name is historical: it is the norm before the experts.
FFN_NORM = "post_attention_norm.weight"

# From the builder, a layer's index and its spec: the projections of beta and alpha [v_heads, h].
Gates = Callable[[Builder, int, DeltaSpec], tuple[Tensor, Tensor]]


def describe(
    outline: Outline, attention: AttentionSpec, delta: DeltaSpec, gate_rows: Mapping[str, int]
) -> HyperParameters:
    """`gate_rows`: the tensors that project the delta-net's gates, with their rows."""
    layers = []
    for i, recurrent in enumerate(outline.recurrent_layers()):
        outline.use(f"blk.{i}.attn_norm.weight", outline.hidden)
        if recurrent:
            outline.use_delta(i, delta)
            for name, rows in gate_rows.items():
                outline.use(f"blk.{i}.{name}", rows, outline.hidden)
        else:
            outline.use_attention(i, attention)
        outline.use(f"blk.{i}.{FFN_NORM}", outline.hidden)
        moe = outline.moe(i)
        layers.append(
            LayerParameters(
                index=i,
                attention=None if recurrent else attention,
                delta=delta if recurrent else None,
                moe=moe,
                shared_ff=outline.use_shared_expert(i, moe.ff),
            )
        )
    return outline.finish(layers)


def build(
    hp: HyperParameters, ops: Backends, weights: WeightSource, max_tokens: int, gates: Gates
) -> Model:
    builder = Builder(hp, ops, weights, max_tokens)

    def mixer(parameters: LayerParameters) -> AttentionWeights | DeltaWeights:
        i, delta = parameters.index, parameters.delta
        if delta:
            return delta_weights(builder, i, delta, *gates(builder, i, delta))
        assert parameters.attention
        return attention_weights(builder, i, parameters.attention)

    return Model(builder, [Layer(builder, p, mixer(p), FFN_NORM) for p in hp.layers])
