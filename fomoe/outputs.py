"""The files that a run leaves behind when it is asked to: a trace, recorded routes, a profile.

Owns: where they may be written, opening them, what describes the run in them. Does not know: when
events happen, what is done with a profile's counts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe import host
from fomoe.config import EngineOptions, format_size
from fomoe.errors import FormatError, RequestError
from fomoe.experts.layout import ExpertLayout
from fomoe.experts.profile import is_profile, parse, serialise, write_atomically
from fomoe.experts.routes import RouteShape, RouteWriter
from fomoe.gguf import GgufFile
from fomoe.models import HyperParameters
from fomoe.trace import Tracer

_log = logging.getLogger(__name__)


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[Path, str]) -> None:
    """Refuse now what could not be written in the end, or would do harm. `outputs`: by flag;
    `inputs`: what must not be overwritten, and what it is called. Raises RequestError.
    """
    seen: dict[Path, str] = {}
    for flag, path in outputs.items():
        if path is None:
            continue
        if path.is_dir():
            raise RequestError(f"{flag} {path}: a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise RequestError(f"{flag} {path}: a device or pipe; name a file")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise RequestError(f"{flag} {path}: {path.parent} is no folder that can be written to")
        for known, what in inputs.items():
            if path.exists() and known.exists() and path.samefile(known):
                raise RequestError(f"{flag} {path}: that is {what}; it would be overwritten")
        other = seen.setdefault(path.resolve(), flag)
        if other != flag:
            raise RequestError(f"{other} and {flag} name the same file: {path}")


def output_flags(options: EngineOptions) -> dict[str, Path | None]:
    """The files that an engine writes, by the flags that name them."""
    return {
        "--trace": options.trace,
        "--record-routes": options.record_routes,
        "--profile": options.profile,
    }


class Outputs:
    """Opens the files that the options name; `exits` finishes them."""

    def __init__(
        self,
        options: EngineOptions,
        gguf: GgufFile,
        hp: HyperParameters,
        layouts: Sequence[ExpertLayout],
        exits: AsyncExitStack,
    ) -> None:
        self._options, self._gguf, self._hp, self._exits = options, gguf, hp, exits
        self._expert_bytes = [layout.expert_bytes for layout in layouts]
        self._experts = max(layer.moe.num_experts for layer in hp.layers)
        self._top_k = max(layer.moe.top_k for layer in hp.layers)

    def tracer(self, drive_bytes_per_second: float | None) -> Tracer | None:
        """A recording shows every rate beside the drive's own."""
        if self._options.trace is None:
            return None
        info: dict[str, object] = {
            "model": self._gguf.name,
            "fingerprint": self._gguf.fingerprint,
            "layers": self._hp.num_layers,
            "experts": self._experts,
            "top_k": self._top_k,
            "expert_bytes": max(self._expert_bytes),
            "threads": self._options.threads or host.num_processors(),
            "options": _given(self._options),
        }
        if drive_bytes_per_second is not None:
            info["drive_gbps"] = drive_bytes_per_second / 1e9
        tracer = Tracer.create(self._options.trace, info=info)
        self._exits.callback(tracer.close)
        return tracer

    def route_writer(self) -> RouteWriter | None:
        path = self._options.record_routes
        if path is None:
            return None
        shape = RouteShape(
            layers=self._hp.num_layers,
            experts=self._experts,
            top_k=self._top_k,
            predicted=self._top_k,
            logits=True,
            model=self._gguf.name,
            fingerprint=self._gguf.fingerprint,
            expert_bytes=self._expert_bytes,
        )
        writer = RouteWriter(path, shape)
        self._exits.callback(writer.close)
        return writer

    def profile(self) -> npt.NDArray[np.float32] | None:
        """Use counts of earlier runs, halved: float32 [layers, experts], written back when the
        engine closes. A profile that cannot serve is refused with one line, and the run goes on
        cold; RequestError for a file that is no profile."""
        path = self._options.profile
        if path is None:
            return None
        layers, experts = self._hp.num_layers, self._experts
        fingerprint = self._gguf.fingerprint.encode()
        uses: npt.NDArray[np.float32] = np.zeros((layers, experts), np.float32)
        data = _read_profile(path)
        if data:
            try:
                uses = parse(data, fingerprint, layers, experts) * np.float32(0.5)
            except FormatError as error:
                _log.warning("profile %s is not used: %s; starting cold", path, error)

        def save() -> None:
            try:
                write_atomically(path, serialise(uses, fingerprint))
            except OSError as error:
                _log.warning("profile %s could not be written: %s", path, error)

        self._exits.callback(save)
        return uses


def _read_profile(path: Path) -> bytes:
    """Nothing where there is none yet. Another file is not to be overwritten: RequestError."""
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RequestError(f"cannot read --profile {path}: {error.strerror}") from error
    if data and not is_profile(data):
        raise RequestError(
            f"--profile {path}: the file is no profile, and would be overwritten; name another"
        )
    return data


def _given(options: EngineOptions) -> dict[str, object]:
    """The options that are not as they would be by themselves, as people write them."""
    usual = EngineOptions()
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    given = {name: value for name, value in given.items() if value != getattr(usual, name)}
    if options.dram is not None:
        given["dram"] = format_size(options.dram)
    return {name: value for name, value in given.items() if name not in ("trace", "cache_dir")}
