"""Formats of benchmark results: llama-bench's Markdown, CSV and JSON, with columns of our own.

Owns: names and layout of what is printed. Does not know: how it was measured.
"""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TextIO

from fomoe.bench import BenchResult, decode_bytes, deviation
from fomoe.config import format_size
from fomoe.engine import Engine
from fomoe.host import processor_name
from fomoe.kernels.open_device import backend_name, card_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What all results of a run have in common."""

    model_path: Path
    model_type: str
    model_bytes: int
    num_parameters: int
    threads: int
    cpu: str
    devices: tuple[str, ...]  # that compute the layers in turn; none where the processor does
    backend: str
    gpus: str
    num_layers: int
    num_host_layers: int  # whose experts the processor computes, whatever the devices have room for
    device_budget: int  # of all devices' memory
    experts_on_devices: float  # share of the experts
    memory_budget: int
    budget_given: bool
    experts_resident: float  # share of the experts that the memory plan has slots for
    reader: str
    drive_gb_per_second: float | None  # random reads, of all drives; None: not measured
    memory_gb_per_second: float | None  # a plain read with as many threads; None: not measured
    decode_bytes: int  # of weights that a generated token touches
    tokens: str  # "random" or "text"

    @classmethod
    def of(cls, engine: Engine, threads: int, memory_rate: float | None, tokens: str) -> Run:
        gguf, plan, options = engine.loaded.gguf, engine.plan, engine.options
        num_layers, drive_rate = engine.loaded.hp.num_layers, engine.loaded.drives_bytes_per_second
        devices = tuple(device.name for device in plan.devices)
        cards = (card_name(name) for name in devices)
        return cls(
            model_path=gguf.paths[0],
            model_type=f"{gguf.architecture} {gguf.file_type_name}",
            model_bytes=gguf.nbytes,
            num_parameters=gguf.num_parameters,
            threads=threads,
            cpu=processor_name(),
            devices=devices,
            backend=", ".join(dict.fromkeys(map(backend_name, devices))) or "CPU",
            gpus=", ".join(card for card in cards if card),
            num_layers=num_layers,
            num_host_layers=num_layers if options.cpu_moe else min(options.n_cpu_moe, num_layers),
            device_budget=sum(device.budget for device in plan.devices),
            experts_on_devices=sum(device.num_slots for device in plan.devices) / plan.num_experts,
            memory_budget=plan.budget,
            budget_given=plan.budget_source == "given",
            experts_resident=plan.num_slots / plan.num_experts,
            reader=engine.loaded.reader.describe(),
            drive_gb_per_second=None if drive_rate is None else drive_rate / 1e9,
            memory_gb_per_second=None if memory_rate is None else memory_rate / 1e9,
            decode_bytes=decode_bytes(engine),
            tokens=tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """The names that llama-bench's JSON has, then this engine's own."""
        return {
            "build_version": version("fomoe"),
            "cpu_info": self.cpu,
            "gpu_info": self.gpus,
            "backends": self.backend,
            "model_filename": str(self.model_path),
            "model_type": self.model_type,
            "model_size": self.model_bytes,
            "model_n_params": self.num_parameters,
            "n_threads": self.threads,
            "n_gpu_layers": self.num_layers if self.devices else 0,
            "n_cpu_moe": self.num_host_layers,
            "devices": ",".join(self.devices) or "cpu",
            "device_memory_budget": self.device_budget,
            "experts_on_devices": self.experts_on_devices,
            "memory_budget": self.memory_budget,
            "experts_resident": self.experts_resident,
            "reader": self.reader,
            "drive_gb_per_second": self.drive_gb_per_second,
            "memory_gb_per_second": self.memory_gb_per_second,
            "decode_bytes": self.decode_bytes,
            "tokens": self.tokens,
        }


class Output(Protocol):
    """Rows are printed as soon as they are known."""

    def __init__(self, stream: TextIO) -> None: ...
    def begin(self, run: Run) -> None: ...
    def row(self, result: BenchResult) -> None: ...
    def end(self) -> None: ...


class Markdown:
    """The table for people. A figure that does not apply is a dash."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._generation: list[tuple[str, float]] = []

    def begin(self, run: Run) -> None:
        self._run = run
        budget = [("budget", 10)] * run.budget_given
        devices = [("ngl", 3), ("n_cpu_moe", 9), ("vram", 10)] if run.devices else []
        self._columns = [
            ("model", -30), ("size", 10), ("params", 10), ("backend", -7), *devices,
            ("threads", 7), *budget,
            ("test", 15), ("t/s", 20), ("cache", -5), ("hit %", 6), ("MiB/tok", 8), ("stall %", 7),
            ("read GB/s", 9),
        ]  # fmt: skip
        self._line([name for name, _ in self._columns])
        rules = ("-" * abs(w) if w < 0 else "-" * (w - 1) + ":" for _, w in self._columns)
        print("| " + " | ".join(rules) + " |", file=self._stream, flush=True)

    def row(self, result: BenchResult) -> None:
        run = self._run
        spread = deviation(result.rates)
        if not result.test.prompt:
            self._generation.append((result.test.name, statistics.fmean(result.rates)))
        self._line(
            [
                run.model_type,
                format_size(run.model_bytes),
                f"{run.num_parameters / 1e9:.2f} B",
                run.backend,
                *self._device_cells(),
                str(run.threads),
                *[format_size(run.memory_budget)] * run.budget_given,
                result.test.name,
                f"{statistics.fmean(result.rates):.2f} ± {spread:.2f}",
                result.cache,
                "-" if result.hit_rate is None else f"{100 * result.hit_rate:.1f}",
                f"{result.mib_per_token:.1f}",
                f"{100 * result.stall_share:.1f}",
                f"{result.read_gb_per_second:.2f}",
            ]
        )

    def _device_cells(self) -> list[str]:
        run = self._run
        if not run.devices:
            return []
        return [str(run.num_layers), str(run.num_host_layers), format_size(run.device_budget)]

    def end(self) -> None:
        run = self._run
        drive = "not measured"
        if run.drive_gb_per_second is not None:
            drive = f"{run.drive_gb_per_second:.2f} GB/s"
        lines = [
            "",
            f"build: fomoe {version('fomoe')}; {run.cpu}; {run.tokens} tokens;"
            f" memory for {100 * run.experts_resident:.0f} % of the experts",
            *self._device_lines(),
            f"reading with {run.reader}; the drive's random reads: {drive}",
            *self._memory_lines(),
        ]
        print(*lines, sep="\n", file=self._stream)

    def _device_lines(self) -> list[str]:
        run = self._run
        if not run.devices:
            return []
        share = 100 * run.experts_on_devices
        cards = f" ({run.gpus})" if run.gpus else ""
        return [f"on {', '.join(run.devices)}{cards}: memory for {share:.0f} % of the experts"]

    def _memory_lines(self) -> list[str]:
        """What generation made of the memory's bandwidth: of the host's, where that is all."""
        run = self._run
        limit = run.memory_gb_per_second
        if run.devices:
            return [f"a generated token touches {format_size(run.decode_bytes)} of weights"] + [
                f"{name}: {rate * run.decode_bytes / 1e9:.1f} GB/s"
                for name, rate in self._generation
            ]
        touched = f"a generated token touches {format_size(run.decode_bytes)} of weights"
        if limit is None:
            lines = [f"{touched}; the memory's rate: not measured"]
        else:
            lines = [f"{touched}; {run.threads} threads read {limit:.1f} GB/s from memory"]
        for name, rate in self._generation:
            used = rate * run.decode_bytes / 1e9
            share = "" if limit is None else f", {100 * used / limit:.0f} % of that"
            lines.append(f"{name}: {used:.1f} GB/s{share}")
        return lines

    def _line(self, cells: list[str]) -> None:
        padded = (
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, (_, width) in zip(cells, self._columns, strict=True)
        )
        print("| " + " | ".join(padded) + " |", file=self._stream, flush=True)


class Csv:
    """One line a test, all values quoted, without the samples."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
        self._has_header = False

    def begin(self, run: Run) -> None:
        self._run = run

    def row(self, result: BenchResult) -> None:
        values = self._run.to_dict() | result.to_dict()
        del values["samples_ns"], values["samples_ts"]
        if not self._has_header:
            self._has_header = True
            self._writer.writerow(values)
        self._writer.writerow(values.values())
        self._stream.flush()

    def end(self) -> None:
        pass


class JsonLines:
    """One object a line, a line a test."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, run: Run) -> None:
        self._run = run

    def row(self, result: BenchResult) -> None:
        print(json.dumps(self._run.to_dict() | result.to_dict()), file=self._stream, flush=True)

    def end(self) -> None:
        pass


class Json:
    """One array of objects."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rows: list[dict[str, Any]] = []

    def begin(self, run: Run) -> None:
        self._run = run

    def row(self, result: BenchResult) -> None:
        self._rows.append(self._run.to_dict() | result.to_dict())

    def end(self) -> None:
        json.dump(self._rows, self._stream, indent=2)
        print(file=self._stream)


FORMATS: dict[str, type[Output]] = {"md": Markdown, "csv": Csv, "json": Json, "jsonl": JsonLines}
