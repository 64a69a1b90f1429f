"""tools/bench_peers runs programs by turns and compares what they print."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "bench_peers"


def fake_bench(path: Path, rates: dict[str, float], status: int = 0) -> Path:
    """A program that prints llama-bench's JSON, and notes its arguments in NAME.log."""
    rows = [
        {"n_prompt": 512 * (test == "pp"), "n_gen": 64 * (test == "tg"), "avg_ts": rate}
        for test, rate in rates.items()
    ]
    # Not the interpreter itself behind #!: its path may hold spaces.
    script = path.with_suffix(".py")
    script.write_text(
        f"import sys\n"
        f"open({str(path)!r} + '.log', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"print('a line of its own')\nprint({json.dumps(rows)!r})\n"
        f"print('broken', file=sys.stderr)\nsys.exit({status})\n"
    )
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    path.chmod(0o755)
    return path


def printing(path: Path, code: str) -> Path:
    """A program of this code."""
    program = fake_bench(path, {})
    program.with_suffix(".py").write_text(code)
    return program


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, "-m", "a.gguf", "-t", "2", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_compares_with_the_best_peer(tmp_path: Path) -> None:
    ours = fake_bench(tmp_path / "fomoe", {"pp": 300.0, "tg": 60.0})
    slow = fake_bench(tmp_path / "slow", {"pp": 100.0, "tg": 20.0})
    fast = fake_bench(tmp_path / "fast", {"pp": 200.0, "tg": 30.0})
    done = run(
        "--fomoe", str(ours), "--fomoe-args", "--dram 9GiB", "--rounds", "2",
        "--peer", f"slow={slow} -lm mmap", "--peer", f"fast={fast}", "--limited", "env A=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| test | fomoe | slow | fast | fomoe / best peer |" in done.stdout
    assert "| pp512 | 300.00 (300.00 to 300.00) |" in done.stdout
    assert [line.split("|")[-2].strip() for line in done.stdout.splitlines()[-2:]] == [
        "1.50",
        "2.00",
    ]
    common = "-m a.gguf -p 512 -n 64 -r 1 -o json -t 2"
    assert (tmp_path / "slow.log").read_text().splitlines() == [f"-lm mmap {common}"] * 2
    assert (tmp_path / "fomoe.log").read_text().splitlines() == [f"bench --dram 9GiB {common}"] * 2


def test_a_test_that_is_repeated_has_a_line_of_its_own(tmp_path: Path) -> None:
    ours, peer = fake_bench(tmp_path / "fomoe", {}), fake_bench(tmp_path / "peer", {})
    for program, rates in ((ours, (12.0, 30.0)), (peer, (8.0, 8.0))):
        rows = [{"n_prompt": 256, "n_gen": 0, "avg_ts": rate} for rate in rates]
        if program is ours:
            rows[1]["read_gb_per_second"] = 0.8
            rows[0]["memory_gb_per_second"] = 33.2
        program.with_suffix(".py").write_text(f"print({json.dumps(rows)!r})")
    done = run("--fomoe", str(ours), "--peer", f"peer={peer}", "--rounds", "1")
    lines = done.stdout.splitlines()
    assert lines[-5].startswith("| pp256 | 12.00 ")
    assert lines[-5].endswith("| 1.50 |")
    assert lines[-4].startswith("| pp256 again | 30.00 ")
    assert lines[-2] == "fomoe read, GB/s: pp256 again 0.80"
    assert lines[-1] == "memory before each of its runs, GB/s: 33"


@pytest.mark.parametrize("missing", [False, True])
def test_goes_on_without_a_program_that_fails(tmp_path: Path, missing: bool) -> None:
    good = fake_bench(tmp_path / "good", {"tg": 20.0})
    bad = tmp_path / "bad" if missing else fake_bench(tmp_path / "bad", {"tg": 1.0}, status=3)
    done = run("--only-peers", "--rounds", "2", "--peer", f"good={good}", "--peer", f"bad={bad}")
    assert done.returncode == 1
    assert ("No such file" if missing else "ended with 3:\nbroken") in done.stderr
    assert "| tg64 | 20.00 (20.00 to 20.00) | - | - |" in done.stdout
    assert missing or len((tmp_path / "bad.log").read_text().splitlines()) == 1


ROWS = json.dumps([{"n_prompt": 0, "n_gen": 64, "avg_ts": 20.0}])


@pytest.mark.parametrize(
    "text",
    [f"[WARN] x\n[1] y\n[] {ROWS}", f"{ROWS}\n[done]\n", f"[{{\n{ROWS}", f"\udcff{ROWS}\udcff"],
)
def test_lines_of_its_own_around_the_json(tmp_path: Path, text: str) -> None:
    data = text.encode(errors="surrogateescape")
    peer = printing(tmp_path / "peer", f"import sys; sys.stdout.buffer.write({data!r})")
    done = run("--only-peers", "--rounds", "1", "--peer", f"peer={peer}")
    assert done.returncode == 0, done.stderr
    assert "| tg64 | 20.00 (20.00 to 20.00) | - |" in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[1, 2]",
        '[{"n_prompt": 0, "n_gen": 64}]',
        '[{"avg_ts": 3}]',
        *(ROWS.replace("20.0", rate) for rate in ("null", "0", "-1", "NaN", '"x"', "1" * 400)),
        "[" * 100_000,
    ],
)
def test_what_is_no_rate_is_no_success(tmp_path: Path, text: str) -> None:
    good = fake_bench(tmp_path / "good", {"tg": 20.0})
    bad = printing(tmp_path / "bad", f"print({text!r})")
    done = run("--only-peers", "--rounds", "1", "--peer", f"bad={bad}", "--peer", f"good={good}")
    assert done.returncode == 1
    assert "printed no JSON of tests" in done.stderr
    assert "Traceback" not in done.stderr
    assert "| tg64 | - | 20.00 (20.00 to 20.00) | - |" in done.stdout


@pytest.mark.parametrize("flag", ["--peer=x='a", "--fomoe-args='a", "--limited='a"])
def test_quotes_that_are_not_closed(flag: str) -> None:
    done = run(flag)
    assert done.returncode == 2
    assert "No closing quotation" in done.stderr
    assert "Traceback" not in done.stderr


def wrapper(path: Path) -> Path:
    """A program that runs another one as its child, whose number it writes to PATH.child."""
    path.write_text(f'#!/bin/sh\n"$@" &\necho $! >"{path}.child"\nwait\n')
    path.chmod(0o755)
    return path


def is_running(pid_file: Path) -> bool:
    stat = Path("/proc") / pid_file.read_text().strip() / "stat"
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    wrapped = wrapper(tmp_path / "wrapped")
    slow = printing(tmp_path / "slow", "import time; time.sleep(60)")
    done = run(
        "--only-peers", "--timeout", "0.5", "--limited", str(wrapped), "--peer", f"slow={slow}"
    )
    assert done.returncode == 1
    assert "timed out after 0.5 seconds" in done.stderr
    assert not is_running(tmp_path / "wrapped.child")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_was_measured(tmp_path: Path, number: signal.Signals) -> None:
    good = fake_bench(tmp_path / "good", {"tg": 20.0})
    slow = printing(tmp_path / "slow", "import time; time.sleep(60)")
    wrapped = wrapper(tmp_path / "wrapped")
    # A background job, which these tests may be, would begin with the signal ignored.
    program = "import runpy, signal, sys; sys.argv = sys.argv[1:]\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "runpy.run_path(sys.argv[0], None, '__main__')"
    flags = ["-m", "a.gguf", "--only-peers", "--peer", f"good={good}"]
    flags += ["--peer", f"slow={wrapped} {slow}"]
    with subprocess.Popen(
        [sys.executable, "-c", program, str(TOOL), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        end = time.monotonic() + 30
        while not (tmp_path / "wrapped.child").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "median of 1 (range)" in out
    assert "| tg64 | 20.00 (20.00 to 20.00) | - | - |" in out
    assert "Traceback" not in errors
    assert not is_running(tmp_path / "wrapped.child")
