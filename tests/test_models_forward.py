"""What must hold for any weights: pieces equal one shot, company changes nothing, forms of a file
that mean the same give the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from harness import BACKENDS, Harness, nmse
from toy import K_TOY, Toy, tensor_plan, write_toy

from fomoe.kernels.reference import ReferenceOps

IDS = np.random.default_rng(3).integers(0, 256, 45).tolist()
FLOATS = {f"{part}_type": "F32" for part in ("dense", "gate", "up", "embed")}
TOYS = {
    "float": Toy(v_heads=6, down_types=("F32",), **FLOATS),
    "qwen35moe": Toy(mtp_layers=1, down_types=("Q5_0", "Q8_0", "F16")),
    "qwen3next": Toy(architecture="qwen3next", v_heads=6, shards=3, dense_type="BF16"),
    "qwen3moe": Toy(architecture="qwen3moe", fuse_gate_up=True, tied=True, align=4096),
    "k-quants": replace(K_TOY, layers=2, interval=2, experts=2, top_k=1),
}
# Sums may be ordered by the number of tokens. Where activations are rounded to 8 bits, as products
# with quantised weights do on the CPU, a last bit of difference can become one of these.
LIMIT, ROUNDED_LIMIT = 1e-9, 1e-2


@pytest.fixture(scope="module", params=list(TOYS))
def path(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    return write_toy(directory / f"{request.param}.gguf", TOYS[request.param])


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    return request.param


@pytest.fixture
def harness(backend, path):
    return Harness(path, BACKENDS[backend]())


@pytest.fixture
def limit(backend, path):
    return LIMIT if backend == "reference" or path.stem == "float" else ROUNDED_LIMIT


def test_prefill_in_pieces_equals_one_shot(harness, limit):
    (whole,) = harness.step([(harness.sequence(), IDS)])
    state, rows = harness.sequence(), []
    for start, end in ((0, 1), (1, 3), (3, 20), (20, 44), (44, 45)):
        rows += harness.step([(state, IDS[start:end])])
    assert np.isfinite(whole).all()
    assert whole.std() > 0.1
    assert nmse(np.concatenate(rows), whole) < limit


def test_sequences_in_one_step_equal_each_alone(harness, limit):
    prompts = [IDS[:9], IDS[9:10], IDS[10:30]]
    alone = []
    for prompt in prompts:
        state = harness.sequence(32)
        alone.append([harness.step([(state, prompt)])[0], harness.step([(state, [65])])[0]])
    states = [harness.sequence(32) for _ in prompts]
    first = harness.step(list(zip(states, prompts, strict=True)))
    second = harness.step([(state, [65]) for state in reversed(states)])[::-1]
    for (a, b), c, d in zip(alone, first, second, strict=True):
        assert nmse(c, a) < limit
        assert nmse(d, b) < limit


def test_the_cache_may_hold_half_precision(tmp_path):
    path = write_toy(tmp_path / "toy.gguf")
    full, half = (Harness(path, ReferenceOps(), cache_type=t) for t in (np.float32, np.float16))
    (a,), (b,) = (h.step([(h.sequence(), IDS)]) for h in (full, half))
    assert 0 < nmse(b, a) < 1e-4


def test_fused_and_separate_tensors_are_the_same_model(tmp_path):
    separate = Toy(mtp_layers=1)
    fused = replace(separate, fuse_qkv=True, fuse_gate_up=True, mtp_layers=0)
    rng = np.random.default_rng(0)
    values = {
        name: rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1])
        for name, shape, _ in tensor_plan(separate)
    }
    for name, _, _ in tensor_plan(fused):
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        if last == "ffn_gate_up_exps":
            parts, axis = [f"{stem}.ffn_{part}_exps.weight" for part in ("gate", "up")], 1
        elif last == "attn_qkv" and name not in values:
            parts, axis = [f"{stem}.attn_{part}.weight" for part in "qkv"], 0
        else:
            continue
        values[name] = np.concatenate([values[part] for part in parts], axis=axis)
    logits = []
    for file, toy in (("separate", separate), ("fused", fused)):
        harness = Harness(write_toy(tmp_path / file, toy, tensors=values), ReferenceOps())
        logits += harness.step([(harness.sequence(), IDS)])
    np.testing.assert_array_equal(*logits)
