"""The mixers of layers on the CPU: one C call each.

Owns: the C struct that joins the plans of a mixer. Does not know: what mixers compute, models.
"""

from __future__ import annotations

from collections.abc import Sequence

from fomoe.kernels.cpu_arrays import F32Array, Views
from fomoe.kernels.cpu_plans import AttentionPlan, DeltaPlan, Plans
from fomoe.kernels.cpu_segments import Segments
from fomoe.kernels.ops import AttentionWeights, DeltaWeights
from fomoe.native import ffi


class CpuMixer:
    """One layer's mixer: the C struct `c`. What stays from token to token is set once."""

    def __init__(
        self,
        plans: Plans,
        views: Views,
        step: AttentionPlan | DeltaPlan,
        weights: AttentionWeights | DeltaWeights,
    ) -> None:
        self._views, self._step = views, step
        self._inputs = plans.linear(weights.inputs, weights.eps, add=False)
        self._output = plans.linear((weights.output,), 0.0, add=True)
        self._x: F32Array | None = None
        self._buffers: Sequence[F32Array] = ()
        self.c = ffi.new("fomoe_mixer *")
        self.c.inputs, self.c.output = self._inputs.c, self._output.c
        self.c.norm = views.of(weights.norm).pointer
        if isinstance(step, AttentionPlan):
            self.c.attention = step.c
        else:
            self.c.delta = step.c

    def prepare(self, x: F32Array, buffers: Sequence[F32Array], segments: Segments) -> None:
        """Set what varies for a run."""
        if x is not self._x or buffers is not self._buffers:
            *ins, out = buffers
            self._inputs.set_outs(self._views, ins)
            self._step.bind(self._views, (*ins, out))
            self._output.set_outs(self._views, [x])
            view, c = self._views.of(x), self.c
            c.x, c.ldx, c.tokens = view.pointer, view.ld, view.rows
            self._x, self._buffers = x, buffers
        self._step.follow(segments)
