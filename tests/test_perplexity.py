import asyncio
import io
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
from toy import K_TOY, write_toy

from fomoe.cli import main
from fomoe.engine import Engine
from fomoe.errors import RequestError
from fomoe.perplexity import Score, log_softmax, windows

TEXT = "the thing on the other side of there, in the ring of stones, " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", K_TOY)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def test_windows_follow_llama_perplexity():
    halves = windows(range(100), 32)
    assert [w.tokens[0] for w in halves] == [0, 32, 64]
    assert halves[0].first == 16
    assert halves[0].targets == list(range(17, 32))
    strided = windows(range(100), 32, stride=8, bos=7)
    assert [w.tokens[:2] for w in strided[:2]] == [[7, 1], [7, 9]]
    assert strided[1].targets == list(range(32, 40))
    with pytest.raises(RequestError, match="one window of -c 128 needs 128"):
        windows(range(100), 128)


def test_scores_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    p, q = (log_softmax(rng.standard_normal((9, 50)).astype(np.float32)) for _ in range(2))
    targets = rng.integers(0, 50, 9).tolist()
    score, halves = Score(), Score()
    score.add(q, targets, p)
    for part in (slice(0, 4), slice(4, 9)):
        piece = Score()
        piece.add(q[part], targets[part], p[part])
        halves.merge(piece)
    nll = -q[np.arange(9), targets].astype(np.float64)
    assert score.perplexity == pytest.approx(math.exp(nll.mean()))
    assert score.perplexity_error == pytest.approx(
        math.exp(nll.mean()) * nll.std(ddof=1) / 3, rel=1e-6
    )
    assert score.kl == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-5)
    assert halves.nll == pytest.approx(score.nll)
    assert halves.kl_max == pytest.approx(score.kl_max)
    assert halves.agreements == score.agreements


def run(capsys, *args):
    status = main(["perplexity", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_text_scores_what_its_logits_say(capsys, model, text):
    status, out, _ = run(capsys, "-m", model, "-f", text, "-c", 32, "--chunks", 2)

    async def direct():
        async with Engine.open(model, context=64) as engine:
            ids = engine.tokenizer.encode(TEXT)
            return [log_softmax(await engine.logits(ids[i : i + 32])) for i in (0, 32)], ids

    logs, ids = asyncio.run(direct())
    nll = [-logs[i][row, ids[32 * i + row + 1]] for i in (0, 1) for row in range(16, 31)]
    assert status == 0
    assert float(out.split()[2]) == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_exact_routing_against_itself_and_against_stand_ins(capsys, model, text, tmp_path):
    common = ("-m", model, "-f", text, "-c", 32, "--chunks", 3)
    assert run(capsys, *common, "--kl-base", tmp_path / "base")[0] == 0
    _, same, _ = run(capsys, *common, "--kl", tmp_path / "base")
    assert "PPL ratio = 1.00000" in same
    assert "mean KL divergence = 0.000000" in same
    assert "same first choice = 100.00" in same
    status, _, err = run(capsys, *common[:6], "--chunks", 2, "--kl", tmp_path / "base")
    assert status == 1
    assert "does not hold log-probabilities of these windows" in err


def test_an_interrupted_run_is_continued(capsys, model, text, tmp_path):
    common = ("-m", model, "-f", text, "-c", 32)
    _, whole, _ = run(capsys, *common, "--chunks", 4)
    journal = tmp_path / "journal"
    run(capsys, *common, "--chunks", 2, "--resume", journal)
    with journal.open("a") as file:
        file.write('{"tokens": 1')
    _, continued, err = run(capsys, *common, "--chunks", 4, "--resume", journal)
    assert continued == whole
    assert "[1/4]" not in err
    status, _, err = run(capsys, *common, "--resume", journal, "--stride", 8)
    assert status == 1
    assert "another model, text or setting" in err


def test_the_text_is_read_before_the_event_loop_runs(model, monkeypatch, capsys):
    class Stdin(io.TextIOWrapper):
        @property
        def buffer(self):
            with pytest.raises(RuntimeError):  # no running loop: a pipe may take its time
                asyncio.get_running_loop()
            return super().buffer

    monkeypatch.setattr("sys.stdin", Stdin(io.BytesIO(TEXT.encode())))
    assert main(["perplexity", "-m", str(model), "-c", "32", "--chunks", "1", "-t", "1"]) == 0
    assert "PPL = " in capsys.readouterr().out


def test_files_that_cannot_serve(capsys, model, text, tmp_path):
    common = ("-m", model, "-f", text, "-c", 32, "--chunks", 1)
    (tmp_path / "letter").write_text("Dear Sir or Madam")
    for flags, why in (
        (("-f", tmp_path), f"cannot read the text from {tmp_path}: Is a directory"),
        (("-f", "/nowhere"), "cannot read the text from /nowhere: No such file"),
        (("--kl", "/nowhere"), "/nowhere: No such file"),
        (("--kl", tmp_path / "letter"), "does not hold log-probabilities"),
        (("--kl-base", model), "that is the model; it would be overwritten"),
        (("--kl-base", text), "that is what is read; it would be overwritten"),
        (("--kl-base", "/nowhere/base"), "/nowhere is no folder"),
        (("--kl-base", "/dev/full"), "a device or pipe"),
        (("--resume", "/dev/zero"), "a device or pipe"),
        (("--resume", tmp_path), "a folder"),
        (("--resume", tmp_path / "letter"), "is not a file of --resume"),
        (("--kl-base", tmp_path / "one", "--resume", tmp_path / "one"), "name the same file"),
        (("--stride", 32), "--stride is from 0 to below -c, which is 32"),
        (("--stride", -1), "--stride is from 0"),
        (("-c", 3), "-c 4 or more"),
        (("--chunks", 0), "leaves no window"),
    ):
        status, out, err = run(capsys, *common, *flags)
        assert (status, out) == (1, "")
        assert [why in line for line in err.splitlines() if "error" in line] == [True]
    assert (tmp_path / "letter").read_text() == "Dear Sir or Madam"


def test_no_text(capsys, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    status, _, err = run(capsys, "-m", model)
    assert status == 1
    assert "no text: give one with -f FILE or on standard input" in err


def test_ctrl_c_is_told_in_one_line(model):
    """A background job, which these tests may be, would begin with the signal ignored."""
    program = "import signal, sys, fomoe.cli\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "sys.exit(fomoe.cli.main())"
    flags = ["perplexity", "-m", str(model), "-c", "32"]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdin.write(TEXT.encode() * 1000)
        process.stdin.close()
        process.stdin = None
        seen = b""
        while b"[2/" not in seen:
            piece = process.stderr.read(8)
            assert piece, "it ended before it was interrupted"
            seen = seen[-8:] + piece
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"PPL" not in out
    assert err.endswith(b"\nfomoe: interrupted\n")
    assert b"Traceback" not in err
