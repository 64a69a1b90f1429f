"""What the kernels must know of a step's segments, in device memory at addresses that stay.

Owns: the tables (positions, pages, which rows and tiles to compute, where recurrent states lie) and
their upload, once a step. Does not know: operations, layers' weights.

Everything that changes from token to token is read from here by the kernels, so a recorded graph of
a decode step stays valid: its launches depend on the number of tokens and segments alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fomoe.kernels.gpu.rope import rope_table
from fomoe.kernels.ops import DeltaState, Segment

SHORT = 8  # tokens: segments up to this long are computed row by row, longer ones by tiles
TILE = 64  # tokens of a tile

_STATE_WORDS = 2  # addresses of conv and s

I32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tables:
    """Device tensors; the first `num_*` entries count, the others are of earlier steps.

    positions, page_starts [T]: of every row, its position and where its sequence's pages begin in
    `pages`. rows [num_rows]: those of short segments. short, long: int32 [., 4] segments (first
    row, length, first tile, number). tiles: int32 [., 4], TILE tokens of a long segment (its first
    row, its length, the tile's offset in it, number). All int32.
    """

    positions: torch.Tensor
    page_starts: torch.Tensor
    rows: torch.Tensor
    short: torch.Tensor
    long: torch.Tensor
    tiles: torch.Tensor
    pages: torch.Tensor


class Steps:
    """The current step's tables on one device, for steps of at most `max_tokens` tokens."""

    def __init__(self, device: torch.device, max_tokens: int) -> None:
        self._device, self._max_tokens = device, max_tokens
        self._segments: Sequence[Segment] | None = None
        self._states: list[Sequence[DeltaState | None]] = []
        self._ropes: dict[tuple[int, float], torch.Tensor] = {}
        self._state_table = torch.empty((0, 0, _STATE_WORDS), dtype=torch.int64, device=device)
        self._positions = np.zeros(0, np.int32)
        self.generation = 0  # counts the times that addresses changed: graphs of before are void
        self.max_short = 0  # tokens of the longest short segment
        self.num_rows = self.num_short = self.num_long = self.num_tiles = 0
        self._allocate(max_segments=8, num_pages=1024)

    def _allocate(self, max_segments: int, num_pages: int) -> None:
        t, s = self._max_tokens, max_segments
        tiles = t // TILE + s
        self._max_segments, self._max_pages = s, num_pages
        ends = np.cumsum([t, t, t, 4 * s, 4 * s, 4 * tiles, num_pages])
        self._host = np.zeros(int(ends[-1]), np.int32)
        self._flat = torch.zeros(int(ends[-1]), dtype=torch.int32, device=self._device)
        self._host_parts = np.split(self._host, ends[:-1])
        parts = torch.tensor_split(self._flat, ends[:-1].tolist())
        parts = [part.view(-1, 4) if 3 <= i < 6 else part for i, part in enumerate(parts)]
        self.tables = Tables(*parts)
        self.generation += 1

    def use(self, segments: Sequence[Segment]) -> None:
        """Make these the current ones. A step gives the very same sequence of segments to all its
        layers and leaves it unchanged: only the first of them uploads anything."""
        if segments is self._segments:
            return
        num_pages = sum(len(s.pages) for s in segments)
        if len(segments) > self._max_segments or num_pages > self._max_pages:
            more = (2 * max(len(segments), self._max_segments), 2 * max(num_pages, self._max_pages))
            self._allocate(*more)
        self._fill(segments)
        self._upload(self._flat, self._host)
        for (dims, base), table in self._ropes.items():
            self._upload_rope(table, dims, base)
        self._use_states([s.delta for s in segments])
        self._segments = segments

    def _fill(self, segments: Sequence[Segment]) -> None:
        positions, page_starts, rows, short, long, tiles, pages = self._host_parts
        self.num_rows = self.num_short = self.num_long = self.num_tiles = self.max_short = 0
        at = 0
        for number, s in enumerate(segments):
            own = slice(s.start, s.start + s.length)
            positions[own] = np.arange(s.position, s.position + s.length)
            page_starts[own] = at
            pages[at : at + len(s.pages)] = s.pages
            at += len(s.pages)
            if s.length <= SHORT:
                rows[self.num_rows : self.num_rows + s.length] = np.arange(own.start, own.stop)
                self.num_rows += s.length
                short.reshape(-1, 4)[self.num_short] = (s.start, s.length, 0, number)
                self.num_short += 1
                self.max_short = max(self.max_short, s.length)
                continue
            long.reshape(-1, 4)[self.num_long] = (s.start, s.length, self.num_tiles, number)
            self.num_long += 1
            for offset in range(0, s.length, TILE):
                tiles.reshape(-1, 4)[self.num_tiles] = (s.start, s.length, offset, number)
                self.num_tiles += 1
        num_tokens = max(s.start + s.length for s in segments)
        self._positions = positions[:num_tokens].copy()

    def rope(self, dims: int, base: float) -> torch.Tensor:
        """cos and sin of the current rows' positions: float32 [2, max_tokens, dims // 2]."""
        table = self._ropes.get((dims, base))
        if table is None:
            shape = (2, self._max_tokens, dims // 2)
            table = torch.zeros(shape, dtype=torch.float32, device=self._device)
            self._ropes[dims, base] = table
            self._upload_rope(table, dims, base)
        return table

    def _upload_rope(self, table: torch.Tensor, dims: int, base: float) -> None:
        cos, sin = rope_table(self._positions, dims, base)
        self._upload(table[0].view(-1), cos.reshape(-1))
        self._upload(table[1].view(-1), sin.reshape(-1))

    def states(self, layer: int) -> torch.Tensor:
        """Addresses of a layer's conv and s: int64 [segments, 2]."""
        return self._state_table[layer]

    def _use_states(self, states: list[Sequence[DeltaState | None]]) -> None:
        """Sequences keep their lists of states from step to step: most steps upload nothing."""
        same = len(states) == len(self._states)
        if same and all(a is b for a, b in zip(states, self._states, strict=True)):
            return
        self._states = states
        num_layers = max(len(s) for s in states)
        if num_layers == 0:
            return
        host = np.zeros((num_layers, self._max_segments, _STATE_WORDS), np.int64)
        for i, own in enumerate(states):
            for layer, state in enumerate(own):
                if state is not None:
                    host[layer, i] = state.conv.data_ptr(), state.s.data_ptr()
        if self._state_table.shape != host.shape:
            self._state_table = torch.zeros(host.shape, dtype=torch.int64, device=self._device)
            self.generation += 1
        self._upload(self._state_table.view(-1), host.reshape(-1))

    def _upload(self, to: torch.Tensor, host: npt.NDArray[np.generic]) -> None:
        source = torch.from_numpy(host)
        if to.is_cuda:
            # A pinned block of torch's allocator is not used again before the copy is done.
            source = source.pin_memory()
        to[: len(host)].copy_(source, non_blocking=True)
