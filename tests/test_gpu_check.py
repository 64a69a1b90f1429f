"""tools/gpu_check without a GPU: every step at tiny sizes; what it plans, keeps and prints."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import gpu_file
import gpu_pack
import pytest
from gpu_launches import figures
from gpu_parts import PartError, Processes
from gpu_report import Report, table

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_check"


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", TOOL, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = check("--dry-run", "--work", tmp_path, "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["failures"] == report["skipped"] == []
    assert report["tests"] == {"passed": 1, "failed": []}
    kernels = [k["kernel"] for k in report["kernels"]]
    assert kernels == ["matvec", "moe, one token", "moe, prompt"]
    assert len(report["engine"]) == 4
    assert all(found["kl"] < 1e-3 for found in report["engine"].values())
    assert [run["car"] for run in report["runs"]] == ["off", "on"]
    for run in report["runs"]:
        assert run["generation"]["tokens_per_second"] > 0
        assert run["prompt"]["tokens_per_second"] > 0
        assert run["generation"]["all_on_device"]
        assert run["launches"] == run["memory"] == {"not measured": "there is no GPU"}
    assert "| Q4_K |" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_without_a_gpu_there_is_one_line(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = check("--work", tmp_path, "--out", tmp_path / "report.json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gpu_check: torch ")
    assert "sees no GPU" in done.stderr
    assert done.stderr.count("\n") == 1


def test_as_many_layers_as_there_is_room_and_time_for() -> None:
    rates = gpu_file.Rates(write=1e9, read=2e9)
    by_disk = gpu_file.choose(int(30e9), rates, 100, 100)
    assert by_disk.layers == 6
    assert gpu_file.num_bytes(gpu_file.shapes(6)) < 30e9 - gpu_file.LEFT_FREE
    assert by_disk.because == "what the disk holds, 30 GB being free"
    assert gpu_file.choose(int(90e9), rates, 30, 100).because.startswith("what is written at 1.00")
    assert gpu_file.choose(int(90e9), rates, 100, 10).because.startswith("what is read at 2.00")
    whole = gpu_file.choose(int(900e9), gpu_file.Rates(write=9e9, read=9e9), 100, 100)
    assert (whole.layers, whole.because) == (60, "the whole model")
    assert gpu_file.choose(int(5e9), rates, 100, 100).layers < gpu_file.LEAST


def test_a_written_file_has_what_was_planned(tmp_path: Path, monkeypatch: Any) -> None:
    from toy import K_TOY

    from fomoe.gguf import GgufFile

    monkeypatch.setattr(gpu_file, "LARGE", K_TOY)
    shape = gpu_file.shapes(3)
    assert shape.recurrent_layers == (True, True, False)
    gpu_file.write(tmp_path / "model.gguf", shape)
    found = GgufFile.open(tmp_path / "model.gguf")
    tensors = found.tensors.values()
    assert sum(t.nbytes for t in tensors) == pytest.approx(gpu_file.num_bytes(shape), rel=0.05)
    assert found.experts(2) is not None
    data = (tmp_path / "model.gguf").read_bytes()
    offsets = [found.tensors[f"blk.{i}.ffn_gate_inp.weight"].offset for i in range(3)]
    contents = {data[offset : offset + 64] for offset in offsets}
    assert len(contents) == 3


def trace(*kernels: tuple[float, float], calls: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    made = [{"ph": "X", "cat": "kernel", "name": "k", "ts": b, "dur": d} for b, d in kernels]
    made += [{"ph": "X", "cat": "cuda_runtime", "name": name, "ts": 0, "dur": 1} for name in calls]
    return [*made, {"ph": "X", "cat": "gpu_memcpy", "name": "m", "ts": 0, "dur": 9}, {"ph": "M"}]


def test_launches_and_gaps() -> None:
    # Two kernels side by side, one after 3 us, one after 5 more.
    events = trace(
        (10, 4), (12, 5), (20, 2), (27, 3),
        calls=("cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync"),
    )  # fmt: skip
    assert figures(events, tokens=1, layers=2) == {
        "tokens": 1,
        "kernels": 2.0,
        "launches": 1.0,
        "graph launches": 0.5,
        "copies": 0.5,
        "busy us": 6.0,
        "idle us": 4.0,
        "median gap us": 4.0,
    }
    assert figures([], 1, 1) == {"not measured": "torch's profiler saw no kernels on the card"}


def test_what_a_process_had_said_is_kept_when_its_time_is_over(tmp_path: Path) -> None:
    code = """if True:
        import json, subprocess, sys, time
        print(json.dumps({"kernels": [1]}), flush=True)
        print("text", flush=True)
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
    """
    report, run = Report(tmp_path / "report.json"), {"vram": "any"}
    report.add({"runs": [run]})
    processes = Processes(tmp_path, {})
    with pytest.raises(PartError, match=r"text\n+stopped after 1 s: no time was left"):
        processes.run("-c", code, seconds=1, tell=lambda part: report.add(part, run))
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["kernels"] == [1]
    processes.stop()
    with pytest.raises(PartError, match="stopped"):
        processes.run("-c", "", seconds=1)


class Recorded(Processes):
    """What would be run, and what it would say."""

    def __init__(self, said: dict[str, list[dict[str, Any]]]) -> None:
        self.environment: dict[str, str] = {}
        self.ran: list[tuple[str, ...]] = []
        self._said = said

    def run(self, *arguments: str | Path, seconds: float, tell: Any = None) -> str:
        self.ran.append(tuple(map(str, arguments)))
        for part in self._said.get(str(arguments[0]), []):
            tell(part)
        return ""


def tool() -> Any:
    """tools/gpu_check as a module."""
    loader = SourceFileLoader("gpu_check", str(TOOL))
    spec = spec_from_loader("gpu_check", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_what_is_no_number_is_no_success() -> None:
    module, text = (
        tool(),
        "mean KL divergence = {} nats\nPPL ratio = 1.001\nsame first choice = 99 %",
    )
    assert module.figures(text.format("0.0001"))["verdict"] == "as it should be"
    for kl in ("0.02", "nan", "inf"):
        assert module.figures(text.format(kl))["verdict"].startswith("more than 0.01 nats")
    with pytest.raises(PartError, match="no figures in: mean"):
        module.figures("mean")


def planned(tmp_path: Path, **changes: Any) -> Any:
    """A check of a card with 20 GiB free, and what it would run of a model of 1 MB."""
    module = tool()
    arguments = {
        "dry_run": False, "minutes": 10, "out": tmp_path / "report.json", "vram": "24GiB,16GiB",
        "dram": None,
    } | changes  # fmt: skip
    made = module.Check(argparse.Namespace(**arguments), tmp_path)
    made.device = "cuda:0"
    made.report.add({"device": {"free_bytes": 20 << 30}, "limits": {"copy_gb_per_second": 1.0}})
    made.processes = Recorded({"tools/gpu_models.py": [{"generation": {"tokens": 8}}]})
    (tmp_path / "model.gguf").write_bytes(bytes(1 << 20))
    made.runs(tmp_path / "model.gguf")
    return made


def test_runs_are_those_that_the_card_has_room_for(tmp_path: Path) -> None:
    made = planned(tmp_path)
    data = made.report.data
    assert [(run["vram"], run["car"]) for run in data["runs"]] == [
        ("16GiB", "off"), ("16GiB", "on"), ("all", "off"),
    ]  # fmt: skip
    assert all(run["generation"] == {"tokens": 8} for run in data["runs"])
    assert data["skipped"] == [
        {"step": "runs with 24GiB", "reason": "the card has 20.0 GiB free"},
    ]
    ran = made.processes.ran
    assert ["--vram" in arguments for arguments in ran] == [True, True, False]
    # The first one compiles the kernels; the last one has what is left.
    seconds = [float(a[a.index("--seconds") + 1]) for a in ran]
    assert seconds == pytest.approx([320, 595, 595], abs=2)


def test_runs_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    data = planned(tmp_path, minutes=0.5).report.data
    assert [skipped["step"] for skipped in data["skipped"]] == [
        "runs with 24GiB", "run 16GiB, CAR off", "run 16GiB, CAR on", "run all, CAR off",
    ]  # fmt: skip
    assert data["skipped"][1]["reason"] == "30 s were left"
    assert "runs" not in data


def test_the_table_says_what_is_missing_and_why(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json", device={
        "name": "Card", "torch": "2", "triton": "3", "arch": "sm_90",
    }, limits={
        "copy_gb_per_second": 1000.0, "to_device_gb_per_second": 50.0,
        "to_host_gb_per_second": 40.0, "bf16_tflops": 500.0,
    })  # fmt: skip
    report.failed("kernels", "a\nb\n1 tests failed, 3 passed")
    report.skipped("run 16GiB, CAR on", "7 s were left")
    report.add(
        {
            "kernels": [
                {"kernel": "matvec", "type": "Q4_K", "gb_per_second": 800.0},
                {"kernel": "matvec", "type": "Q5_K", "error": "RuntimeError: no"},
            ],
            "runs": [
                {"vram": "16GiB", "car": "off", "prompt": {"not measured": "too long"}},
                {
                    "vram": "24GiB",
                    "car": "off",
                    "generation": {
                        "tokens_per_second": 5.0,
                        "read_bytes_per_token": 2 << 20,
                        "copied_bytes_per_token": 1 << 20,
                        "bound_seconds": {"drive": 0.1, "link": 0.01, "device_memory": 0.02},
                        "seconds_over_bound": 2.0,
                    },
                    "memory": {"planned_bytes": 24 << 30, "used_bytes": 25 << 30},
                    "launches": {"not measured": "no library"},
                },
            ],
        }
    )
    text = table(report.data)
    assert "FAILED: kernels: 1 tests failed, 3 passed" in text
    assert "not measured: run 16GiB, CAR on: 7 s were left" in text
    assert "| matvec | Q4_K | 800 | 80% | - | - |" in text
    assert "| matvec FAILED: RuntimeError: no | Q5_K | - | - | - | - |" in text
    assert "| 24GiB | off | 5.00 | 2.0 | 1.0 | 100.0 (drive) | 2.00 | - | - | - |" in text
    assert "- (too long)" in text
    assert "24GiB, CAR off: not measured: no library" in text
    assert "25.00 GiB of the card's memory are used, 24.00 were planned" in text
    assert "aim: kernels at 75% of the copy rate: reached by all" in text
    assert "a token within 1.15 of its bound (with misses): 2.00, not reached" in text


def test_what_is_carried_has_a_limit(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "one.whl").write_bytes(bytes(3 << 20))
    assert "3.0 MiB in 1 files, of 64 MiB" in gpu_pack.described(tmp_path)
    monkeypatch.setattr(gpu_pack, "MOST_BYTES", 2 << 20)
    with pytest.raises(SystemExit, match=r"too much to carry; the largest: one.whl \(3.0 MiB\)"):
        gpu_pack.described(tmp_path)
