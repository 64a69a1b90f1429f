"""`fomoe generate` as people use it: what it prints where, how it ends, how it fails."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from toy import K_TOY, write_toy

from fomoe.cli import main

PROGRAM = [sys.executable, "-P", "-c", "import sys, fomoe.cli; sys.exit(fomoe.cli.main())"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", K_TOY)


@pytest.fixture
def generate(model, capfd):
    """Runs the command; gives status, stdout and stderr."""

    def run(*flags):
        flags = [str(f) for f in flags]
        flags += [] if "-m" in flags else ["-m", str(model)]
        status = main(["generate", "-c", "64", "--temp", "0", "--ignore-eos", *flags])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run


def fails(result, *, out=""):
    """The one line that a failure is told in."""
    status, printed, errors = result
    assert status == 1
    assert printed == out
    lines = [line for line in errors.splitlines() if line.startswith("fomoe: ")]
    assert len(lines) == 1
    assert "Traceback" not in errors
    return lines[0]


def test_text_goes_to_stdout_and_figures_to_stderr(generate):
    status, out, errors = generate("-p", "the ring", "-n", 6)
    assert status == 0
    assert out.startswith("the ring")
    assert len(out) > len("the ring\n")
    assert "memory plan" in errors
    assert "generation  5 tokens" in errors
    assert "the ring" not in errors


def test_what_stand_ins_cost_is_shown_while_text_streams(generate, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    flags = ("-p", "the ring", "-n", 6, "--cache-share", 0.25)
    _, _, errors = generate(*flags, "--car", "max-rank:1,16", "--car-audit", 1)
    titles = re.findall("\033]0;([^\a]*)\a", errors)
    assert "of the picks substituted" in titles[0]
    assert errors.index("\033[23;0t") < errors.index("generation ")
    assert "\033" not in generate(*flags)[2]


def test_prompts_come_from_a_file_and_from_standard_input(generate, tmp_path, monkeypatch):
    expected = generate("-p", "the ring", "-n", 4)[1]
    (tmp_path / "prompt").write_text("the ring")
    assert generate("-f", tmp_path / "prompt", "-n", 4)[1] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the ring")))
    assert generate("-n", 4)[1] == expected


def test_json_is_all_that_stdout_gets(generate):
    status, out, _ = generate("-p", "the ring", "-n", 5, "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["prompt"], result["finish_reason"]) == ("the ring", "length")
    assert len(result["tokens"]) == 5
    assert result["stats"]["generation"]["tokens"] == 4


def test_no_tokens_and_as_many_as_fit(generate):
    assert generate("-p", "the ring", "-n", 0)[:2] == (0, "the ring\n")
    result = json.loads(generate("-p", "the ring", "-n", -1, "--json")[1])
    assert result["stats"]["prompt"]["tokens"] + len(result["tokens"]) == 64


def test_the_same_seed_gives_the_same_text(generate):
    drawn = ["-p", "the", "-n", 8, "--temp", 2, "--top-k", 0, "--top-p", 1, "--min-p", 0]
    texts = [generate(*drawn, "-s", seed)[1] for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["-p", ""], "no tokens"),
        (["-p", "x" * 64], "64 tokens, the context holds 64: shorten the prompt or raise -c"),
        (["-p", "\udcff"], "not Unicode"),
        (["-p", "x", "-n", "-2"], "-n must be"),
        (["-p", "x", "--dram", "1MiB"], "needs .* MiB.*--dram"),
        (["-p", "x", "--dram", "0"], "positive"),
        (["-p", "x", "-c", "0"], "context must be"),
        (["-p", "x", "-c", "1000000000000"], "shorten the context"),
        (["-p", "x", "-ub", "0"], "ubatch must be"),
        (["-p", "x", "-t", "-1"], "threads must be"),
        (["-p", "x", "-t", "100000"], "threads must be 1 to 4096"),
        (["-p", "x", "--temp", "nan"], "temperature must be"),
        (["-p", "x", "--top-p", "1.5"], "top_p must be"),
        (["-p", "x", "--repeat-penalty", "inf"], "repeat_penalty must be"),
        (["-p", "x", "--presence-penalty", "nan"], "presence_penalty must be"),
        (["-p", "x", "--seed", "-2"], "seed must be"),
        (["-p", "x", "--cache-policy", "best"], "no cache policy 'best'; there are"),
        (["-p", "x", "--car", "maybe"], "CAR rule 'maybe' is not one of"),
        (["-p", "x", "--trace", "/nowhere/t"], "--trace /nowhere/t: /nowhere is no folder"),
        (["-p", "x", "--record-routes", "/nowhere/r"], "/nowhere is no folder"),
        (["-p", "x", "--profile", "/nowhere/p"], "/nowhere is no folder"),
        (["-p", "x", "--profile", "."], "a folder; name a file in it"),
        (["-p", "x", "--profile", "/dev/zero"], "a device or pipe; name a file"),
        (["-f", "."], "cannot read the prompt from .: Is a directory"),
        (["-p", "x", "--replica", "/nowhere"], "replica /nowhere: no such file or folder"),
        (["-f", "/nowhere"], "cannot read the prompt from /nowhere: No such file"),
        (["-p", "x", "-m", "/nowhere.gguf"], "/nowhere.gguf: No such file"),
        (["-p", "x", "-m", "."], "not a file; give the model's .gguf file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(generate, flags, why):
    result = generate(*flags)
    assert re.search(why, fails(result))


def test_threads_that_the_system_does_not_start(model):
    limited = ("sh", "-c", 'ulimit -v 2097152; exec "$@"', "sh")  # the stacks alone take more
    done = subprocess.run(
        [*limited, *PROGRAM, "generate", "-m", str(model), "-p", "x", "-c", "64", "-t", "1000"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    why = fails((done.returncode, done.stdout, done.stderr))
    assert "1000 compute threads could not be started: take fewer (-t)" in why


def test_files_that_are_no_models(generate, model, tmp_path):
    data = bytearray(model.read_bytes())
    path = tmp_path / "bad.gguf"

    def failure(content):
        path.write_bytes(content)
        line = fails(generate("-p", "x", "-m", path))
        return line

    assert "not a GGUF" in failure(b"")
    assert "not a GGUF" in failure(b"hello, world" * 10)
    assert "bad.gguf" in failure(data[:1000])
    assert "truncated" in failure(data[: len(data) // 2])
    other = data.replace(b"qwen35moe", b"qwen99moe")
    assert "'qwen99moe' is not supported; fomoe runs qwen35moe" in failure(other)
    path.unlink()
    os.mkfifo(path)
    assert "not a file" in fails(generate("-p", "x", "-m", path))


def test_a_prompt_that_is_not_text(generate, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_bytes(b"a\xff")
    assert "is not UTF-8 text" in fails(generate("-f", tmp_path / "prompt"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\x80\x81")))
    assert "standard input is not UTF-8" in fails(generate())
    monkeypatch.setattr("sys.stdin", None)
    assert "no prompt: give one with -p" in fails(generate())


def test_outputs_that_would_do_harm(generate, model, tmp_path):
    size = model.stat().st_size
    for flag in ("--record-routes", "--profile", "--trace"):
        assert "that is the model" in fails(generate("-p", "x", flag, model))
    both = tmp_path / "both"
    assert "name the same file" in fails(
        generate("-p", "x", "--profile", both, "--record-routes", both)
    )
    assert model.stat().st_size == size


def test_a_replica_that_differs(generate, model, tmp_path):
    other = bytearray(model.read_bytes())
    other[-1] ^= 1
    (tmp_path / "copy.gguf").write_bytes(other)
    assert "differs from" in fails(generate("-p", "x", "--replica", tmp_path / "copy.gguf"))


def test_io_uring_that_is_refused(generate, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("fomoe.io.open.UringReader", refused)
    line = fails(generate("-p", "x", "--io", "uring"))
    assert "io_uring is forbidden here" in line
    assert "--io threads" in line
    status, _, errors = generate("-p", "x", "-n", 1)
    assert status == 0
    assert "reading with threads" in errors


@pytest.mark.parametrize(
    "flags",
    [
        ["--nonsense"],
        ["--dram", "lots"],
        ["--dram", "9" * 400],
        ["-n", "many"],
        ["--io", "fast"],
        ["-p", "x", "-f", "y"],
        ["--prom", "x"],
    ],
)
def test_bad_usage(generate, flags, capfd):
    with pytest.raises(SystemExit) as exit_:
        generate(*flags)
    assert exit_.value.code == 2
    captured = capfd.readouterr()
    assert "usage: fomoe" in captured.err
    assert captured.out == ""


def start(model, *flags, stdout=None):
    """With `stdout`, a descriptor, the program prints there from the command on."""
    prelude = f"import os, fomoe; os.dup2({stdout}, 1)\n" if stdout else ""
    return subprocess.Popen(
        [
            *PROGRAM[:-1],
            prelude + PROGRAM[-1],
            "generate",
            "-m",
            str(model),
            "--ignore-eos",
            "--temp",
            "0",
            *flags,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[stdout] if stdout else (),
    )


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_streams_that_the_caller_has_closed(model, closed):
    program = shlex.join([*PROGRAM, "generate", "-m", str(model), "-p", "the ring", "-n", "2"])
    done = subprocess.run(["sh", "-c", f"exec {program} {closed}"], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert (b"the ring" in done.stdout) == ("1>&-" not in closed)
    assert (b"generation  " in done.stderr) == ("2>&-" not in closed)
    assert b"generation  " not in done.stdout


def wait_for(stream, text):
    seen = b""
    while text not in seen:
        piece = os.read(stream.fileno(), 4096)
        assert piece, seen
        seen += piece
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_generation_and_keeps_its_text(model, number):
    with start(model, "-p", "the ring", "-n", "-1", "-c", "60000") as process:
        text = wait_for(process.stdout, b"the ring")
        while len(text) < 300:
            text += os.read(process.stdout.fileno(), 4096)
        process.send_signal(number)
        out, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert (text + out).endswith(b"\n")
        assert b"generation  " in errors
        assert b"Traceback" not in errors


def test_a_signal_while_loading(model):
    """Loading is slowed down by a model on a pipe's pace: the plan is printed before it begins."""
    slow = "import fomoe.processor as p, asyncio\n"
    slow += "async def load(self, *_): await asyncio.sleep(60)\n"
    slow += "p.DenseWeights.load = load\n"
    program = [*PROGRAM[:-1], slow + PROGRAM[-1]]
    with subprocess.Popen(
        [*program, "generate", "-m", str(model), "-p", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        wait_for(process.stderr, b"experts per token")
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert b"interrupted while loading" in errors
        assert b"Traceback" not in errors


def test_a_second_signal_ends_the_program_at_once(model):
    """Also when the first one's clean end is stuck, as on a drive that hangs."""
    stuck = "import fomoe.engine as e, asyncio\n"
    stuck += "async def close(self): await asyncio.sleep(60)\n"
    stuck += "e.Engine.close = close\n"
    with subprocess.Popen(
        [*PROGRAM[:-1], stuck + PROGRAM[-1], "generate", "-m", str(model), "-p", "the ring"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        wait_for(process.stdout, b"the ring")
        process.send_signal(signal.SIGINT)
        wait_for(process.stderr, b"generation  ")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("module", ["fomoe.cli", "fomoe.engine"])
def test_ctrl_c_while_modules_are_imported(module):
    """A background job, which these tests may be, would begin with the signal ignored."""
    program = "import signal, sys, time\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "class Slow:\n"
    program += "    def find_spec(self, name, *_):\n"
    program += f"        if name == {module!r}:\n"
    program += "            print('importing', flush=True), time.sleep(60)\n"
    program += "sys.meta_path.insert(0, Slow())\n"
    program += "from fomoe.start import main\nsys.exit(main())"
    command = [sys.executable, "-P", "-c", program, "generate", "-p", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(process.stdout, b"importing\n")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode in (130, -signal.SIGINT)
        assert errors in (b"", b"\nfomoe: interrupted\n")


def test_the_library_leaves_signals_alone():
    program = "import signal\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "import fomoe\n"
    program += "assert set(fomoe.__all__) <= set(dir(fomoe))\n"
    program += "assert [getattr(fomoe, n).__name__ for n in fomoe.__all__] == fomoe.__all__\n"
    program += "assert not hasattr(fomoe, 'Motor')\n"
    program += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_nobody_reads_what_is_printed(model, json_flag):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with start(model, "-p", "x", "-n", "20", *json_flag, stdout=writing) as process:
            _, errors = process.communicate(timeout=30)
    finally:
        os.close(writing)
    assert process.returncode == 141
    assert b"Error" not in errors
    assert b"Exception" not in errors


def test_a_full_disk(model):
    with open("/dev/full", "wb") as full:
        process = start(model, "-p", "x", "-n", "2", stdout=full.fileno())
    with process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"fomoe: error: No space left on device" in errors
    assert b"Exception" not in errors
