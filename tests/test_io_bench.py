"""tools/bench_io measures, and prints one line for each size and depth."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from io_rig import write_bytes

TOOL = Path(__file__).parent.parent / "tools" / "bench_io"
QUICK = ("--rounds", "1", "--seconds", "0.01", "--sizes", "256KiB", "--depths", "2")


def bench(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(TOOL), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def fake_fio(folder: Path, prints: str) -> dict[str, str]:
    """An environment with a fio that prints this, and notes its arguments in fio.log."""
    (folder / "printed").write_text(prints)
    program = folder / "fio"
    program.write_text(f'#!/bin/sh\necho "$@" >>"{folder}/fio.log"\ncat "{folder}/printed"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_table_of_rates(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", 4 << 20)
    quick = [*QUICK, "--sizes", "256KiB,1MiB", "--depths", "2,4", "--without-fio"]
    done = bench(str(tmp_path / "file"), *quick)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if " KiB " in line]
    assert [row.split()[0] for row in rows] == ["256", "256", "1024", "1024"]
    assert done.stdout.splitlines()[-1].startswith(("io_uring, ", "threads, "))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    done = bench(str(tmp_path / "absent"))
    assert done.returncode == 1
    assert "absent" in done.stderr


@pytest.mark.parametrize("file_bytes", [0, 100_000])
def test_a_file_must_hold_a_request(tmp_path: Path, file_bytes: int) -> None:
    write_bytes(tmp_path / "file", file_bytes)
    done = bench(str(tmp_path / "file"), *QUICK, "--without-fio")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"has {file_bytes} bytes, fewer than a request of 262144" in line


def test_fio_is_asked_for_as_much_time(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", 1 << 20)
    read = {"bw_bytes": 2_000_000_000, "total_ios": 1000}
    job = {"read": read, "usr_cpu": 5.0, "sys_cpu": 5.0, "job_runtime": 10}
    environment = fake_fio(tmp_path, f"a note\n{json.dumps({'jobs': [job]})}\nanother\n")
    done = bench(str(tmp_path / "file"), *QUICK, env=environment)
    assert done.returncode == 0, done.stderr
    assert "|    2.00       1 |" in done.stdout
    assert " --runtime=10ms " in (tmp_path / "fio.log").read_text()


@pytest.mark.parametrize("prints", ["", "fio-3", "{}", '{"jobs": []}', '{"jobs": [{"read": 1}]}'])
def test_a_fio_that_tells_nothing(tmp_path: Path, prints: str) -> None:
    write_bytes(tmp_path / "file", 1 << 20)
    done = bench(str(tmp_path / "file"), *QUICK, env=fake_fio(tmp_path, prints))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("bench_io: error: what fio printed is no measurement")


@pytest.mark.parametrize(
    "flags",
    [
        *(("--sizes", text) for text in ("1000", "0", "-4096", "", "x", "1MiB,", "4XiB")),
        *(("--rounds", text) for text in ("0", "-1", "x", "1" * 5000)),
        *(("--depths", text) for text in ("0", "-1", "8,", "1000000")),
        *(("--seconds", text) for text in ("0", "-1", "nan", "inf", "x")),
        *(("--read-bytes", text) for text in ("0", "1000", "-4096", "1GiB")),
        *(("--read-depth", text) for text in ("0", "-5")),
    ],
)
def test_values_that_cannot_be(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(TOOL))["parse"](["file", "=".join(flags)])
    assert refusal.value.code == 2
    assert f"argument {flags[0]}: " in capsys.readouterr().err


def test_sizes_have_the_units_that_they_have_elsewhere() -> None:
    parsed = runpy.run_path(str(TOOL))["parse"](["file", "--sizes", "1GiB,4K,8192"])
    assert parsed.sizes == [1 << 30, 4096, 8192]
