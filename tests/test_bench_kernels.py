"""tools/bench_kernels: what it prints, and what it refuses."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "bench_kernels"
QUICK = ("--types", "Q4_0", "--tokens", "1,2", "--repeat", "1", "--cols", "256")


def bench(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(TOOL), *args]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


def test_a_line_for_each_type() -> None:
    done = bench(*QUICK, "--stream-mib", "1")
    assert done.returncode == 0, done.stderr
    title, *rows = done.stdout.splitlines()
    assert title.endswith("G/s @1     G/s @2")
    assert all(row.startswith("Q4_0 ") for row in rows)


def test_nobody_reads_what_is_printed() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = bench(*QUICK, "--stream-mib", "1", stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(
    "flags",
    [
        *(f"--tokens={text}" for text in ("x", "0", "-1", "", "1,", "1" * 5000)),
        *(f"--cols={text}" for text in ("0", "100", "-256", "x")),
        "--repeat=0",
        *(f"--stream-mib={text}" for text in ("0", "-1")),
        "--types=F32 --stream-mib=1",
        "--types=Q9",
        "--isas=",
    ],
)
def test_values_that_cannot_be(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(TOOL))["parse"](flags.split(" "), ["AVX2"])
    assert refusal.value.code == 2
    assert "error: " in capsys.readouterr().err
