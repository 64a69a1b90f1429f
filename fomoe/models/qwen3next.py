"""qwen3next: Qwen3-Next and Qwen3-Coder-Next.

Owns: what sets the architecture apart from hybrid.py. V heads are grouped (V head h reads K head
h // (v_heads // k_heads)); one tensor holds the projections of both gates of the delta-net.
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
    attention, delta = outline.attention(gated=True), outline.delta(tiled=False)
    return hybrid.describe(outline, attention, delta, {"ssm_ba.weight": 2 * delta.v_heads})


def build(hp: HyperParameters, ops: Backends, weights: WeightSource, *, max_tokens: int) -> Model:
    return hybrid.build(hp, ops, weights, max_tokens, _gates)


def _gates(builder: Builder, layer: int, spec: DeltaSpec) -> tuple[Tensor, Tensor]:
    """ssm_ba's rows are, for each K head, the betas and then the alphas of its V heads: copied into
    two matrices [v_heads, hidden] in the order of the V heads."""
    fused = builder.tensor(f"blk.{layer}.ssm_ba.weight")
    rows = fused.data.reshape(spec.k_heads, 2, spec.v_heads // spec.k_heads, -1)
    beta, alpha = (
        Tensor(
            name=f"{fused.name}[{name}]",
            type=fused.type,
            shape=(spec.v_heads, fused.shape[1]),
            data=rows[:, part].reshape(-1),
        )
        for part, name in enumerate(("beta", "alpha"))
    )
    return beta, alpha
