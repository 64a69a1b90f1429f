"""What a model is to the rest of the engine: its facts, and where its weights come from.

Owns: the dataclasses of hyper-parameters and the weight source. Does not know: files, formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fomoe.kernels.ops import AttentionSpec, DeltaSpec, MoeSpec, Tensor
from fomoe.kernels.table import QuantType

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
OUTPUT_NORM = "output_norm.weight"


class WeightSource(Protocol):
    """The dense tensors of a file, in memory."""

    def tensor(self, name: str) -> Tensor: ...

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParameters:
    """One trunk layer: attention or delta-net (the other is None), then experts.

    `shared_ff` is the width of the shared expert, 0 where there is none.
    """

    index: int
    attention: AttentionSpec | None
    delta: DeltaSpec | None
    moe: MoeSpec
    shared_ff: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperParameters:
    """A model's facts, from its file's metadata and tensor table.

    `layers` are the trunk's; blocks of multi-token prediction are counted and otherwise left alone.
    `dense_tensors` must be in memory for a forward: all but the routed experts, the MTP blocks and
    the embedding (its rows are read as they are needed), which is among them only where the head is
    tied to it. `eps` is that of the RMS norms.
    """

    architecture: str
    num_layers: int
    num_mtp_layers: int
    hidden: int
    vocab_size: int
    context_length: int
    eps: float
    layers: tuple[LayerParameters, ...]
    dense_tensors: tuple[str, ...]
    embedding: str
    embedding_type: QuantType
    tied_head: bool
