"""What a sequence remembers: pages of keys and values, and the recurrent state of delta-net layers.

Owns: the arrays, and who has which page and state. Does not know: tokens, text, how they are
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.io.arena import Arena
from fomoe.kernels.ops import A, DeltaState, KvCache
from fomoe.models import HyperParameters, LayerParameters

PAGE_TOKENS = 64

_DTYPES: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}


def num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


def kv_bytes(layers: Iterable[LayerParameters], context: int, cache_type: str) -> int:
    """Bytes of the key and value caches of these layers for `context` tokens."""
    width = sum(
        2 * layer.attention.kv_heads * layer.attention.head_dim
        for layer in layers
        if layer.attention
    )
    return num_pages(context) * PAGE_TOKENS * width * _DTYPES[cache_type].itemsize


def recurrent_bytes(layers: Iterable[LayerParameters]) -> int:
    """Bytes of one sequence's recurrent state in these layers."""
    return sum(
        4 * ((d.conv_kernel - 1) * d.conv_dim + d.v_heads * d.head_dim * d.head_dim)
        for d in (layer.delta for layer in layers)
        if d
    )


class LayerArrays(Protocol):
    """Makes arrays in the memory that a layer computes in."""

    def __call__(self, layer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> A: ...


# Fills an array of a layer with zeros, before what is computed next.
Zero = Callable[[int, A], None]


def _zero(layer: int, array: A) -> None:
    array[...] = 0


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sequence's share: a page table (int32) and, per layer, its recurrent state or None."""

    pages: npt.NDArray[np.int32]
    delta: list[DeltaState | None]
    zero: Zero

    def clear(self) -> None:
        """As before the first token. Pages need nothing: what is read of them is written before."""
        for layer, state in enumerate(self.delta):
            if state is not None:
                self.zero(layer, state.conv)
                self.zero(layer, state.s)


class StatePool:
    """The caches of an engine. A sequence takes all it may ever need when it starts: nothing runs
    out in the middle."""

    def __init__(
        self,
        hp: HyperParameters,
        *,
        context: int,
        parallel: int,
        cache_type: str,
        array: LayerArrays,
        zero: Zero | None = None,
    ) -> None:
        self._zero = zero or _zero
        self.caches: list[KvCache | None] = []
        self._free_pages = list(reversed(range(num_pages(context))))
        self._free_states: list[list[DeltaState | None]] = [[] for _ in range(parallel)]
        for layer in hp.layers:
            if layer.attention:
                spec = layer.attention
                shape = (len(self._free_pages), spec.kv_heads, PAGE_TOKENS, spec.head_dim)
                dtype = _DTYPES[cache_type]
                k, v = (array(layer.index, shape, dtype) for _ in range(2))
                self.caches.append(KvCache(k=k, v=v, page_tokens=PAGE_TOKENS))
            else:
                self.caches.append(None)
            for states in self._free_states:
                d, f32 = layer.delta, _DTYPES["f32"]
                states.append(
                    DeltaState(
                        conv=array(layer.index, (d.conv_kernel - 1, d.conv_dim), f32),
                        s=array(layer.index, (d.v_heads, d.head_dim, d.head_dim), f32),
                    )
                    if d
                    else None
                )
        self.capacity = context

    def take(self, num_tokens: int) -> SequenceState | None:
        """State for a sequence of at most `num_tokens`, or None until others give theirs back."""
        pages = num_pages(num_tokens)
        if pages > len(self._free_pages) or not self._free_states:
            return None
        table = np.array([self._free_pages.pop() for _ in range(pages)], np.int32)
        state = SequenceState(pages=table, delta=self._free_states.pop(), zero=self._zero)
        state.clear()
        return state

    def give(self, state: SequenceState) -> None:
        self._free_pages.extend(state.pages.tolist())
        self._free_states.append(state.delta)


def in_arena(arena: Arena) -> LayerArrays:
    """Arrays of every layer in host memory."""

    def array(layer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> A:
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return arena.view(arena.allocate(nbytes, 64), nbytes).view(dtype).reshape(shape)

    return array
