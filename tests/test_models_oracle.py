"""The forward against transformers: float32 toys of each architecture, on every backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from harness import BACKENDS, F32Array, Harness, nmse
from oracle import ORACLE_TOYS, Oracle

from fomoe.kernels.reference import ReferenceOps
from fomoe.models import HyperParameters

LIMIT = 1e-6  # every mistake of the model specification's list costs at least 1e-2
PROMPT = 21
# Longer than a chunk of the delta rule and not a multiple of it.
IDS = np.random.default_rng(7).integers(0, 256, 75).tolist()
DECODED = IDS[: PROMPT + 12]


@dataclass
class Truth:
    path: Path
    hybrid: bool
    prefill: F32Array  # of IDS
    decode: F32Array  # of DECODED, cached from PROMPT on


@pytest.fixture(scope="module", params=list(ORACLE_TOYS))
def truth(request, tmp_path_factory):
    model = Oracle(ORACLE_TOYS[request.param])
    return Truth(
        path=model.write(tmp_path_factory.mktemp("oracle") / f"{request.param}.gguf"),
        hybrid=model.toy.hybrid,
        prefill=model.logits(IDS),
        decode=model.cached_logits(DECODED, PROMPT),
    )


def check(found, expected):
    error = nmse(found, expected)
    print(f"NMSE {error:.2e}, max error {np.abs(found - expected).max():.2e}")
    assert error < LIMIT
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill(truth, backend):
    harness = Harness(truth.path, BACKENDS[backend]())
    (found,) = harness.step([(harness.sequence(), IDS)])
    check(found, truth.prefill)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_decode(truth, backend):
    harness = Harness(truth.path, BACKENDS[backend]())
    state = harness.sequence()
    rows = harness.step([(state, DECODED[:PROMPT])])
    rows += [harness.step([(state, [token])])[0] for token in DECODED[PROMPT:]]
    check(np.concatenate(rows), truth.decode)


def wrong_layers(hp: HyperParameters, mistake: str) -> HyperParameters:
    def wrong(layer):
        attention, delta, moe = layer.attention, layer.delta, layer.moe
        if mistake == "heads" and delta:
            delta = replace(delta, tiled=not delta.tiled)
        if mistake == "rope" and attention:
            attention = replace(attention, rope_dims=attention.head_dim)
        if mistake == "weights":
            moe = replace(moe, renormalise=False)
        return replace(layer, attention=attention, delta=delta, moe=moe)

    return replace(hp, layers=tuple(wrong(layer) for layer in hp.layers))


def test_the_limit_would_catch_a_mistake(truth):
    for mistake in ("heads", "rope", "weights") if truth.hybrid else ("weights",):
        change = partial(wrong_layers, mistake=mistake)
        harness = Harness(truth.path, ReferenceOps(), change=change)
        (found,) = harness.step([(harness.sequence(), IDS[:PROMPT])])
        assert nmse(found, truth.prefill[:PROMPT]) > 1000 * LIMIT, mistake
