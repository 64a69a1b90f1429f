"""The forward against transformers: float32 toys of each architecture, on every backend."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from harness import BACKENDS, Harness, nmse
from oracle import ORACLE_TOYS, Oracle

from fomoe.kernels.reference import ReferenceOps
from fomoe.models import HyperParameters

LIMIT = 1e-6  # every mistake of the model specification's list costs at least 1e-2
PROMPT = 21
# Longer than a chunk of the delta rule and not a multiple of it.
IDS = np.random.default_rng(7).integers(0, 256, 75).tolist()


@pytest.fixture(scope="module", params=list(ORACLE_TOYS))
def oracle(request, tmp_path_factory):
    found = Oracle(ORACLE_TOYS[request.param])
    path = found.write(tmp_path_factory.mktemp("oracle") / f"{request.param}.gguf")
    return found, path


def check(found, truth):
    error = nmse(found, truth)
    print(f"NMSE {error:.2e}, max error {np.abs(found - truth).max():.2e}")
    assert error < LIMIT
    assert (found.argmax(axis=1) == truth.argmax(axis=1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill(oracle, backend):
    model, path = oracle
    harness = Harness(path, BACKENDS[backend](), max_tokens=len(IDS))
    (found,) = harness.step([(harness.sequence(), IDS)])
    check(found, model.logits(IDS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_decode(oracle, backend):
    model, path = oracle
    harness = Harness(path, BACKENDS[backend]())
    state, ids = harness.sequence(), IDS[: PROMPT + 12]
    rows = [harness.step([(state, ids[:PROMPT])])[0]]
    rows += [harness.step([(state, [token])])[0] for token in ids[PROMPT:]]
    check(np.concatenate(rows), model.cached_logits(ids, PROMPT))


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


def test_the_limit_would_catch_a_mistake(oracle):
    model, path = oracle
    truth = model.logits(IDS[:PROMPT])
    for mistake in ("heads", "rope", "weights") if model.toy.hybrid else ("weights",):
        harness = Harness(path, ReferenceOps(), change=partial(wrong_layers, mistake=mistake))
        (found,) = harness.step([(harness.sequence(), IDS[:PROMPT])])
        assert nmse(found, truth) > 1000 * LIMIT, mistake
