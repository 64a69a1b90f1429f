"""Hyper-parameters from files: what is read, what is refused and in which words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from harness import Harness
from toy import K_TOY, Toy, write_toy

from fomoe.errors import FomoeError, FormatError, UnsupportedError
from fomoe.gguf import GgufFile
from fomoe.kernels.reference import ReferenceOps
from fomoe.kernels.table import Q4_K, Q6_K
from fomoe.models import architectures, buffer_bytes, describe

OPTIONAL_KEYS = (
    "attention.scale",
    "expert_weights_scale",
    "rope.scaling.type",
    "nextn_predict_layers",
)


@pytest.fixture
def described(tmp_path):
    def describe_toy(toy=None, **write_options):
        return describe(GgufFile.open(write_toy(tmp_path / "toy.gguf", toy, **write_options)))

    return describe_toy


def test_qwen35moe(described):
    hp = described(replace(K_TOY, mtp_layers=1))
    assert (hp.architecture, hp.num_layers, hp.num_mtp_layers) == ("qwen35moe", 4, 1)
    assert (hp.hidden, hp.vocab_size, hp.context_length) == (256, 320, 4096)
    assert [bool(p.delta) for p in hp.layers] == [True, True, True, False]
    assert [p.attention is None for p in hp.layers] == [True, True, True, False]
    assert [p.moe.down_type for p in hp.layers] == [Q6_K, Q4_K, Q6_K, Q4_K]
    attention, delta = hp.layers[3].attention, hp.layers[0].delta
    assert attention.gated
    assert (attention.rope_dims, attention.head_dim) == (16, 32)
    assert attention.scale == pytest.approx(32**-0.5)
    assert delta.tiled
    assert (delta.k_heads, delta.v_heads, delta.conv_dim) == (2, 8, 384)
    moe = hp.layers[0].moe
    assert (moe.top_k, moe.num_experts, hp.layers[0].shared_ff) == (3, 8, 256)
    assert not hp.tied_head
    assert "output.weight" in hp.dense_tensors
    assert "token_embd.weight" not in hp.dense_tensors
    assert not [n for n in hp.dense_tensors if "exps" in n or n.startswith("blk.4.")]


def test_a_tied_head_needs_the_embedding(described):
    hp = described(Toy(architecture="qwen3moe", tied=True))
    assert hp.tied_head
    assert "token_embd.weight" in hp.dense_tensors
    assert not hp.layers[0].attention.gated
    assert hp.layers[0].shared_ff == 0


def test_the_list_of_recurrent_layers_wins(described):
    toy = Toy(recurrent_layers=(False, True, True, False), mtp_layers=1)
    assert [bool(p.delta) for p in described(toy).layers] == [False, True, True, False]


def test_mtp_blocks_are_told_without_their_key(described):
    hp = described(Toy(mtp_layers=2), keys={"qwen35moe.nextn_predict_layers": None})
    assert (hp.num_layers, hp.num_mtp_layers) == (4, 2)


def test_widths_may_be_arrays_or_follow_from_others(described):
    array = {"qwen3next.expert_feed_forward_length": [32] * 4}
    assert described(Toy(architecture="qwen3next"), keys=array).layers[2].moe.ff == 32
    absent = {"qwen3moe.expert_feed_forward_length": None}
    assert described(Toy(architecture="qwen3moe"), keys=absent).layers[0].moe.ff == 32


def test_buffers_are_what_was_announced(tmp_path):
    class Counting(ReferenceOps):
        num_bytes = 0

        def buffer(self, rows, cols):
            self.num_bytes += 4 * rows * cols
            return super().buffer(rows, cols)

    ops = Counting()
    harness = Harness(write_toy(tmp_path / "toy.gguf"), ops, max_tokens=100)
    assert ops.num_bytes == buffer_bytes(harness.hp, 100)


@pytest.mark.parametrize(
    ("architecture", "key", "value", "error", "words"),
    [
        ("qwen35moe", "general.architecture", "llama", UnsupportedError, "llama.*qwen35moe"),
        ("qwen35moe", "general.architecture", "outline", UnsupportedError, "'outline' is not"),
        ("qwen35moe", "qwen35moe.block_count", None, FormatError, "block_count"),
        ("qwen35moe", "qwen35moe.block_count", 0, FormatError, "at least 1"),
        ("qwen35moe", "qwen35moe.block_count", 5, FormatError, "blk.4.attn_norm.weight"),
        ("qwen35moe", "qwen35moe.block_count", 3, UnsupportedError, "blk.3"),
        ("qwen35moe", "qwen35moe.nextn_predict_layers", 4, FormatError, "prediction"),
        ("qwen35moe", "qwen35moe.embedding_length", 96, FormatError, "shape"),
        ("qwen35moe", "qwen35moe.expert_used_count", 9, FormatError, "9 of 8"),
        ("qwen35moe", "qwen35moe.rope.dimension_count", 64, FormatError, "64 of 32"),
        ("qwen35moe", "qwen35moe.ssm.inner_size", 100, FormatError, "inner size"),
        ("qwen35moe", "qwen35moe.attention.value_length", 16, UnsupportedError, "value_length"),
        ("qwen3moe", "qwen3moe.rope.scaling.type", "yarn", UnsupportedError, "yarn.*RoPE scaling"),
        ("qwen3moe", "qwen3moe.expert_gating_func", 2, UnsupportedError, "router"),
        ("qwen3moe", "qwen3moe.attention.head_count_kv", 3, FormatError, "3 kv heads"),
    ],
)
def test_refused_keys(described, architecture, key, value, error, words):
    with pytest.raises(error, match=words):
        described(Toy(architecture=architecture), keys={key: value})


@pytest.mark.parametrize("architecture", architectures())
def test_no_key_can_do_harm(tmp_path, architecture):
    """Whatever a key says: hyper-parameters, or an error that is meant for the user."""
    toy = Toy(architecture=architecture, mtp_layers=1)
    gguf = GgufFile.open(write_toy(tmp_path / "toy.gguf", toy))
    metadata, messages = dict(gguf.metadata), []
    keys = {key for key in metadata if key.startswith(architecture)}
    for key in keys | {f"{architecture}.{name}" for name in OPTIONAL_KEYS}:
        for value in (0, 1, 3, -1, 2**32 - 1, 2**63, 0.0, 1e-30, float("nan"), "x", True, None):
            gguf.metadata = metadata | {key: value}
            if value is None:
                del gguf.metadata[key]
            try:
                describe(gguf)
            except FomoeError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all(str(tmp_path) in message for message in messages)


@pytest.mark.parametrize(
    ("architecture", "name", "words"),
    [
        ("qwen3next", "blk.0.ssm_in.weight", "early layout"),
        ("qwen3moe", "blk.1.attn_q.bias", "attn_q.bias is not known"),
        ("qwen3moe", "rope_freqs.weight", "rope_freqs"),
    ],
)
def test_refused_tensors(described, architecture, name, words):
    extra = {name: np.zeros(32, np.float32)}
    with pytest.raises(UnsupportedError, match=words):
        described(Toy(architecture=architecture), extra=extra)


def test_architectures():
    assert architectures() == ["qwen35moe", "qwen3moe", "qwen3next"]
