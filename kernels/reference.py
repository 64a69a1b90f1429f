"""The operations in plain numpy: slow, and the truth that the other backends are compared with.

Owns: the formulas, computed in float64 between the float32 activations of the seam. Does not know:
models, files, speed. Formulas: llama.cpp's graphs of the Qwen3 MoE families and Hugging Face
transformers' models of the same name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels.ops import (
    AttentionSpec,
    DeltaSpec,
    F32Array,
    KvCache,
    LayerParts,
    MoeSpec,
    Routing,
    Segment,
    Tensor,
)
from fomoe.kernels.table import QuantType
from fomoe.kernels.unfused import UnfusedLayer, UnfusedMixers

F64Array = npt.NDArray[np.float64]

# The smallest sum of picked probabilities that the picks are divided by (llama.cpp: 2^-14).
_MIN_WEIGHT_SUM = 6.103515625e-5


def dequantise(type_: QuantType, shape: tuple[int, ...], data: npt.NDArray[np.uint8]) -> F64Array:
    """The values of a tensor's bytes, float64 of its row-major shape, by the gguf package."""
    import gguf  # only this reference needs it: not a dependency of the fast path

    rows = data.reshape(-1, type_.row_bytes(shape[-1]))
    if type_.name in ("F32", "F16"):
        values = rows.view(np.float32 if type_.name == "F32" else np.float16)
    else:
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(type_.id))
    return np.asarray(values, np.float64).reshape(shape)


def rms_norm(x: npt.NDArray[np.floating[Any]], weight: F32Array, eps: float) -> F64Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    wide = x.astype(np.float64)
    out: F64Array = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps) * weight
    return out


def sigmoid(x: F64Array) -> F64Array:
    y: F64Array = 0.5 * (1 + np.tanh(0.5 * x))
    return y


def silu(x: F64Array) -> F64Array:
    return x * sigmoid(x)


def softmax(x: F64Array) -> F64Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    p: F64Array = e / e.sum(axis=-1, keepdims=True)
    return p


def rope(x: F64Array, positions: npt.NDArray[np.int64], dims: int, base: float) -> F64Array:
    """RoPE NEOX of x [T, heads, head_dim]: pairs (i, i + dims / 2) of the first `dims` turn."""
    half = dims // 2
    angles = positions[:, None] * base ** (-2.0 * np.arange(half) / dims)  # [T, half]
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    first, second = x[..., :half], x[..., half:dims]
    return np.concatenate(
        [first * cos - second * sin, first * sin + second * cos, x[..., dims:]], axis=-1
    )


class ReferenceOps(UnfusedMixers):
    """The Ops of numpy. Weights are float64 matrices; activations float32 arrays."""

    name = "reference"

    def weight(self, tensor: Tensor) -> F64Array:
        return dequantise(tensor.type, tensor.shape, tensor.data)

    def vector(self, tensor: Tensor) -> F32Array:
        return dequantise(tensor.type, tensor.shape, tensor.data).astype(np.float32)

    def buffer(self, rows: int, cols: int) -> F32Array:
        return np.full((rows, cols), np.nan, np.float32)  # what is read unwritten shows

    def embed(self, tensor_type: QuantType, rows: npt.NDArray[np.uint8], out: F32Array) -> None:
        out[...] = dequantise(tensor_type, out.shape, np.ascontiguousarray(rows))

    def linear(
        self,
        x: F32Array,
        weights: Sequence[F64Array],
        outs: Sequence[F32Array],
        *,
        norm: F32Array | None = None,
        eps: float = 0.0,
    ) -> None:
        h = x.astype(np.float64) if norm is None else rms_norm(x, norm, eps)
        for weight, out in zip(weights, outs, strict=True):
            out[...] = h @ weight.T

    def linear_add(self, x: F32Array, weight: F64Array, out: F32Array) -> None:
        out[...] = out + x.astype(np.float64) @ weight.T

    def attention(
        self,
        spec: AttentionSpec,
        q: F32Array,
        k: F32Array,
        v: F32Array,
        q_norm: F32Array | None,
        k_norm: F32Array | None,
        cache: KvCache,
        segments: Sequence[Segment],
        out: F32Array,
    ) -> None:
        tokens = len(q)
        q3 = q.astype(np.float64).reshape(tokens, spec.heads, -1)  # [T, heads, D or 2 D]
        gate = q3[..., spec.head_dim :]
        q3 = q3[..., : spec.head_dim]
        k3 = k.astype(np.float64).reshape(tokens, spec.kv_heads, spec.head_dim)
        v3 = v.reshape(tokens, spec.kv_heads, spec.head_dim)
        if q_norm is not None:
            q3 = rms_norm(q3, q_norm, spec.eps)
        if k_norm is not None:
            k3 = rms_norm(k3, k_norm, spec.eps)
        for segment in segments:
            rows = slice(segment.start, segment.start + segment.length)
            positions = np.arange(segment.position, segment.position + segment.length)
            q_rot = rope(q3[rows], positions, spec.rope_dims, spec.rope_base)
            k_rot = rope(k3[rows], positions, spec.rope_dims, spec.rope_base)
            pages = segment.pages[positions // cache.page_tokens]
            cache.k[pages, :, positions % cache.page_tokens] = k_rot
            cache.v[pages, :, positions % cache.page_tokens] = v3[rows]
            attended = _attend(spec, q_rot, cache, segment)
            if spec.gated:
                attended *= sigmoid(gate[rows])
            out[rows] = attended.reshape(segment.length, -1)

    def delta_net(
        self,
        spec: DeltaSpec,
        layer: int,
        qkv: F32Array,
        z: F32Array,
        beta: F32Array,
        alpha: F32Array,
        conv_weight: F32Array,
        dt_bias: F32Array,
        a: F32Array,
        norm: F32Array,
        segments: Sequence[Segment],
        out: F32Array,
    ) -> None:
        rate = sigmoid(beta.astype(np.float64))  # [T, v_heads]
        decay = np.exp(a * np.logaddexp(0.0, alpha.astype(np.float64) + dt_bias))
        for segment in segments:
            rows = slice(segment.start, segment.start + segment.length)
            state = segment.delta[layer]
            assert state is not None, layer
            mixed = _convolve(qkv[rows], conv_weight, state.conv)
            o = _delta_rule(spec, mixed, rate[rows], decay[rows], state.s)  # [T, v_heads, D]
            gated = rms_norm(o, norm, spec.eps).reshape(segment.length, -1)
            out[rows] = gated * silu(z[rows].astype(np.float64))

    def route(
        self, spec: MoeSpec, x: F32Array, norm: F32Array, eps: float, router: F64Array
    ) -> Routing:
        h = rms_norm(x, norm, eps).astype(np.float32)
        logits = h.astype(np.float64) @ router.T
        probabilities = softmax(logits)
        ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, : spec.top_k]
        weights = np.take_along_axis(probabilities, ids, axis=-1)
        if spec.renormalise:
            weights /= np.maximum(weights.sum(axis=-1, keepdims=True), _MIN_WEIGHT_SUM)
        return Routing(
            h=h,
            logits=logits.astype(np.float32),
            ids=ids.astype(np.int32),
            weights=(weights * spec.weights_scale).astype(np.float32),
        )

    def moe(
        self,
        spec: MoeSpec,
        routing: Routing,
        shared: tuple[F64Array, F64Array, F64Array, F64Array | None] | None,
    ) -> ReferenceMoeCall:
        return ReferenceMoeCall(spec, routing, shared)

    def layer(self, parts: LayerParts) -> UnfusedLayer:
        return UnfusedLayer(self, parts)


class ReferenceMoeCall:
    """One layer's experts for one step: outputs are kept by (token, rank) and summed at the end."""

    def __init__(
        self,
        spec: MoeSpec,
        routing: Routing,
        shared: tuple[F64Array, F64Array, F64Array, F64Array | None] | None,
    ) -> None:
        self._spec = spec
        self._h = routing.h.astype(np.float64)
        self._routing = routing
        self._shared = shared
        self._outputs = np.full((*routing.ids.shape, spec.hidden), np.nan)

    def _shared_out(self) -> F64Array:
        if self._shared is None:
            return np.zeros_like(self._h)
        gate, up, down, scalar_gate = self._shared
        y: F64Array = (silu(self._h @ gate.T) * (self._h @ up.T)) @ down.T
        return y if scalar_gate is None else y * sigmoid(self._h @ scalar_gate.T)

    def start(self, expert: tuple[int, int, int, int]) -> bool:
        """Nothing: run computes all."""
        return False

    def run(self, experts: Sequence[tuple[int, int, int, int]]) -> None:
        spec = self._spec
        for expert, gate_address, up_address, down_address in experts:
            gate = _matrix_at(gate_address, spec.gate_type, (spec.ff, spec.hidden))
            up = _matrix_at(up_address, spec.up_type, (spec.ff, spec.hidden))
            down = _matrix_at(down_address, spec.down_type, (spec.hidden, spec.ff))
            tokens, ranks = np.nonzero(self._routing.ids == expert)
            h = self._h[tokens]
            self._outputs[tokens, ranks] = (silu(h @ gate.T) * (h @ up.T)) @ down.T

    def finish(self, x: F32Array) -> None:
        assert not np.isnan(self._outputs).any(), "finish before every picked expert has run"
        weights = self._routing.weights.astype(np.float64)
        x[...] = x + np.einsum("tr,trh->th", weights, self._outputs) + self._shared_out()


def _attend(spec: AttentionSpec, q: F64Array, cache: KvCache, segment: Segment) -> F64Array:
    """Causal attention of q [n, heads, D] over the segment's tokens in the cache: [n, heads, D]."""
    length = segment.position + segment.length
    pages = segment.pages[: -(-length // cache.page_tokens)]
    group = spec.heads // spec.kv_heads

    def gather(cached: Any) -> F64Array:  # [heads, length, D]
        flat = cached[pages].swapaxes(0, 1).reshape(spec.kv_heads, -1, spec.head_dim)
        wide: F64Array = flat[:, :length].astype(np.float64)
        return np.repeat(wide, group, axis=0)

    scores = np.einsum("thd,hsd->hts", q, gather(cache.k)) * spec.scale
    future = np.arange(length) > np.arange(segment.position, length)[:, None]
    weights = softmax(np.where(future, -np.inf, scores))
    out: F64Array = np.einsum("hts,hsd->thd", weights, gather(cache.v))
    return out


def _convolve(inputs: F32Array, weight: F32Array, state: F32Array) -> F64Array:
    """Causal depthwise convolution and silu of [n, conv_dim]; state: the inputs before, updated."""
    kernel = weight.shape[1]
    padded = np.concatenate([state, inputs]).astype(np.float64)
    state[...] = padded[len(inputs) :]
    taps = [padded[j : j + len(inputs)] * weight[:, j] for j in range(kernel)]
    return silu(np.sum(taps, axis=0))


def _delta_rule(
    spec: DeltaSpec, mixed: F64Array, rate: F64Array, decay: F64Array, state: F32Array
) -> F64Array:
    """The gated delta rule, token by token: [n, v_heads, D]; state [v_heads, D (v), D (k)]."""
    heads, dim = spec.v_heads, spec.head_dim
    q, k, v = np.split(mixed, [spec.key_dim, 2 * spec.key_dim], axis=1)
    head = np.arange(heads)
    k_head = head % spec.k_heads if spec.tiled else head // (heads // spec.k_heads)

    def unit(x: F64Array) -> F64Array:  # [n, v_heads, D]: every V head's own K head
        x = x.reshape(len(x), spec.k_heads, dim)
        y: F64Array = x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + spec.eps)
        return y[:, k_head]

    q, k, v = unit(q) / np.sqrt(dim), unit(k), v.reshape(len(v), heads, dim)
    s = state.astype(np.float64)
    out = np.empty_like(v)
    for t in range(len(mixed)):
        s *= decay[t][:, None, None]
        remembered = np.einsum("hvk,hk->hv", s, k[t])
        delta = rate[t][:, None] * (v[t] - remembered)
        s += delta[:, :, None] * k[t][:, None, :]
        out[t] = np.einsum("hvk,hk->hv", s, q[t])
    state[...] = s
    return out


def _matrix_at(address: int, type_: QuantType, shape: tuple[int, int]) -> F64Array:
    nbytes = shape[0] * type_.row_bytes(shape[1])
    raw = (ctypes.c_uint8 * nbytes).from_address(address)
    return dequantise(type_, shape, np.frombuffer(memoryview(raw), np.uint8))
