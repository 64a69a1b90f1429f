"""GpuOps: the operations of models on one GPU, torch tensors over the Triton kernels beside it.

Owns: scratch memory, what varies from call to call, recorded launches. Does not know: models,
files, which experts are where.

Nothing waits for the device: every operation queues its launches on torch's current stream. What a
router says is copied into pinned host memory behind them; the kernels of the experts take it where
it is, on the device. What changes from token to token (positions, pages, states, who is there) is
read from tables in device memory, and what a layer hands to the next lies where it always does: so
`fixed_part` may record a layer's launches once, as a CUDA graph, and play them back. On a device
without graphs it just launches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fomoe.kernels.device import StandInRule
from fomoe.kernels.gpu.attention import AttentionScratch, attend
from fomoe.kernels.gpu.delta import DeltaScratch, delta_net, solved_floats
from fomoe.kernels.gpu.embed import embed
from fomoe.kernels.gpu.fixed import FixedParts
from fomoe.kernels.gpu.matmul import matmul
from fomoe.kernels.gpu.matvec import MAX_TOKENS as MATVEC_TOKENS
from fomoe.kernels.gpu.matvec import matvec
from fomoe.kernels.gpu.moe_call import GpuMoeCall, moe_sizes
from fomoe.kernels.gpu.norm import rms_norm
from fomoe.kernels.gpu.routing import GpuRouting, StandIns, choose, room, to_device
from fomoe.kernels.gpu.scratch import Scratch, scratch_floats
from fomoe.kernels.gpu.shared import SharedExpert
from fomoe.kernels.gpu.steps import SHORT, Steps
from fomoe.kernels.gpu.weights import SUPPORTED, GpuWeight, host_bytes, upload
from fomoe.kernels.ops import (
    AttentionSpec,
    DeltaSpec,
    KvCache,
    LayerParts,
    MoeSpec,
    Routing,
    Segment,
    Tensor,
)
from fomoe.kernels.quant import dequantize
from fomoe.kernels.table import F32, QuantType
from fomoe.kernels.unfused import UnfusedLayer, UnfusedMixers, UnfusedTrunk

R = TypeVar("R")

# Programs that a launch of few tokens is split into, so that a large card is busy at a short one's
# cost: two waves of the multiprocessors of the card.
_WAVES = 2
_MAX_SPLITS = 64
_BLAS_BYTES = 32 << 20  # of torch's own, for products of float32; as much as it takes anywhere
_MAX_SEGMENTS = 8  # of a step: scratch is planned for so many long ones


class GpuOps(UnfusedMixers):
    """fomoe.kernels.device.DeviceOps on a torch device ("cuda:0", or "cpu" in Triton's
    interpreter), for steps of up to `max_tokens` tokens. Calls come with the device's stream as
    torch's current one."""

    name = "gpu"

    def __init__(self, device: str, max_tokens: int) -> None:
        self.device = torch.device(device)
        self.max_tokens = max_tokens
        self._steps = Steps(self.device, max_tokens)
        self._scratch = Scratch(self.device)
        self._main, self._aside = FixedParts(self.device), FixedParts(self.device)
        self._fixed = self._main
        self._programs = _WAVES * _num_multiprocessors(self.device)

    def close(self) -> None:
        """Let go of all memory. Nothing may be queued."""
        self._scratch = Scratch(self.device)
        self._main, self._aside = FixedParts(self.device), FixedParts(self.device)

    def fixed_part(
        self,
        key: Hashable,
        segments: Sequence[Segment],
        launch: Callable[[], R],
        *,
        aside: bool = False,
    ) -> R:
        """Queue what `launch` queues by calling these operations, and return what it returned.

        For a step of the same number of one-token segments under the same key, what was queued is
        recorded the second time and played back from then on, with the arrays that `launch` was
        given then: so nothing in it may be decided by the host, and what it returns (a Routing with
        its mailbox) is the same object every time. Longer steps are just launched.
        """
        self._steps.use(segments)
        if len(segments) > MATVEC_TOKENS or any(s.length > 1 for s in segments):
            return launch()
        moved = self._steps.generation + self._scratch.generation
        self._fixed = self._aside if aside else self._main
        try:
            return self._fixed.run((key, len(segments)), launch, moved)
        finally:
            self._fixed = self._main

    # ---- memory ----

    @property
    def scratch_bytes(self) -> int:
        return self._scratch.num_bytes + self._main.num_bytes + self._aside.num_bytes

    def workspace_bytes(
        self,
        *,
        widths: Sequence[int],
        attention: Sequence[AttentionSpec] = (),
        delta: Sequence[DeltaSpec] = (),
        moe: Sequence[MoeSpec] = (),
        shared_ff: int = 0,
    ) -> int:
        """Device memory that a model's steps take, beside its weights, buffers and caches: scratch,
        and what a layer's experts hold meanwhile. Arguments as CpuOps.reserve has them."""
        t = self.max_tokens
        held = [
            t * (3 * s.hidden + s.num_experts + 2 * shared_ff + 2 * s.top_k)
            + t * s.top_k * (s.ff + s.hidden + 4)  # of every pick
            for s in moe
        ]
        routed, experts = _fixed_floats(moe, shared_ff)
        floats = self._scratch_floats(widths, attention, delta) + 2 * routed + experts
        # Two routings may be alive, and torch rounds blocks up.
        blas = _BLAS_BYTES if self.device.type == "cuda" else 0
        return 4 * floats + 6 * max(held, default=0) + blas

    def reserve(
        self,
        *,
        widths: Sequence[int],
        attention: Sequence[AttentionSpec] = (),
        delta: Sequence[DeltaSpec] = (),
        moe: Sequence[MoeSpec] = (),
        shared_ff: int = 0,
    ) -> None:
        """Allocate the scratch of a model, so that no later call does."""
        self._scratch.reserve(self._scratch_floats(widths, attention, delta))
        routed, experts = _fixed_floats(moe, shared_ff)
        self._main.routed.reserve(routed)
        self._main.experts.reserve(experts)
        self._aside.routed.reserve(routed)

    def _scratch_floats(
        self,
        widths: Sequence[int],
        attention: Sequence[AttentionSpec],
        delta: Sequence[DeltaSpec],
    ) -> int:
        t = self.max_tokens
        needs = [scratch_floats(t * cols) for cols in widths]
        needs += [scratch_floats(*self._attention_sizes(spec, t)) for spec in attention]
        needs += [scratch_floats(*_delta_sizes(spec, t, _MAX_SEGMENTS)) for spec in delta]
        return max(needs, default=0)

    # ---- weights and activations ----

    def reads(self, tensor_type: QuantType) -> bool:
        """As in DeviceOps."""
        return tensor_type.name in SUPPORTED

    def weight(self, tensor: Tensor) -> GpuWeight:
        return upload(tensor, str(self.device))

    def vector(self, tensor: Tensor) -> Any:
        values = dequantize(tensor.type, host_bytes(tensor), tensor.shape)
        return torch.from_numpy(values).to(self.device)

    def buffer(self, rows: int, cols: int) -> Any:
        return torch.empty((rows, cols), dtype=torch.float32, device=self.device)

    # ---- operations ----

    def embed(self, tensor_type: QuantType, rows: npt.NDArray[np.uint8], out: Any) -> None:
        """As in Ops. The rows come from the host as they are, and are expanded here."""
        embed(tensor_type, to_device(rows, self.device), out)

    def linear(
        self,
        x: Any,
        weights: Sequence[GpuWeight],
        outs: Sequence[Any],
        *,
        norm: Any | None = None,
        eps: float = 0.0,
    ) -> None:
        if norm is not None:
            x = self._normed(x, norm, eps)
        self._multiply(x, weights, outs)

    def linear_add(self, x: Any, weight: GpuWeight, out: Any) -> None:
        self._multiply(x, (weight,), (out,), add=True)

    def _normed(self, x: Any, norm: Any, eps: float) -> Any:
        (flat,) = self._scratch.take(x.numel())
        h = flat.view(x.shape)
        rms_norm(x, norm, h, eps)
        return h

    def _multiply(
        self, x: Any, weights: Sequence[GpuWeight], outs: Sequence[Any], *, add: bool = False
    ) -> None:
        if len(x) <= MATVEC_TOKENS:
            matvec(x, weights, outs, add=add)
            return
        for weight, out in zip(weights, outs, strict=True):
            if weight.type is not F32:
                matmul(x, weight, out, add=add)
                continue
            # Routers and gates decide: their products stay float32.
            values = weight.data.view(torch.float32).view(weight.rows, weight.cols)
            torch.addmm(out, x, values.T, beta=int(add), out=out)

    def attention(
        self,
        spec: AttentionSpec,
        q: Any,
        k: Any,
        v: Any,
        q_norm: Any | None,
        k_norm: Any | None,
        cache: KvCache,
        segments: Sequence[Segment],
        out: Any,
    ) -> None:
        """As in Ops. All layers of a step give the very same sequence of segments."""
        self._steps.use(segments)
        sizes = self._attention_sizes(spec, self._steps.num_rows)
        sums, ranges = self._scratch.take(*sizes)
        splits = self._splits(spec, self._steps.num_rows)
        scratch = AttentionScratch(sums, ranges, splits)
        attend(spec, q, k, v, q_norm, k_norm, cache, self._steps, scratch, out)

    def _splits(self, spec: AttentionSpec, num_rows: int) -> int:
        return min(_MAX_SPLITS, max(1, self._programs // max(1, num_rows * spec.kv_heads)))

    def _attention_sizes(self, spec: AttentionSpec, num_rows: int) -> tuple[int, int]:
        """Floats of the partial sums and ranges of at most that many rows."""
        parts = max(num_rows, self._programs // spec.kv_heads) * spec.heads
        return parts * spec.head_dim, parts * 2

    def delta_net(
        self,
        spec: DeltaSpec,
        layer: int,
        qkv: Any,
        z: Any,
        beta: Any,
        alpha: Any,
        conv_weight: Any,
        dt_bias: Any,
        a: Any,
        norm: Any,
        segments: Sequence[Segment],
        out: Any,
    ) -> None:
        """As in Ops. All layers of a step give the very same sequence of segments."""
        self._steps.use(segments)
        sizes = _delta_sizes(spec, len(qkv), len(segments))
        mixed, solved = self._scratch.take(*sizes)
        scratch = DeltaScratch(mixed.view(len(qkv), spec.conv_dim), solved)
        delta_net(
            spec, layer, qkv, z, beta, alpha, conv_weight, dt_bias, a, norm, self._steps, scratch,
            out,
        )  # fmt: skip

    def stand_ins(self, spec: MoeSpec, rule: StandInRule, offered: Any) -> StandIns:
        return StandIns(rule, offered)

    def route(
        self,
        spec: MoeSpec,
        x: Any,
        norm: Any,
        eps: float,
        router: GpuWeight,
        stand_ins: StandIns | None = None,
    ) -> GpuRouting:
        """As in Ops; what is for the host is valid there after an event."""
        t = len(x)
        parts = self._fixed.take(self._fixed.routed, _routed_sizes(spec, t))
        h, logits = parts[0].view(t, spec.hidden), parts[1].view(t, spec.num_experts)
        rms_norm(x, norm, h, eps)
        self._multiply(h, (router,), (logits,))
        words = parts[2].view(torch.int32)
        return choose(spec, h, logits, stand_ins, words, self._fixed.mailbox)

    def moe(self, spec: MoeSpec, routing: Routing, shared: SharedExpert | None) -> GpuMoeCall:
        assert isinstance(routing, GpuRouting)
        memory = self._fixed.take(self._fixed.experts, moe_sizes(spec, shared, len(routing.h)))
        return GpuMoeCall(spec, routing, shared, self._multiply, memory, self._fixed.side)

    def layer(self, parts: LayerParts) -> UnfusedLayer:
        return UnfusedLayer(self, parts)

    def trunk(self, layers: Sequence[Any]) -> UnfusedTrunk:
        return UnfusedTrunk()


def _routed_sizes(spec: MoeSpec, tokens: int) -> tuple[int, int, int]:
    """Floats of a router's input, its logits, and what is made of them."""
    return tokens * spec.hidden, tokens * spec.num_experts, room(spec, tokens)


def _fixed_floats(moe: Sequence[MoeSpec], shared_ff: int) -> tuple[int, int]:
    """What fixed parts need of memory of their own: routers, and experts."""
    t = MATVEC_TOKENS
    routed = [scratch_floats(*_routed_sizes(s, t)) for s in moe]
    experts = [
        scratch_floats(*moe_sizes(s, None, t), t * s.hidden, t * shared_ff, t * shared_ff, t)
        for s in moe
    ]
    return max(routed, default=0), max(experts, default=0)


def _delta_sizes(spec: DeltaSpec, num_tokens: int, num_segments: int) -> tuple[int, int]:
    solved = solved_floats(spec, num_tokens, num_segments) if num_tokens > SHORT else 0
    return num_tokens * spec.conv_dim, solved


def _num_multiprocessors(device: Any) -> int:
    if device.type != "cuda":
        return 3  # few, but more than one: the same code as on a GPU
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
