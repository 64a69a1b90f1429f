"""tools/gpu_check without a GPU: every step at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_check"


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-P", TOOL, "--dry-run", "--work", tmp_path, "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["failures"] == []
    assert {k["kernel"] for k in report["rates"]["kernels"]} == {
        "matvec",
        "moe, one token",
        "moe, prompt",
    }
    assert len(report["models"]) == 2
    assert all(run["tokens_per_second"] > 0 for run in report["models"])
    assert "| Q4_K |" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
