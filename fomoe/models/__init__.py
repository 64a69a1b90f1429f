"""Models: one file for each architecture that a GGUF may name, found by that name.

Owns: the choice of the file. The architecture's module has `describe` and `build`, as here.
"""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from types import ModuleType

from fomoe.errors import UnsupportedError
from fomoe.gguf import GgufFile
from fomoe.models.base import HyperParameters, LayerParameters, WeightSource
from fomoe.models.blocks import HEAD_ROWS, Backends, Layer, Model, buffer_bytes

__all__ = [
    "HEAD_ROWS", "HyperParameters", "Layer", "LayerParameters", "Model", "WeightSource",
    "architectures", "buffer_bytes", "build", "describe",
]  # fmt: skip

_SHARED = {"__init__", "base", "blocks", "hybrid", "outline"}


def architectures() -> list[str]:
    """The names that `general.architecture` may have: those of the files beside this one."""
    names = {entry.name.removesuffix(".py") for entry in files(__name__).iterdir()}
    return sorted(name for name in names - _SHARED if name.isidentifier() and name[0] != "_")


def describe(gguf: GgufFile) -> HyperParameters:
    """A file's hyper-parameters, its tensor table checked against them.

    Raises UnsupportedError for an architecture, or a feature of one, that fomoe lacks, FormatError
    for a key or tensor that is missing or does not fit.
    """
    return _module(gguf.architecture).describe(gguf)  # type: ignore[no-any-return]


def build(hp: HyperParameters, ops: Backends, weights: WeightSource, *, max_tokens: int) -> Model:
    """The model of these hyper-parameters on a backend, or on one for each layer, for steps of at
    most `max_tokens` tokens.

    `weights` must hold hp.dense_tensors, and keep them valid for as long as the model is used.
    """
    return _module(hp.architecture).build(  # type: ignore[no-any-return]
        hp, ops, weights, max_tokens=max_tokens
    )


def _module(architecture: str) -> ModuleType:
    supported = architectures()
    if architecture not in supported:
        raise UnsupportedError(
            f"architecture {architecture!r} is not supported; fomoe runs {', '.join(supported)}"
        )
    return import_module(f"fomoe.models.{architecture}")
