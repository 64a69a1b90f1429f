"""Recorded routings of several origins as one thing to replay.

Owns: the formats (the engine's own recordings, BigMoeOnEdge route CSV, npz of expert ids). Does not
know: caches and policies.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.errors import FormatError
from fomoe.experts.routes import PROMPT, read_routes

I32Array = npt.NDArray[np.int32]


@dataclass(slots=True, kw_only=True)
class Trace:
    """The routing of T tokens, in the order in which they were computed."""

    name: str
    experts: int  # per layer
    ids: I32Array  # [T, layers, k], best first; -1 where the recording lacks a pick
    prompt: npt.NDArray[np.bool_]  # [T], the token belongs to a prompt
    expert_bytes: float | None = None  # mean over layers
    weights: npt.NDArray[np.floating] | None = None  # [T, layers, k]
    predicted: I32Array | None = None  # [T, layers, m], best first; -1 where nothing was
    logits: npt.NDArray[np.floating] | None = None  # [T, layers, experts]

    @property
    def layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[2])

    def decode_only(self) -> Trace:
        """The same without the tokens of prompts."""
        kept = ~self.prompt

        def select(rows: Any) -> Any:
            return None if rows is None else rows[kept]

        return replace(
            self,
            ids=self.ids[kept],
            prompt=self.prompt[kept],
            weights=select(self.weights),
            predicted=select(self.predicted),
            logits=select(self.logits),
        )


def load_trace(path: Path) -> Trace:
    """Read a recording, its format told from its first bytes. Raises FormatError, OSError."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"# route_trace") or start.startswith(b"turn,"):
        return _load_csv(path)
    if start.startswith(b"PK"):
        return _load_npz(path)
    return _load_recording(path)


def _load_recording(path: Path) -> Trace:
    shape, records = read_routes(path)
    if not len(records):
        raise FormatError(f"{path}: no tokens were recorded")
    predicted = None
    if shape.predicted:
        predicted = records["predicted"].astype(np.int32)
        predicted[predicted >= shape.experts] = -1
    return Trace(
        name=path.stem,
        experts=shape.experts,
        ids=records["ids"].astype(np.int32),
        prompt=records["phase"] == PROMPT,
        expert_bytes=float(np.mean(shape.expert_bytes)) if shape.expert_bytes else None,
        weights=records["weights"],
        predicted=predicted,
        logits=records["logits"] if shape.logits else None,
    )


def _load_csv(path: Path) -> Trace:
    """BigMoeOnEdge's route trace v1: `# key=value` comments, a header line, a row per pick."""
    with path.open(newline="") as file:
        lines = file.readlines()
    keys: dict[str, str] = {}
    sizes = []
    for line in lines:
        if line.startswith("#"):
            pairs = dict(word.split("=", 1) for word in line[1:].split() if "=" in word)
            if "layer" in pairs:
                sizes.append(float(pairs["expert_bytes"]))
            keys |= pairs
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    try:
        table = {
            name: np.array([row[name] for row in rows], np.float64)
            for name in ("turn", "phase", "step", "layer", "slot", "expert", "weight")
        }
        num_experts = int(keys["n_expert"])
    except (KeyError, ValueError) as error:
        raise FormatError(f"{path}: not a route trace ({error})") from error
    where = np.stack([table["turn"], table["phase"], table["step"]], axis=1)
    tokens, token = np.unique(where, axis=0, return_inverse=True)
    layer, slot = table["layer"].astype(int), table["slot"].astype(int)
    shape = (len(tokens), int(layer.max()) + 1, int(slot.max()) + 1)
    ids, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    ids[token.ravel(), layer, slot] = table["expert"]
    weights[token.ravel(), layer, slot] = table["weight"]
    return Trace(
        name=path.name.split(".")[0],
        experts=num_experts,
        ids=ids,
        prompt=tokens[:, 1] == 0,
        expert_bytes=float(np.mean(sizes)) if sizes else None,
        weights=weights,
    )


def _load_npz(path: Path) -> Trace:
    """Arrays trace0, trace1, ... of expert ids [tokens, layers, k], one after another."""
    with np.load(path) as arrays:
        names = sorted((n for n in arrays.files if n.startswith("trace")), key=lambda n: int(n[5:]))
        if not names:
            raise FormatError(f"{path}: no array is called trace0")
        ids = np.concatenate([arrays[name] for name in names]).astype(np.int32)
    return Trace(
        name=path.stem,
        experts=int(ids.max()) + 1,
        ids=ids,
        prompt=np.zeros(len(ids), np.bool_),
    )
