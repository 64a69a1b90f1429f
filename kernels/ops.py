"""The operations that a model's forward is written in: the seam between models and backends.

Owns: the signatures. A backend (reference, cpu, gpu) implements `Ops`; a model file calls it and
does not know which one runs. Activations `A` are float32 arrays [tokens, width] of the backend
(numpy for reference and cpu). Weights are opaque handles that the backend made from a `Tensor`.

T below is the number of tokens of a step: the rows of all its segments, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.kernels.table import QuantType

A = Any  # a float32 activation array of the backend, [tokens, width], rows contiguous
W = Any  # a weight handle made by Ops.weight
F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]
# An expert as compute takes it: its number, and the addresses of gate, up and down.
Resident = tuple[int, int, int, int]
# Steps of up to this many tokens are bound by the bytes of weights that they read, and short.
SHORT_STEP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A quantised tensor in memory that the backend computes in: the host's, or a device's.

    `shape` is row-major; the last dimension is the quantised one. `data` is uint8, exactly nbytes
    long, at any alignment: a numpy array, or for a backend of a device an array of that device
    (aligned, unless it is a part of another tensor). Whoever made it keeps it valid and unchanged
    for as long as the tensor is used.
    """

    name: str
    type: QuantType
    shape: tuple[int, ...]
    data: A


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Softmax attention of one layer, RoPE NEOX on the first `rope_dims` of every head.

    `gated`: q rows hold [query D | gate D] per head (Qwen3-Next/3.5) and the output is multiplied
    by sigmoid(gate). Head h reads kv head h // (heads // kv_heads).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope_dims: int
    rope_base: float
    scale: float
    eps: float
    gated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSpec:
    """Gated delta-net of one layer.

    `tiled`: V head h uses K head h % k_heads (qwen35moe), else h // (v_heads // k_heads)
    (qwen3next). conv_dim = 2 * k_heads * head_dim + v_heads * head_dim.
    """

    k_heads: int
    v_heads: int
    head_dim: int
    conv_kernel: int
    eps: float
    tiled: bool

    @property
    def key_dim(self) -> int:
        return self.k_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        return self.v_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The routed experts of one layer: gate and up [ff, hidden], down [hidden, ff] of each expert.

    `gate_type` and `up_type` differ only in odd mixes; with a fused gate_up tensor they are equal
    and the up rows follow the gate rows. `top_k` experts a token, weights renormalised over the
    picks when `renormalise`, then multiplied by `weights_scale`.
    """

    num_experts: int
    top_k: int
    hidden: int
    ff: int
    gate_type: QuantType
    up_type: QuantType
    down_type: QuantType
    renormalise: bool = True
    weights_scale: float = 1.0


@dataclass(slots=True)
class KvCache:
    """Keys and values of one attention layer: [pages, kv_heads, page_tokens, head_dim], float16 or
    float32. A sequence finds its tokens through its page table; all sequences share the pages."""

    k: A
    v: A
    page_tokens: int


@dataclass(slots=True)
class DeltaState:
    """Recurrent state of one delta-net layer and one sequence, all float32, updated in place.

    conv: [conv_kernel - 1, conv_dim], the last inputs of the convolution, oldest first.
    s: [v_heads, head_dim (v), head_dim (k)]: llama.cpp's order, the key index contiguous.
    """

    conv: A
    s: A


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a sequence in a step: rows [start, start + length) of the activations,
    positions [position, position + length) of the sequence. `pages` is its page table, int32;
    `delta` has one entry per layer, None where the layer has no recurrent state; it is the same
    list in all steps of a sequence."""

    start: int
    length: int
    position: int
    pages: I32Array
    delta: Sequence[DeltaState | None]


@dataclass(slots=True)
class Routing:
    """What the router of one layer said.

    h: [T, hidden] the normed input of router and experts. logits: float32 [T, experts] on the host.
    ids: int32 [T, top_k] by descending probability (ties: lower id first); weights: float32
    [T, top_k], those that the expert outputs are multiplied with. ids and weights may be replaced
    before the first expert runs (cache-aware routing). `picked`: what they were where a device has
    replaced them.
    """

    h: A
    logits: F32Array
    ids: I32Array
    weights: F32Array
    picked: tuple[I32Array, F32Array] | None = None


class MoeCall(Protocol):
    """The experts of one layer for the tokens of one step, computed in any order as they become
    available; the sum is taken in rank order, so the result does not depend on that order."""

    def start(self, expert: Resident) -> bool:
        """Begin an expert of the next run, if others can compute it while the caller goes on.
        Nothing else may be computed meanwhile, and it is given to run all the same."""

    def run(self, experts: Sequence[Resident]) -> None:
        """Compute the given (expert, gate address, up address, down address) for every token that
        picked them. Addresses are of host memory that stays valid until the call returns."""

    def finish(self, x: A) -> None:
        """x[t] += sum over ranks of weight * output + shared. Every picked expert must have run."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionWeights:
    """An attention mixer of one layer: `inputs` project to q, k and v, `output` back."""

    spec: AttentionSpec
    eps: float
    norm: A
    inputs: Sequence[W]
    q_norm: A | None
    k_norm: A | None
    output: W


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaWeights:
    """A delta-net mixer of layer `layer`: `inputs` project to qkv, z, beta and alpha, `output`
    back; the vectors as in Ops.delta_net."""

    layer: int
    spec: DeltaSpec
    eps: float
    norm: A
    inputs: Sequence[W]
    conv: A
    dt_bias: A
    a: A
    out_norm: A
    output: W


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerParts:
    """A whole layer: its mixer, with room(T) giving the buffers that it takes for T tokens (the
    same object for the same T), its router with the norm before it, and its experts."""

    mixer: AttentionWeights | DeltaWeights
    room: Callable[[int], Sequence[A]]
    norm: A
    eps: float
    router: W
    moe: MoeSpec
    shared: tuple[W, W, W, W | None] | None


class LayerOps(Protocol):
    """One layer between two routings: what a host needs between them is nothing, and a backend may
    do it in one go.

    `marks`: when the parts of the latest begin were done, time.perf_counter_ns: the begin, the last
    experts of the layer before, their sum, the mixer, the router.
    """

    @property
    def marks(self) -> Sequence[int]: ...

    @property
    def routing(self) -> Routing:
        """That of the latest begin."""

    def begin(
        self,
        x: A,
        segments: Sequence[Segment],
        cache: KvCache | None,
        last: tuple[MoeCall, Sequence[Resident]] | None,
        table: I64Array | None = None,
    ) -> tuple[Routing, MoeCall]:
        """Run the `last` experts of the layer before (its call, and what run takes, or nothing) and
        finish it; then x += mixer(RMS(x)), route, and begin this layer's experts. `segments` is the
        same object in all layers of a step; `cache` is None for a recurrent layer. The arrays of
        the Routing are good until the next begin of any layer, those of up to SHORT_STEP tokens
        until this layer's.

        `table` as of TrunkOps.walk: a backend may compute one token's picks that are there from now
        on, whatever becomes of the others; run and settle wait for it."""

    def guess(self, x: A) -> Routing:
        """What the router says of another layer's residual stream. Its arrays are good until the
        next guess of any layer; h is of no use."""


class TrunkOps(Protocol):
    """All layers, in order, for steps of up to SHORT_STEP tokens whose experts are in memory.

    `marks`: as of LayerOps, the first three, of the end of the last layer that walk finished.
    """

    @property
    def marks(self) -> Sequence[int]: ...

    def settle(self) -> None:
        """Wait until nothing that was begun is being computed any more."""

    def walk(
        self,
        x: A,
        segments: Sequence[Segment],
        caches: Sequence[KvCache | None],
        tables: Sequence[I64Array],
        first: int,
        last: tuple[MoeCall, Sequence[Resident]] | None,
        most_ns: int,
    ) -> tuple[int, tuple[Routing, MoeCall] | None]:
        """Compute layers from `first` on (and before them end one, as LayerOps.begin does), as long
        as every pick is in the layer's table, int64 [experts, 3]: the addresses of gate, up and
        down, or zeros; and for about `most_ns`. The first layer that is not finished, and if it has
        begun, since it lacks experts, what its begin gave. A backend may compute none."""


class Ops(Protocol):
    """A backend. One instance serves one engine; calls come from one thread at a time."""

    name: str

    def weight(self, tensor: Tensor) -> W:
        """A handle for a matrix [rows, cols] of any quantisation type."""

    def vector(self, tensor: Tensor) -> A:
        """A float32 vector or small array of the tensor's shape."""

    def buffer(self, rows: int, cols: int) -> A:
        """An uninitialised float32 activation buffer; models make theirs once, at load."""

    def embed(self, tensor_type: QuantType, rows: npt.NDArray[np.uint8], out: A) -> None:
        """Dequantise rows (uint8 [T, row_bytes], as they lie in the file) into out [T, hidden]."""

    def linear(
        self,
        x: A,
        weights: Sequence[W],
        outs: Sequence[A],
        *,
        norm: A | None = None,
        eps: float = 0.0,
    ) -> None:
        """outs[i] = RMS(x, norm, eps) @ weights[i].T, or x @ weights[i].T where norm is None."""

    def linear_add(self, x: A, weight: W, out: A) -> None:
        """out += x @ weight.T (the residual)."""

    def attention(
        self,
        spec: AttentionSpec,
        q: A,
        k: A,
        v: A,
        q_norm: A | None,
        k_norm: A | None,
        cache: KvCache,
        segments: Sequence[Segment],
        out: A,
    ) -> None:
        """Per-head RMS norm of q and k, RoPE, append to the cache, causal attention, gate.

        q [T, heads * head_dim * (2 if gated)], k and v [T, kv_heads * head_dim] may be overwritten.
        out [T, heads * head_dim].
        """

    def delta_net(
        self,
        spec: DeltaSpec,
        layer: int,
        qkv: A,
        z: A,
        beta: A,
        alpha: A,
        conv_weight: A,
        dt_bias: A,
        a: A,
        norm: A,
        segments: Sequence[Segment],
        out: A,
    ) -> None:
        """Gated delta-net: convolution, gates, recurrence, gated norm.

        qkv [T, conv_dim] before the convolution, z [T, value_dim], beta and alpha [T, v_heads] as
        the projections gave them (before sigmoid and softplus), conv_weight [conv_dim,
        conv_kernel], dt_bias, a [v_heads], norm [head_dim]. Reads and updates segment.delta[layer].
        out [T, value_dim].
        """

    def mix_attention(
        self,
        weights: AttentionWeights,
        x: A,
        buffers: Sequence[A],
        cache: KvCache,
        segments: Sequence[Segment],
    ) -> None:
        """x += attention of RMS(x): linear, attention and linear_add in one. `buffers`: room for q,
        k, v and the output, as attention takes them; it and `segments` are the same objects in all
        layers of a step."""

    def mix_delta(
        self, weights: DeltaWeights, x: A, buffers: Sequence[A], segments: Sequence[Segment]
    ) -> None:
        """x += delta-net of RMS(x): linear, delta_net and linear_add in one. `buffers`: room for
        qkv, z, beta, alpha and the output; it and `segments` are the same objects in all layers of
        a step."""

    def route(self, spec: MoeSpec, x: A, norm: A, eps: float, router: W) -> Routing:
        """Norm x, multiply with the router (float32), softmax over all experts, pick the top k. The
        arrays of the result are good until the next call."""

    def moe(
        self,
        spec: MoeSpec,
        routing: Routing,
        shared: tuple[W, W, W, W | None] | None,
    ) -> MoeCall:
        """Begin a layer's experts. `shared`: gate, up, down, and the [1, hidden] sigmoid gate; that
        expert is computed in any case, some time before finish returns."""

    def layer(self, parts: LayerParts) -> LayerOps:
        """The operations of a layer together. UnfusedLayer does them one by one."""

    def trunk(self, layers: Sequence[Any]) -> TrunkOps:
        """Layers that `layer` made, all of a model's."""
