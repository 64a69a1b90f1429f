"""A synchronous forward with every expert in memory: what the engine does, without reads.

Owns: weights in memory, sequence state and steps for tests of models and backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.gguf import GgufFile
from fomoe.kernels.cpu import CpuOps
from fomoe.kernels.ops import DeltaState, KvCache, Ops, Segment, Tensor
from fomoe.kernels.reference import ReferenceOps
from fomoe.models import HEAD_ROWS, HyperParameters, build, describe

PAGE_TOKENS = 16
MAX_TOKENS = 80
BACKENDS: dict[str, Callable[[], Ops]] = {
    "reference": ReferenceOps,
    "cpu": lambda: CpuOps(num_threads=2, max_tokens=MAX_TOKENS),
}
F32Array = npt.NDArray[np.float32]


class FileWeights:
    """Every tensor of a file, mapped into memory."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        self._files = [np.memmap(path, np.uint8, "c") for path in gguf.paths]

    def __contains__(self, name: str) -> bool:
        return name in self._gguf.tensors

    def tensor(self, name: str) -> Tensor:
        t = self._gguf.tensors[name]
        data = self._files[t.shard][t.offset : t.offset + t.nbytes]
        return Tensor(name=name, type=t.type, shape=t.shape, data=np.asarray(data))

    def expert(self, layer: int, expert: int) -> tuple[int, int, int, int]:
        """(expert, address of gate, of up, of down)."""
        experts = self._gguf.experts(layer)
        assert experts is not None
        ranges = experts.ranges(expert)
        addresses = [int(self._files[r.shard].ctypes.data) + r.offset for r in ranges]
        if experts.gate_up is not None:
            addresses.insert(1, addresses[0] + ranges[0].nbytes // 2)
        return expert, *addresses


@dataclass
class State:
    """A sequence: its pages, recurrent state, and how many tokens it has seen."""

    pages: npt.NDArray[np.int32]
    delta: list[DeltaState | None]
    length: int = 0


class Harness:
    """A model on a backend; sequences take pages of one shared cache."""

    def __init__(
        self,
        path: Path,
        ops: Ops,
        *,
        max_tokens: int = MAX_TOKENS,
        cache_type: type = np.float32,
        change: Callable[[HyperParameters], HyperParameters] = lambda hp: hp,
    ) -> None:
        self.gguf = GgufFile.open(path)
        self.hp = change(describe(self.gguf))
        self.weights = FileWeights(self.gguf)
        self.model = build(self.hp, ops, self.weights, max_tokens=max_tokens)
        self._next_page = 0
        self._num_pages = 64
        self._caches = [
            KvCache(
                k=np.full(
                    (self._num_pages, a.kv_heads, PAGE_TOKENS, a.head_dim), np.nan, cache_type
                ),
                v=np.full(
                    (self._num_pages, a.kv_heads, PAGE_TOKENS, a.head_dim), np.nan, cache_type
                ),
                page_tokens=PAGE_TOKENS,
            )
            if (a := layer.attention)
            else None
            for layer in self.hp.layers
        ]

    def sequence(self, capacity: int = 96) -> State:
        """A new sequence, its pages in no particular order."""
        count = -(-capacity // PAGE_TOKENS)
        pages = np.arange(self._next_page, self._next_page + count, dtype=np.int32)[::-1].copy()
        self._next_page += count
        assert self._next_page <= self._num_pages
        delta = [
            DeltaState(
                conv=np.zeros((d.conv_kernel - 1, d.conv_dim), np.float32),
                s=np.zeros((d.v_heads, d.head_dim, d.head_dim), np.float32),
            )
            if (d := layer.delta)
            else None
            for layer in self.hp.layers
        ]
        return State(pages, delta)

    def step(self, parts: Sequence[tuple[State, Sequence[int]]]) -> list[F32Array]:
        """One forward for the next tokens of several sequences: logits [n, vocab] of each."""
        ids = np.array([token for _, tokens in parts for token in tokens])
        segments, start = [], 0
        for state, tokens in parts:
            segments.append(
                Segment(
                    start=start,
                    length=len(tokens),
                    position=state.length,
                    pages=state.pages,
                    delta=state.delta,
                )
            )
            state.length += len(tokens)
            start += len(tokens)
        logits = self._forward(ids, segments)
        return [logits[s.start : s.start + s.length] for s in segments]

    def _forward(self, ids: npt.NDArray[np.int64], segments: list[Segment]) -> F32Array:
        embedding = self.weights.tensor(self.hp.embedding)
        x = self.model.embed(embedding.data.reshape(self.hp.vocab_size, -1)[ids])
        last = None
        for layer, cache in zip(self.model.layers, self._caches, strict=True):
            routing, call = layer.ops.begin(x, segments, cache, last)
            index = layer.parameters.index
            experts = [self.weights.expert(index, int(e)) for e in np.unique(routing.ids)]
            if index % 2:  # some now, the others with the next layer
                call.run(experts[:2])
                del experts[:2]
            last = call, experts
        assert last is not None
        call.run(experts)
        call.finish(x)
        heads = [
            np.array(self.model.head(x[i : i + HEAD_ROWS])) for i in range(0, len(x), HEAD_ROWS)
        ]
        return np.concatenate(heads)


def nmse(found: F32Array, truth: F32Array) -> float:
    """Mean squared error over the truth's mean square."""
    wide = truth.astype(np.float64)
    return float(np.sum((found - wide) ** 2) / np.sum(wide**2))
