"""Layers and mixers for backends that do each operation by itself.

Owns: which operations they are made of. Does not know: backends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fomoe.kernels.ops import (
    A,
    AttentionWeights,
    DeltaWeights,
    I64Array,
    KvCache,
    LayerOps,
    LayerParts,
    MoeCall,
    Ops,
    Resident,
    Routing,
    Segment,
)


class UnfusedMixers:
    """The mixers and the trunk of a backend that does each operation by itself."""

    def mix_attention(
        self: Ops,
        weights: AttentionWeights,
        x: A,
        buffers: Sequence[A],
        cache: KvCache,
        segments: Sequence[Segment],
    ) -> None:
        w, (q, k, v, out) = weights, buffers
        self.linear(x, w.inputs, (q, k, v), norm=w.norm, eps=w.eps)
        self.attention(w.spec, q, k, v, w.q_norm, w.k_norm, cache, segments, out)
        self.linear_add(out, w.output, x)

    def mix_delta(
        self: Ops, weights: DeltaWeights, x: A, buffers: Sequence[A], segments: Sequence[Segment]
    ) -> None:
        w, (*ins, out) = weights, buffers
        qkv, z, beta, alpha = ins
        conv, bias, a, norm = w.conv, w.dt_bias, w.a, w.out_norm
        self.linear(x, w.inputs, ins, norm=w.norm, eps=w.eps)
        self.delta_net(w.spec, w.layer, qkv, z, beta, alpha, conv, bias, a, norm, segments, out)
        self.linear_add(out, w.output, x)

    def trunk(self, layers: Sequence[LayerOps]) -> UnfusedTrunk:
        return UnfusedTrunk()


class UnfusedLayer:
    """fomoe.kernels.ops.LayerOps."""

    def __init__(self, ops: Ops, parts: LayerParts) -> None:
        self._ops, self._parts = ops, parts
        self.marks: list[int] = []
        self.routing: Routing

    def begin(
        self,
        x: A,
        segments: Sequence[Segment],
        cache: KvCache | None,
        last: tuple[MoeCall, Sequence[Resident]] | None,
        table: I64Array | None = None,
    ) -> tuple[Routing, MoeCall]:
        now = time.perf_counter_ns
        self.marks = [now()]
        if last is not None:
            call, experts = last
            if experts:
                call.run(experts)
            self.marks.append(now())
            call.finish(x)
        else:
            self.marks.append(now())
        self.marks.append(now())
        p, buffers = self._parts, self._parts.room(len(x))
        if isinstance(p.mixer, AttentionWeights):
            assert cache is not None, "attention without a cache"
            self._ops.mix_attention(p.mixer, x, buffers, cache, segments)
        else:
            self._ops.mix_delta(p.mixer, x, buffers, segments)
        self.marks.append(now())
        self.routing = self.guess(x)
        self.marks.append(now())
        return self.routing, self._ops.moe(p.moe, self.routing, p.shared)

    def guess(self, x: A) -> Routing:
        p = self._parts
        return self._ops.route(p.moe, x, p.norm, p.eps, p.router)


class UnfusedTrunk:
    """fomoe.kernels.ops.TrunkOps that leaves every layer to who asks."""

    marks: Sequence[int] = ()

    def settle(self) -> None:
        pass

    def walk(
        self,
        x: A,
        segments: Sequence[Segment],
        caches: Sequence[KvCache | None],
        tables: Sequence[I64Array],
        first: int,
        last: tuple[MoeCall, Sequence[Resident]] | None,
        most_ns: int,
    ) -> tuple[int, None]:
        return first, None
