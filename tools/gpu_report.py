"""What tools/gpu_check found: a JSON file that is written as it goes, and a table of it.

Owns: the file and the table's text. Does not know: how anything is measured. What was not measured
is said to be so, with the reason.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

Part = dict[str, Any]
# What is aimed at: kernels of one token, of the rate of copies; a token's time, of its bound.
KERNEL_SHARE = 0.75
MOST_HERE, MOST_MISSING = 1.3, 1.15


class Report:
    """`data`, saved after every change: a run that is killed keeps what it had found."""

    def __init__(self, path: Path, **data: Any) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.data: Part = {"failures": [], "skipped": [], "seconds": {}, **data}

    def add(self, part: Part, to: Part | None = None) -> None:
        """Lists of `part` are appended to, objects updated, other values set."""
        with self._lock:
            target = self.data if to is None else to
            for key, value in part.items():
                if isinstance(value, list):
                    target[key] = target.get(key, []) + value
                elif isinstance(value, dict):
                    target[key] = target.get(key, {}) | value
                else:
                    target[key] = value
            self._save()

    def failed(self, step: str, message: str) -> None:
        self.add({"failures": [{"step": step, "message": message}]})

    def skipped(self, step: str, reason: str) -> None:
        self.add({"skipped": [{"step": step, "reason": reason}]})

    def _save(self) -> None:
        beside = self._path.with_name(self._path.name + ".new")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self._path)


def table(report: Part) -> str:
    """All of it as Markdown."""
    sections = [
        _troubles(report),
        _device_lines(report),
        _check_lines(report),
        _kernel_lines(report),
        _file_lines(report),
        _run_lines(report.get("runs", [])),
        _memory_lines(report.get("runs", [])),
        _launch_lines(report.get("runs", [])),
        _target_lines(report),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _troubles(report: Part) -> list[str]:
    lines = [
        f"FAILED: {f['step']}: {f['message'].strip().splitlines()[-1]}" for f in report["failures"]
    ]
    return lines + [f"not measured: {s['step']}: {s['reason']}" for s in report["skipped"]]


def _device_lines(report: Part) -> list[str]:
    device, limits = report.get("device"), report.get("limits")
    if not device:
        return []
    versions = f"torch {device['torch']}, Triton {device['triton']}, {device['arch']}"
    lines = [f"{device['name']}: {versions}"]
    if limits:
        lines.append(
            f"copies on it {limits['copy_gb_per_second']:.0f} GB/s (read and written), to it from"
            f" pinned memory {limits['to_device_gb_per_second']:.1f}, from it"
            f" {limits['to_host_gb_per_second']:.1f}; bfloat16 products"
            f" {limits['bf16_tflops']:.0f} TFLOP/s"
        )
    return lines


def _check_lines(report: Part) -> list[str]:
    lines = []
    tests = report.get("tests")
    if tests:
        lines.append(f"kernels against plain references: {tests['passed']} tests passed")
        lines[0] += "".join(f"; FAILED: {name}" for name in tests.get("failed", []))
    for how, found in report.get("engine", {}).items():
        lines.append(
            f"engine against the processor, {how}: mean KL divergence {found['kl']:.6f} nats,"
            f" perplexity x {found['ratio']:.4f}, same first choice {found['same_first']:.1f} %"
            f" ({found['verdict']})"
        )
    return lines


def _kernel_lines(report: Part) -> list[str]:
    if not report.get("kernels") or "limits" not in report:
        return []
    copy = report["limits"]["copy_gb_per_second"]
    tflops = report["limits"]["bf16_tflops"]
    lines = [
        "| kernel | type | GB/s | of the copy rate | prompt TFLOP/s | of the card's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in report["kernels"]:
        speed, many = row.get("gb_per_second"), row.get("prompt_tflops")
        one = ("-", "-") if speed is None else (f"{speed:.0f}", f"{speed / copy:.0%}")
        two = ("-", "-") if many is None else (f"{many:.1f}", f"{many / tflops:.0%}")
        name = row["kernel"] + (f" FAILED: {row['error']}" if "error" in row else "")
        lines.append(f"| {' | '.join((name, row['type'], *one, *two))} |")
    return lines


def _file_lines(report: Part) -> list[str]:
    file = report.get("file")
    if not file:
        return []
    if "name" in file:
        return [f"the model: {file['name']}"]
    text = f"the model: qwen3.5-397b shapes, {file['layers']} of 60 layers ({file['because']})"
    if "bytes" in file:
        text += f", {file['bytes'] / 1e9:.1f} GB"
    return [text]


def _run_lines(runs: list[Part]) -> list[str]:
    lines = [
        "| device memory | CAR | tokens/s | read MiB/token | copied MiB/token | bound ms/token |"
        " time over bound | prompt tokens/s | bound s | time over bound |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        cells = [run["vram"], run["car"], *_generation_cells(run), *_prompt_cells(run)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if runs else []


def _generation_cells(run: Part) -> list[str]:
    found = run.get("generation")
    if not found:
        return ["-"] * 5
    return [
        f"{found['tokens_per_second']:.2f}",
        f"{found['read_bytes_per_token'] / 2**20:.1f}",
        f"{found['copied_bytes_per_token'] / 2**20:.1f}",
        _bound(found["bound_seconds"], 1e3),
        _ratio(found["seconds_over_bound"]),
    ]


def _prompt_cells(run: Part) -> list[str]:
    found = run.get("prompt", {})
    if "tokens_per_second" not in found:
        return [f"- ({found['not measured']})" if found else "-", "-", "-"]
    return [
        f"{found['tokens_per_second']:.0f}",
        _bound(found["bound_seconds"], 1),
        _ratio(found["seconds_over_bound"]),
    ]


def _bound(seconds: Part, scale: float) -> str:
    name, most = max(seconds.items(), key=lambda item: float(item[1]))
    return f"{scale * most:.1f} ({name.replace('_', ' ')})"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _launch_lines(runs: list[Part]) -> list[str]:
    names = ("kernels", "launches", "graph launches", "copies", "busy us", "idle us")
    lines = [
        f"| a layer of a token, profiled | {' | '.join(names)} | median gap, us |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for run in runs:
        what, found = f"{run['vram']}, CAR {run['car']}", run.get("launches")
        if not found or "not measured" in found:
            reason = found["not measured"] if found else "the run ended before"
            lines.append(f"| {what}: not measured: {reason} |" + " - |" * (len(names) + 1))
            continue
        cells = [f"{found[name]:.1f}" for name in (*names, "median gap us")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines if runs else []


def _memory_lines(runs: list[Part]) -> list[str]:
    lines = []
    for run in runs:
        found = run.get("memory", {})
        if "used_bytes" in found:
            used, planned = found["used_bytes"] / 2**30, found["planned_bytes"] / 2**30
            lines.append(
                f"{run['vram']}, CAR {run['car']}: {used:.2f} GiB of the card's memory are used,"
                f" {planned:.2f} were planned"
            )
    return lines


def _target_lines(report: Part) -> list[str]:
    """What was aimed at, and what it has come to."""
    lines = []
    if "limits" in report:
        copy = report["limits"]["copy_gb_per_second"]
        shares = {
            f"{row['kernel']} {row['type']}": row["gb_per_second"] / copy
            for row in report.get("kernels", [])
            if "gb_per_second" in row
        }
        slow = [f"{name} {share:.0%}" for name, share in shares.items() if share < KERNEL_SHARE]
        if shares:
            text = f"not reached by {', '.join(slow)}" if slow else "reached by all"
            lines.append(f"aim: kernels at {KERNEL_SHARE:.0%} of the copy rate: {text}")
    for run in report.get("runs", []):
        found = run.get("generation", {})
        ratio = found.get("seconds_over_bound")
        if ratio is None:
            continue
        here = found.get("all_on_device", False)
        most, what = (MOST_HERE, "all experts there") if here else (MOST_MISSING, "with misses")
        lines.append(
            f"aim: {run['vram']}, CAR {run['car']}: a token within {most} of its bound ({what}):"
            f" {ratio:.2f}, {'reached' if ratio <= most else 'not reached'}"
        )
    return lines
