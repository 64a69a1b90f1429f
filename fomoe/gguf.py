"""A GGUF model on disk, in one file or split: its metadata and where every tensor and expert lies.

Owns: joining the shards, typed reads of keys, the byte ranges of experts. Reads no weights and
keeps no file open. Does not know: architectures, what is done with the tensors.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar, overload

import numpy as np

from fomoe.errors import FormatError
from fomoe.gguf_arrays import ArrayRef
from fomoe.gguf_header import Header, TensorInfo, Value, read_header

__all__ = ["REQUIRED", "ArrayRef", "ByteRange", "ExpertTensors", "GgufFile", "TensorInfo"]

T = TypeVar("T", bool, int, float, str)
D = TypeVar("D")

_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")

# general.file_type, as llama.cpp prints it (enum llama_ftype).
_FILE_TYPES = {
    0: "all F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1",
    10: "Q2_K - Medium", 11: "Q3_K - Small", 12: "Q3_K - Medium", 13: "Q3_K - Large",
    14: "Q4_K - Small", 15: "Q4_K - Medium", 16: "Q5_K - Small", 17: "Q5_K - Medium", 18: "Q6_K",
    19: "IQ2_XXS - 2.0625 bpw", 20: "IQ2_XS - 2.3125 bpw", 21: "Q2_K - Small",
    22: "IQ3_XS - 3.3 bpw", 23: "IQ3_XXS - 3.0625 bpw", 24: "IQ1_S - 1.5625 bpw",
    25: "IQ4_NL - 4.5 bpw", 26: "IQ3_S - 3.4375 bpw", 27: "IQ3_S mix - 3.66 bpw",
    28: "IQ2_S - 2.5 bpw", 29: "IQ2_M - 2.7 bpw", 30: "IQ4_XS - 4.25 bpw", 31: "IQ1_M - 1.75 bpw",
    32: "BF16", 36: "TQ1_0 - 1.69 bpw ternary", 37: "TQ2_0 - 2.06 bpw ternary", 38: "MXFP4 MoE",
}  # fmt: skip


class _Required:
    """The type of REQUIRED: no default, a missing key is an error."""


REQUIRED: Final = _Required()


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`nbytes` consecutive bytes of shard number `shard`, from its byte `offset`."""

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """A layer's routed experts: gate and up, or both fused in `gate_up`, and down.

    Shapes are [experts, ff, hidden] (gate, up), [experts, 2 ff, hidden] (gate_up: gate's rows
    first) and [experts, hidden, ff] (down); an expert is one contiguous slice of each.
    """

    gate: TensorInfo | None
    up: TensorInfo | None
    gate_up: TensorInfo | None
    down: TensorInfo

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors in the order of `ranges`."""
        return tuple(t for t in (self.gate, self.up, self.gate_up, self.down) if t is not None)

    def ranges(self, expert: int) -> tuple[ByteRange, ...]:
        """The slices of one expert: gate, up, down; or gate_up, down."""
        assert 0 <= expert < self.num_experts, expert
        return tuple(
            ByteRange(t.shard, t.offset + expert * (t.nbytes // t.shape[0]), t.nbytes // t.shape[0])
            for t in self.tensors
        )


class GgufFile:
    """An opened model: everything its headers say. Made by `GgufFile.open`."""

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]  # bytes of each file
    metadata: Mapping[str, Value]  # arrays are ArrayRefs: see `array`
    tensors: Mapping[str, TensorInfo]

    def __init__(self, headers: list[Header]) -> None:
        self.paths = tuple(header.path for header in headers)
        self.sizes = tuple(header.size for header in headers)
        self.metadata = MappingProxyType(headers[0].metadata)
        tensors: dict[str, TensorInfo] = {}
        for header in headers:
            for tensor in header.tensors:
                if tensor.name in tensors:
                    raise FormatError(f"{header.path}: tensor {tensor.name} is in two shards")
                tensors[tensor.name] = tensor
        self.tensors = MappingProxyType(tensors)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufFile:
        """Read the headers of the model at `path`: a file, or any shard of a split one.

        Raises FormatError (damaged, or a shard is missing), UnsupportedError (sound, but of a
        version or tensor type that fomoe lacks) or OSError (cannot be read).
        """
        first = read_header(Path(path))
        count = first.metadata.get("split.count", 1)
        if not isinstance(count, int) or count <= 1:
            return cls([first])
        paths = _shard_paths(first.path, count)
        headers = [
            first if p == first.path and i == 0 else read_header(p, i) for i, p in enumerate(paths)
        ]
        _check_shards(headers)
        return cls(headers)

    @property
    def architecture(self) -> str:
        """What `general.architecture` names, the prefix of the model's own keys."""
        return self.value("general.architecture", str)

    @property
    def name(self) -> str:
        """The model's name, or its file's when it has none."""
        return self.value("general.name", str, "") or self.paths[0].stem

    @property
    def file_type_name(self) -> str:
        """The quantisation mix as llama.cpp names it, e.g. "Q4_K - Medium"."""
        file_type = self.value("general.file_type", int, -1) & ~1024  # the bit says "guessed"
        return _FILE_TYPES.get(file_type, "unknown")

    @property
    def num_parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding excluded."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """A hash of sizes, scalar metadata and tensor table: the same for copies and renamed files.

        It does not cover the weights: two fine-tunes that differ in nothing else look alike.
        """
        state = hashlib.sha256(repr(self.sizes).encode())
        for key, value in sorted(self.metadata.items()):
            seen = (value.element, value.count) if isinstance(value, ArrayRef) else value
            state.update(repr((key, seen)).encode())
        for t in self.tensors.values():
            state.update(repr((t.name, t.type.id, t.shape, t.shard, t.offset)).encode())
        return state.hexdigest()[:32]

    @overload
    def value(self, key: str, kind: type[T]) -> T: ...
    @overload
    def value(self, key: str, kind: type[T], default: D) -> T | D: ...
    def value(self, key: str, kind: type[T], default: object = REQUIRED) -> object:
        """The scalar at `key`; `default` when it is absent, FormatError when there is none.

        `kind` is bool, int, float or str; a whole number serves as a float, nothing else converts.
        """
        if key not in self.metadata:
            if default is REQUIRED:
                raise FormatError(f"{self.paths[0]}: the required key {key} is missing")
            return default
        value = self.metadata[key]
        if type(value) is int and kind is float:
            return float(value)
        if type(value) is not kind:
            found = "array" if isinstance(value, ArrayRef) else type(value).__name__
            raise FormatError(f"{self.paths[0]}: key {key}: {kind.__name__} expected, not {found}")
        return value

    @overload
    def arch_value(self, name: str, kind: type[T]) -> T: ...
    @overload
    def arch_value(self, name: str, kind: type[T], default: D) -> T | D: ...
    def arch_value(self, name: str, kind: type[T], default: object = REQUIRED) -> object:
        """`value` of the architecture's own key, e.g. "block_count" for "qwen35moe.block_count"."""
        return self.value(f"{self.architecture}.{name}", kind, default)

    def array(self, key: str) -> list[str] | np.ndarray:
        """The array at `key`, read from the file now: list of strings, or numpy array [count]."""
        value = self.metadata.get(key)
        if value is None:
            raise FormatError(f"{self.paths[0]}: the required key {key} is missing")
        if not isinstance(value, ArrayRef):
            raise FormatError(f"{self.paths[0]}: key {key}: array expected")
        return value.read()

    def strings(self, key: str) -> list[str]:
        """`array`, when it must be one of strings."""
        array = self.array(key)
        if not isinstance(array, list):
            raise FormatError(f"{self.paths[0]}: key {key}: array of strings expected")
        return array

    def numbers(self, key: str) -> np.ndarray:
        """`array`, when it must be one of numbers or bools: [count]."""
        array = self.array(key)
        if isinstance(array, list):
            raise FormatError(f"{self.paths[0]}: key {key}: array of numbers expected")
        return array

    def tensor(self, name: str) -> TensorInfo:
        """The tensor of that name; FormatError when the model lacks it."""
        if name not in self.tensors:
            raise FormatError(f"{self.paths[0]}: tensor {name} is missing")
        return self.tensors[name]

    def experts(self, layer: int) -> ExpertTensors | None:
        """The routed experts of a layer, or None when it has none."""
        prefix = f"blk.{layer}.ffn_"
        if f"{prefix}down_exps.weight" not in self.tensors:
            return None
        gate_up = self.tensors.get(f"{prefix}gate_up_exps.weight")
        fused = gate_up is not None
        experts = ExpertTensors(
            gate=None if fused else self.tensor(f"{prefix}gate_exps.weight"),
            up=None if fused else self.tensor(f"{prefix}up_exps.weight"),
            gate_up=gate_up,
            down=self.tensor(f"{prefix}down_exps.weight"),
        )
        num_experts, hidden, ff = (*experts.down.shape, 0, 0)[:3]
        for t in experts.tensors[:-1]:
            if t.shape != (num_experts, 2 * ff if fused else ff, hidden):
                raise FormatError(
                    f"{self.paths[t.shard]}: tensor {t.name} of shape {t.shape} does not fit "
                    f"{experts.down.name} of shape {experts.down.shape}"
                )
        return experts

    def expert_ranges(self, layer: int, expert: int) -> tuple[ByteRange, ...]:
        """Where one routed expert lies: see ExpertTensors.ranges."""
        experts = self.experts(layer)
        assert experts is not None, layer
        return experts.ranges(expert)


def _shard_paths(path: Path, count: int) -> list[Path]:
    """All shards of the split model that `path` is one of."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(
            f"{path}: one of {count} shards, but not named like one (NAME-00001-of-{count:05}.gguf)"
            ": its siblings cannot be found; give the shards their original names"
        )
    paths = [
        path.with_name(f"{match['prefix']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)
    ]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FormatError(f"{path}: {', '.join(missing[:3])}{more} of {count} shards missing")
    return paths


def _check_shards(headers: list[Header]) -> None:
    """The shards must belong together: each its number, together the announced tensors."""
    for i, header in enumerate(headers):
        no, count = header.metadata.get("split.no"), header.metadata.get("split.count")
        if no != i or count != len(headers):
            raise FormatError(
                f"{header.path}: says it is shard {no} of {count} (from 0), but its name says {i} "
                f"of {len(headers)}: shards mixed up or renamed"
            )
    total = headers[0].metadata.get("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if total is not None and total != found:
        raise FormatError(f"{headers[0].path}: {found} tensors in all shards, {total} announced")
