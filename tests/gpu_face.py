"""GpuOps behind the numpy arrays of the backends' tests: on the CPU, in Triton's interpreter, or on
a GPU where there is one.

Owns: moving arrays to the device and back, for tests only; on the CPU both are the same memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fomoe.kernels.gpu.ops import GpuOps
from fomoe.kernels.gpu.routing import GpuRouting, Mailbox
from fomoe.kernels.ops import DeltaState, KvCache, LayerParts, MoeSpec, Segment
from fomoe.kernels.unfused import UnfusedLayer, UnfusedMixers

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


class GpuFace(UnfusedMixers):
    """fomoe.kernels.ops.Ops on numpy arrays."""

    name = "gpu"

    def __init__(self, max_tokens: int) -> None:
        self.gpu = GpuOps(DEVICE, max_tokens)
        self.weight, self.vector, self.buffer = self.gpu.weight, self._vector, self._buffer
        self._kept: dict[int, tuple[Any, Any]] = {}  # of host arrays that live on: their copies
        self._segments: tuple[Any, Any] = (None, None)

    def close(self) -> None:
        self.gpu.close()

    def _vector(self, tensor: Any) -> Any:
        return self.gpu.vector(tensor).cpu().numpy()

    def _buffer(self, rows: int, cols: int) -> Any:
        return np.full((rows, cols), np.nan, np.float32)

    def _up(self, array: Any) -> Any:
        return None if array is None else torch.from_numpy(array).to(DEVICE)

    def _keep(self, array: Any) -> Any:
        """The device's copy of an array that operations update."""
        return self._kept.setdefault(id(array), (array, self._up(array)))[1]

    def _down(self, *pairs: tuple[Any, Any]) -> None:
        for tensor, array in pairs:
            array[...] = tensor.cpu().numpy()

    def _state(self, state: DeltaState | None) -> DeltaState | None:
        return state and DeltaState(conv=self._keep(state.conv), s=self._keep(state.s))

    def _moved(self, segments: Sequence[Segment]) -> list[Segment]:
        if self._segments[0] is not segments:
            moved = [
                Segment(s.start, s.length, s.position, s.pages, [self._state(d) for d in s.delta])
                for s in segments
            ]
            self._segments = segments, moved
        return self._segments[1]

    def embed(self, tensor_type: Any, rows: Any, out: Any) -> None:
        to = self._up(out)
        self.gpu.embed(tensor_type, rows, to)
        self._down((to, out))

    def linear(self, x: Any, weights: Any, outs: Any, *, norm: Any = None, eps: float = 0) -> None:
        to = [self._up(out) for out in outs]
        self.gpu.linear(self._up(x), weights, to, norm=self._up(norm), eps=eps)
        self._down(*zip(to, outs, strict=True))

    def linear_add(self, x: Any, weight: Any, out: Any) -> None:
        to = self._up(out)
        self.gpu.linear_add(self._up(x), weight, to)
        self._down((to, out))

    def attention(
        self, spec: Any, q: Any, k: Any, v: Any, q_norm: Any, k_norm: Any, cache: KvCache,
        segments: Any, out: Any,
    ) -> None:  # fmt: skip
        kept = KvCache(self._keep(cache.k), self._keep(cache.v), cache.page_tokens)
        inputs = [self._up(array) for array in (q, k, v, q_norm, k_norm)]
        to = self._up(out)
        self.gpu.attention(spec, *inputs, kept, self._moved(segments), to)
        self._down((to, out))

    def delta_net(self, spec: Any, layer: int, *arrays: Any) -> None:
        *inputs, segments, out = arrays
        to = self._up(out)
        moved = self._moved(segments)
        self.gpu.delta_net(spec, layer, *map(self._up, inputs), moved, to)
        self._down((to, out))
        for s, m in zip(segments, moved, strict=True):
            mine, theirs = s.delta[layer], m.delta[layer]
            self._down((theirs.s, mine.s), (theirs.conv, mine.conv))

    def route(self, spec: Any, x: Any, norm: Any, eps: float, router: Any) -> Any:
        routing = self.gpu.route(spec, self._up(x), self._up(norm), eps, router)
        wait()
        return routing

    def moe(self, spec: MoeSpec, routing: Any, shared: Any) -> Any:
        if not isinstance(routing, GpuRouting):
            ids, weights = self._up(routing.ids), self._up(routing.weights)
            routing = GpuRouting(
                h=self._up(routing.h), logits=routing.logits, ids=routing.ids,
                weights=routing.weights, device_ids=ids, device_weights=weights,
                mailbox=Mailbox.like(ids.view(-1), ids),
            )  # fmt: skip
        return MoeFace(self, spec, self.gpu.moe(spec, routing, shared))

    def layer(self, parts: LayerParts) -> UnfusedLayer:
        return UnfusedLayer(self, parts)


class MoeFace:
    """A MoeCall of the device whose experts lie in host memory."""

    def __init__(self, face: GpuFace, spec: MoeSpec, call: Any) -> None:
        self._face, self._spec, self._call = face, spec, call
        self._uploaded: list[Any] = []

    def run(self, experts: Sequence[tuple[int, int, int, int]]) -> None:
        self._call.run([(expert, *self.uploaded(addresses)) for expert, *addresses in experts])

    def run_table(self, table: Any) -> None:
        self._call.run_table(self._face._up(table))

    def uploaded(self, addresses: Sequence[int]) -> list[int]:
        """Addresses of the same experts in aligned device memory."""
        s = self._spec
        up = s.gate_type.row_bytes(s.hidden), s.up_type.row_bytes(s.hidden)
        sizes = (s.ff * up[0], s.ff * up[1], s.hidden * s.down_type.row_bytes(s.ff))
        for address, nbytes in zip(addresses, sizes, strict=True):
            raw = (ctypes.c_uint8 * nbytes).from_address(address)
            self._uploaded.append(torch.frombuffer(raw, dtype=torch.uint8).to(DEVICE, copy=True))
        return [tensor.data_ptr() for tensor in self._uploaded[-3:]]

    def finish(self, x: Any) -> None:
        to = self._face._up(x)
        self._call.finish(to)
        self._face._down((to, x))

    def finish_some(self, x: Any) -> None:
        to = self._face._up(x)
        self._call.finish_some(to)
        self._face._down((to, x))


def wait() -> None:
    if DEVICE != "cpu":
        torch.cuda.synchronize()
