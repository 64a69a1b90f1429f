"""The parts of a forward, composed of Ops calls: mixers, layers, the model around them.

Owns: the order of operations in a block, and the activation buffers, made once. Does not know:
which architecture composes them, which backend runs, where experts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels.ops import (
    A,
    AttentionSpec,
    AttentionWeights,
    DeltaSpec,
    DeltaWeights,
    KvCache,
    LayerOps,
    LayerParts,
    MoeCall,
    Ops,
    Routing,
    Segment,
    Tensor,
    TrunkOps,
    W,
)
from fomoe.models.base import OUTPUT, OUTPUT_NORM, HyperParameters, LayerParameters, WeightSource

# One backend, or that of each layer: the first one's also has the embedding and the head.
Backends = Ops | Sequence[Ops]

# Rows of logits that the head computes in one call: a row of a large vocabulary is a megabyte.
HEAD_ROWS = 32

_ALIGNMENT = 16  # floats: pieces of the scratch start at cache lines
# Floats left free after every row: rows a power of two apart share few sets of a cache, and
# products of many tokens take a fifth longer.
_ROW_GAP = 16


class Workspace:
    """Scratch memory that the mixers of all layers share, one after the other."""

    def __init__(self, ops: Ops, widths: int, max_tokens: int) -> None:
        self._flat = ops.buffer(1, _scratch_floats(widths, max_tokens))[0]
        self._taken: dict[tuple[int, ...], tuple[int, list[A]]] = {}

    def take(self, tokens: int, widths: tuple[int, ...]) -> list[A]:
        """Uninitialised activations [tokens, width] of each width, valid until the next take."""
        taken_tokens, views = self._taken.get(widths, (0, []))
        if taken_tokens == tokens:
            return views
        rows = [width + _ROW_GAP for width in widths]
        sizes = [-(-tokens * row // _ALIGNMENT) * _ALIGNMENT for row in rows]
        starts = accumulate(sizes[:-1], initial=0)
        views = [
            self._flat[start : start + tokens * row].reshape(tokens, row)[:, :width]
            for start, row, width in zip(starts, rows, widths, strict=True)
        ]
        self._taken[widths] = tokens, views
        return views


def attention_widths(spec: AttentionSpec) -> tuple[int, ...]:
    """q (with its gate), k, v and the output."""
    inner, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return (2 * inner if spec.gated else inner), kv, kv, inner


def delta_widths(spec: DeltaSpec) -> tuple[int, ...]:
    """qkv, z, beta, alpha and the output."""
    return spec.conv_dim, spec.value_dim, spec.v_heads, spec.v_heads, spec.value_dim


def buffer_bytes(hp: HyperParameters, max_tokens: int) -> int:
    """Bytes that a model takes by Ops.buffer for steps of at most `max_tokens`."""
    head = min(max_tokens, HEAD_ROWS) * hp.vocab_size
    return 4 * (max_tokens * hp.hidden + _scratch_floats(_scratch_width(hp), max_tokens) + head)


def _scratch_floats(widths: int, max_tokens: int) -> int:
    return max_tokens * widths + 8 * _ALIGNMENT


def _scratch_width(hp: HyperParameters) -> int:
    """Floats a token of the widest mixer."""
    attention = [attention_widths(p.attention) for p in hp.layers if p.attention]
    delta = [delta_widths(p.delta) for p in hp.layers if p.delta]
    return max(sum(width + _ROW_GAP for width in widths) for widths in (*attention, *delta))


def attention_weights(builder: Builder, layer: int, spec: AttentionSpec) -> AttentionWeights:
    """Softmax attention over the cached tokens of each sequence."""
    builder = builder.at(layer)
    p = f"blk.{layer}.attn_"
    return AttentionWeights(
        spec=spec,
        eps=builder.hp.eps,
        norm=builder.vector(f"{p}norm.weight"),
        inputs=builder.attention_inputs(layer, spec),
        q_norm=builder.vector(f"{p}q_norm.weight"),
        k_norm=builder.vector(f"{p}k_norm.weight"),
        output=builder.weight(f"{p}output.weight"),
    )


def delta_weights(
    builder: Builder, layer: int, spec: DeltaSpec, beta: Tensor, alpha: Tensor
) -> DeltaWeights:
    """Gated delta-net: a recurrent state in each segment instead of a cache."""
    builder = builder.at(layer)
    p = f"blk.{layer}."
    inputs = [
        builder.weight(f"{p}attn_qkv.weight"),
        builder.weight(f"{p}attn_gate.weight"),
        builder.ops.weight(beta),
        builder.ops.weight(alpha),
    ]
    return DeltaWeights(
        layer=layer,
        spec=spec,
        eps=builder.hp.eps,
        norm=builder.vector(f"{p}attn_norm.weight"),
        inputs=inputs,
        conv=builder.vector(f"{p}ssm_conv1d.weight"),
        dt_bias=builder.vector(f"{p}ssm_dt.bias"),
        a=builder.vector(f"{p}ssm_a"),
        out_norm=builder.vector(f"{p}ssm_norm.weight"),
        output=builder.weight(f"{p}ssm_out.weight"),
    )


class Layer:
    """One trunk layer. A host computes it as `ops`, from one routing to the next; where a device
    is told what to do without waiting for it, in the steps mix, route and experts."""

    def __init__(
        self,
        builder: Builder,
        parameters: LayerParameters,
        mixer: AttentionWeights | DeltaWeights,
        ffn_norm: str,
    ) -> None:
        p = f"blk.{parameters.index}."
        builder = builder.at(parameters.index)
        self.parameters = parameters
        self._ops = builder.ops
        widths = (
            attention_widths(mixer.spec)
            if isinstance(mixer, AttentionWeights)
            else delta_widths(mixer.spec)
        )
        self._parts = LayerParts(
            mixer=mixer,
            room=partial(builder.workspace.take, widths=widths),
            norm=builder.vector(p + ffn_norm),
            eps=builder.hp.eps,
            router=builder.weight(f"{p}ffn_gate_inp.weight"),
            moe=parameters.moe,
            shared=builder.shared_expert(parameters) if parameters.shared_ff else None,
        )
        self.ops: LayerOps = builder.ops.layer(self._parts)

    def mix(self, x: A, segments: Sequence[Segment], cache: KvCache | None) -> None:
        """x += Mixer(RMS(x)), in place. x [T, hidden]; `cache` is None for a recurrent layer."""
        mixer, buffers = self._parts.mixer, self._parts.room(len(x))
        if isinstance(mixer, DeltaWeights):
            self._ops.mix_delta(mixer, x, buffers, segments)
        else:
            assert cache is not None, "attention without a cache"
            self._ops.mix_attention(mixer, x, buffers, cache, segments)

    def route(self, x: A, stand_ins: Any = None) -> Routing:
        """What the router says of x [T, hidden], which may be another layer's residual stream;
        `stand_ins` as in DeviceOps.route, where that is the backend."""
        p, more = self._parts, () if stand_ins is None else (stand_ins,)
        return self._ops.route(p.moe, x, p.norm, p.eps, p.router, *more)

    def experts(self, routing: Routing) -> MoeCall:
        """Begin the experts of this layer. The shared one may be computed from now on."""
        return self._ops.moe(self._parts.moe, routing, self._parts.shared)


class Model:
    """A whole model but for its experts. Steps are of at most `max_tokens` tokens."""

    def __init__(self, builder: Builder, layers: Sequence[Layer]) -> None:
        hp = builder.hp
        self.parameters = hp
        self.layers = tuple(layers)
        self.trunk: TrunkOps = builder.ops.trunk([layer.ops for layer in layers])
        self._ops = builder.ops
        self._x = builder.ops.buffer(builder.max_tokens, hp.hidden)
        self._logits = builder.ops.buffer(min(builder.max_tokens, HEAD_ROWS), hp.vocab_size)
        # The rows in use: the same view step after step, which backends may recognise.
        self._x_rows, self._logits_rows = self._x[:0], self._logits[:0]
        self._norm = builder.vector(OUTPUT_NORM)
        self._output = builder.weight(hp.embedding if hp.tied_head else OUTPUT)

    def embed_into(self, rows: npt.NDArray[np.uint8], x: A) -> None:
        """The residual stream of embedding rows, as in `embed`, in x [T, hidden]."""
        self._ops.embed(self.parameters.embedding_type, rows, x)

    def embed(self, rows: npt.NDArray[np.uint8]) -> A:
        """The residual stream [T, hidden] of embedding rows as they lie in the file, uint8
        [T, row_bytes]: a view of the model's own buffer, good until the next step."""
        if len(self._x_rows) != len(rows):
            self._x_rows = self._x[: len(rows)]
        self.embed_into(rows, self._x_rows)
        return self._x_rows

    def head(self, x: A) -> A:
        """Logits float32 [n, vocab] of at most HEAD_ROWS rows x [n, hidden]: a view of the model's
        own buffer, good until the next call."""
        if len(self._logits_rows) != len(x):
            self._logits_rows = self._logits[: len(x)]
        outs = [self._logits_rows]
        self._ops.linear(x, [self._output], outs, norm=self._norm, eps=self.parameters.eps)
        return self._logits_rows


class Builder:
    """Makes the parts of one model: weights become the backend's handles."""

    def __init__(
        self, hp: HyperParameters, ops: Backends, weights: WeightSource, max_tokens: int
    ) -> None:
        self.ops = ops[0] if isinstance(ops, Sequence) else ops
        self.hp, self.max_tokens = hp, max_tokens
        self.workspace = Workspace(self.ops, _scratch_width(hp), max_tokens)
        self._weights = weights
        self._at: list[Builder] = []
        if isinstance(ops, Sequence):
            made = {id(self.ops): self}
            for own in ops:
                if id(own) not in made:
                    made[id(own)] = Builder(hp, own, weights, max_tokens)
                self._at.append(made[id(own)])

    def at(self, layer: int) -> Builder:
        """The builder of a layer's backend."""
        return self._at[layer] if self._at else self

    def tensor(self, name: str) -> Tensor:
        return self._weights.tensor(name)

    def weight(self, name: str) -> W:
        return self.ops.weight(self.tensor(name))

    def vector(self, name: str) -> A:
        return self.ops.vector(self.tensor(name))

    def attention_inputs(self, layer: int, spec: AttentionSpec) -> list[W]:
        """The projections q, k, v: three tensors, or the rows of a fused one."""
        p = f"blk.{layer}.attn_"
        if f"{p}qkv.weight" not in self._weights:
            return [self.weight(f"{p}{name}.weight") for name in "qkv"]
        fused = self.tensor(f"{p}qkv.weight")
        ends = list(accumulate(attention_widths(spec)[:3], initial=0))
        return [self.ops.weight(row_range(fused, start, end)) for start, end in pairwise(ends)]

    def shared_expert(self, parameters: LayerParameters) -> tuple[W, W, W, W | None]:
        p = f"blk.{parameters.index}.ffn_"
        gate = self.tensor(f"{p}gate_inp_shexp.weight")
        row = Tensor(name=gate.name, type=gate.type, shape=(1, self.hp.hidden), data=gate.data)
        return (
            self.weight(f"{p}gate_shexp.weight"),
            self.weight(f"{p}up_shexp.weight"),
            self.weight(f"{p}down_shexp.weight"),
            self.ops.weight(row),
        )


def row_range(tensor: Tensor, start: int, end: int) -> Tensor:
    """Rows [start, end) of a matrix, in the same memory."""
    row_bytes = tensor.type.row_bytes(tensor.shape[1])
    return Tensor(
        name=f"{tensor.name}[{start}:{end}]",
        type=tensor.type,
        shape=(end - start, tensor.shape[1]),
        data=tensor.data[start * row_bytes : end * row_bytes],
    )
