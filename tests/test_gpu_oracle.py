"""The whole forward on GpuOps against transformers' models, tiny: prefill and cached decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpu_face import GpuFace
from harness import Harness, nmse
from oracle import ORACLE_TOYS, Oracle

# Columns that are multiples of 32, and one layer of each kind that a model has.
CHANGES: dict[str, dict[str, object]] = {
    "qwen35moe": dict(layers=2, mtp_layers=0, recurrent_layers=(True, False)),
    "qwen3next": dict(layers=2, recurrent_layers=(True, False)),
    "qwen3moe": dict(layers=1),
}
# Steps of up to eight tokens compute in float32, longer ones round to bfloat16.
EXACT, ROUNDED = 1e-6, 1e-3
IDS = np.random.default_rng(7).integers(0, 256, 13).tolist()
PIECES = (4, 1, 1)


@pytest.fixture(scope="module", params=list(CHANGES))
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    wide = dict(hidden=64, shared_ff=32, v_heads=4) | CHANGES[request.param]
    model = Oracle(replace(ORACLE_TOYS[request.param], **wide))
    return model, model.write(tmp_path_factory.mktemp("oracle") / "toy.gguf")


def test_few_tokens_at_a_time(oracle: tuple[Oracle, Path]) -> None:
    model, path = oracle
    harness = Harness(path, GpuFace(32), max_tokens=32)
    state, rows, at = harness.sequence(32), [], 0
    for length in PIECES:
        rows += harness.step([(state, IDS[at : at + length])])
        at += length
    found, want = np.concatenate(rows), model.logits(IDS[:at])
    assert nmse(found, want) < EXACT
    assert (found.argmax(axis=1) == want.argmax(axis=1)).all()


def test_a_prompt_at_once_and_a_token(oracle: tuple[Oracle, Path]) -> None:
    model, path = oracle
    harness = Harness(path, GpuFace(32), max_tokens=32)
    state = harness.sequence(32)
    rows = harness.step([(state, IDS[:-1])]) + harness.step([(state, IDS[-1:])])
    error = nmse(np.concatenate(rows), model.logits(IDS))
    print(f"NMSE {error:.2e}")
    assert error < ROUNDED
