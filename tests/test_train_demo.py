"""tools/train_demo: what it trains is what the engine computes, and what it writes opens."""

from __future__ import annotations

import asyncio
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from demo_file import DemoFile
from demo_net import delta_rule, forward
from toy import Toy, write_toy

from fomoe import Engine
from fomoe.errors import UnsupportedError

TRAIN_DEMO = Path(__file__).parents[1] / "tools" / "train_demo"
MAX_NMSE = 1e-6  # the oracle's limit; a mistake in the formulas gives more than 1e-2
TEXT = "The old man looked at the sea, and the sea looked at the old man. "


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the tool with arguments; gives its status and what it printed."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", list(map(str, (TRAIN_DEMO, *arguments))))
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(TRAIN_DEMO), run_name="__main__")
        assert isinstance(exit_.value.code, int)
        return (exit_.value.code, *capsys.readouterr())

    return run


def nmse(found: npt.NDArray[np.float32], truth: npt.NDArray[np.float32]) -> float:
    return float(np.square(found - truth).sum() / np.square(truth).sum())


async def engine_logits(path: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    async with Engine.open(path, threads=1, cache_type="f32") as engine:
        return await engine.logits(ids)


def test_trained_model_opens_and_gives_the_trainers_logits(tmp_path: Path, train: Run) -> None:
    source = write_toy(tmp_path / "toy.gguf", Toy(v_heads=6, state_dim=32))
    (tmp_path / "text.txt").write_text(TEXT * 60)
    out = tmp_path / "out.gguf"
    options = (
        "--steps",
        "20",
        "--time",
        "70",
        "--batch",
        "2",
        "--rate",
        "5e-3",
        "--router-rate",
        "2",
    )
    status, printed, complaint = train(
        tmp_path / "text.txt", "--from", source, "--out", out, *options
    )
    assert status == 0, complaint
    before, after = (float(x) for x in re.findall(r"held out (\d+\.\d+)", printed))
    assert after < before - 1

    model = DemoFile.read(out)
    ids = np.random.default_rng(0).integers(0, model.shape.vocab, 150).tolist()
    with torch.no_grad():
        logits, routings = forward(model.weights, model.shape, torch.tensor([ids]))
    truth = asyncio.run(engine_logits(out, ids))
    assert nmse(logits[0].numpy(), truth) < MAX_NMSE
    assert [tuple(r.ids.shape) for r in routings] == [(150, 3)] * 4


def test_begins_with_random_weights_and_plain_products(tmp_path: Path, train: Run) -> None:
    source = write_toy(tmp_path / "toy.gguf")
    np.save(tmp_path / "ids.npy", np.arange(4000, dtype=np.uint16) % 7)
    out = tmp_path / "out.gguf"
    options = (
        "--scratch",
        "--float32",
        "--steps",
        "20",
        "--time",
        "40",
        "--batch",
        "2",
        "--rate",
        "1e-2",
    )
    status, printed, complaint = train(
        tmp_path / "ids.npy", "--from", source, "--out", out, *options
    )
    assert status == 0, complaint
    before, after = (float(x) for x in re.findall(r"held out (\d+\.\d+)", printed))
    assert before > 4  # of log(320) = 5.8: nothing is known at first
    assert after < 3


def test_quantises_with_the_program_it_is_given(tmp_path: Path, train: Run) -> None:
    source = write_toy(tmp_path / "toy.gguf")
    np.save(tmp_path / "ids.npy", np.arange(400, dtype=np.uint16) % 7)
    program = tmp_path / "quantize"
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2"\n')
    program.chmod(0o755)
    arguments = (tmp_path / "ids.npy", "--from", source, "--steps", "1", "--time", "40")
    out = tmp_path / "out-f16.gguf"
    status, printed, complaint = train(*arguments, "--out", out, "--quantize-with", program)
    assert status == 0, complaint
    assert (tmp_path / "out-q4_k_m.gguf").read_bytes() == out.read_bytes()
    assert "out-q4_k_m.gguf" in printed
    program.write_text("#!/bin/sh\necho no such type >&2; exit 3\n")
    status, _, complaint = train(*arguments, "--out", out, "--quantize-with", program)
    assert status == 1
    assert "no such type" in complaint


def test_forward_makes_its_tensors_where_the_weights_are(tmp_path: Path) -> None:
    model = DemoFile.read(write_toy(tmp_path / "toy.gguf"))
    ids = torch.arange(100)[None] % model.shape.vocab
    with torch.no_grad():
        logits, _ = forward(model.weights, model.shape, ids)
        with torch.device("meta"):  # where tensors go that are not told; they cannot be mixed
            again, _ = forward(model.weights, model.shape, ids)
    assert torch.equal(logits, again)


def test_refuses_a_text_without_a_sequence(tmp_path: Path, train: Run) -> None:
    source = write_toy(tmp_path / "toy.gguf")
    (tmp_path / "text.txt").write_text(TEXT)
    status, _, complaint = train(
        tmp_path / "text.txt", "--from", source, "--out", tmp_path / "out.gguf"
    )
    assert status == 1
    assert "too few for sequences of 512" in complaint


def test_refuses_another_architecture(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", Toy(architecture="qwen3moe"))
    with pytest.raises(UnsupportedError, match="qwen3moe cannot be trained"):
        DemoFile.read(path)


def test_chunked_delta_rule_is_the_recurrence() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 150, 8, generator=draw).double()
    k = k / k.norm(dim=-1, keepdim=True)
    decay = -torch.rand(2, 3, 150, generator=draw).double()
    beta = torch.rand(2, 3, 150, generator=draw).double()
    state, rows = torch.zeros(2, 3, 8, 8).double(), []
    for t in range(150):
        state = state * decay[..., t, None, None].exp()
        delta = beta[..., t, None] * (v[..., t, :] - (k[..., t, None, :] @ state).squeeze(-2))
        state = state + k[..., t, :, None] * delta[..., None, :]
        rows.append((q[..., t, None, :] @ state).squeeze(-2))
    torch.testing.assert_close(delta_rule(q, k, v, decay, beta), torch.stack(rows, 2))
