"""tools/bench_io measures, and prints one line for each size and depth."""

import subprocess
import sys
from pathlib import Path

from io_rig import write_bytes

TOOL = Path(__file__).parent.parent / "tools" / "bench_io"


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(TOOL), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_table_of_rates(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", 4 << 20)
    quick = [
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--sizes",
        "256KiB,1MiB",
        "--depths",
        "2,4",
        "--without-fio",
    ]
    done = bench(str(tmp_path / "file"), *quick)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if " KiB " in line]
    assert [row.split()[0] for row in rows] == ["256", "256", "1024", "1024"]
    assert done.stdout.splitlines()[-1].startswith(("io_uring, ", "threads, "))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    done = bench(str(tmp_path / "absent"))
    assert done.returncode == 1
    assert "absent" in done.stderr
