"""Tiny random models of transformers, and their GGUF files: the oracle of the forward.

Owns: a toy's shape as a transformers model with every weight random (defaults such as norms of one
hide mistakes), and what conversion to GGUF changes, as llama.cpp's converter does. Importing it
imports torch and transformers, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from toy import Toy, random_tensor, rope_sections, tensor_plan, write_toy
from transformers import (
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

Array = npt.NDArray[np.float32]
Tensors = dict[str, Array]

# More V heads than K heads in threes (grouped and tiled differ), RoPE on half of a head.
ORACLE_TOYS = {
    "qwen35moe": Toy(
        architecture="qwen35moe", vocab=304, hidden=48, layers=5, mtp_layers=1, v_heads=6,
        recurrent_layers=(True, False, True, True, False), shared_ff=24,
    ),
    "qwen3next": Toy(
        architecture="qwen3next", vocab=304, hidden=48, layers=4, v_heads=6, shared_ff=24,
    ),
    "qwen3moe": Toy(
        architecture="qwen3moe", vocab=304, hidden=48, layers=3, fuse_qkv=True, fuse_gate_up=True
    ),
}  # fmt: skip


class Oracle:
    """A model of transformers, randomised, in float32 with eager attention."""

    def __init__(self, toy: Toy, seed: int = 0) -> None:
        torch.set_num_threads(1)  # models this small only lose by more
        self.toy = toy
        self._model = _model(toy).eval()
        _randomise(self._model, np.random.default_rng(seed))

    def logits(self, ids: list[int]) -> Array:
        """Logits [n, vocab] of all tokens at once."""
        with torch.inference_mode():
            out = self._model(torch.tensor([ids]), use_cache=False)
        return np.asarray(out.logits[0])

    def cached_logits(self, ids: list[int], prompt: int) -> Array:
        """The same by a prefill of `prompt` tokens and cached decoding of the others."""
        with torch.inference_mode():
            out = self._model(torch.tensor([ids[:prompt]]), use_cache=True)
            rows = [out.logits[0]]
            for token in ids[prompt:]:
                past = out.past_key_values
                out = self._model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
                rows.append(out.logits[0])
        return np.concatenate([np.asarray(row) for row in rows])

    def write(self, path: Path) -> Path:
        """The GGUF of the model, F32; MTP blocks, which the model lacks, are random."""
        tensors = dict(self._converted())
        rng = np.random.default_rng(1)
        for name, shape, _ in tensor_plan(self.toy):
            if name.startswith(f"blk.{self.toy.layers}."):
                tensors[name] = random_tensor(rng, name, shape, "F32")[0].astype(np.float32)
        return write_toy(path, self.toy, tensors=tensors)

    def _converted(self) -> Iterator[tuple[str, Array]]:
        state = {name: np.asarray(value) for name, value in self._model.state_dict().items()}
        yield "token_embd.weight", state["model.embed_tokens.weight"]
        yield "output.weight", state["lm_head.weight"]
        yield "output_norm.weight", state["model.norm.weight"] + self._norm_offset
        for layer in range(self.toy.layers):
            prefix = f"model.layers.{layer}."
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            for name, value in self._layer(part, layer):
                yield f"blk.{layer}.{name}", value

    @property
    def _norm_offset(self) -> int:
        """The hybrids' norms are zero-centred in transformers; GGUF holds the factor itself."""
        return 1 if self.toy.hybrid else 0

    def _layer(self, part: Tensors, layer: int) -> Iterator[tuple[str, Array]]:
        offset = self._norm_offset
        ffn_norm = "post_attention_norm.weight" if self.toy.hybrid else "ffn_norm.weight"
        yield "attn_norm.weight", part["input_layernorm.weight"] + offset
        yield ffn_norm, part["post_attention_layernorm.weight"] + offset
        yield "ffn_gate_inp.weight", part["mlp.gate.weight"]
        gate_up = part["mlp.experts.gate_up_proj"]
        if self.toy.fuse_gate_up:
            yield "ffn_gate_up_exps.weight", gate_up
        else:
            yield "ffn_gate_exps.weight", gate_up[:, : self.toy.ff]
            yield "ffn_up_exps.weight", gate_up[:, self.toy.ff :]
        yield "ffn_down_exps.weight", part["mlp.experts.down_proj"]
        if self.toy.hybrid:
            yield "ffn_gate_inp_shexp.weight", part["mlp.shared_expert_gate.weight"][0]
            for name in ("gate", "up", "down"):
                yield f"ffn_{name}_shexp.weight", part[f"mlp.shared_expert.{name}_proj.weight"]
        if not self.toy.is_recurrent(layer):
            yield from self._attention(part)
        elif self.toy.architecture == "qwen35moe":
            yield from self._tiled_delta(part)
        else:
            yield from self._grouped_delta(part)

    def _attention(self, part: Tensors) -> Iterator[tuple[str, Array]]:
        qkv = [part[f"self_attn.{name}_proj.weight"] for name in "qkv"]
        if self.toy.fuse_qkv:
            yield "attn_qkv.weight", np.concatenate(qkv)
        else:
            yield from zip(("attn_q.weight", "attn_k.weight", "attn_v.weight"), qkv, strict=True)
        yield "attn_output.weight", part["self_attn.o_proj.weight"]
        yield "attn_q_norm.weight", part["self_attn.q_norm.weight"] + self._norm_offset
        yield "attn_k_norm.weight", part["self_attn.k_norm.weight"] + self._norm_offset

    def _grouped_delta(self, part: Tensors) -> Iterator[tuple[str, Array]]:
        """qwen3next: qkvz is laid out by K head in transformers, by kind in GGUF."""
        toy = self.toy
        by_head = part["linear_attn.in_proj_qkvz.weight"].reshape(toy.k_heads, -1, toy.hidden)
        v_rows = toy.value_dim // toy.k_heads
        ends = [toy.state_dim, 2 * toy.state_dim, 2 * toy.state_dim + v_rows]
        q, k, v, z = (a.reshape(-1, toy.hidden) for a in np.split(by_head, ends, axis=1))
        yield "attn_qkv.weight", np.concatenate([q, k, v])
        yield "attn_gate.weight", z
        yield "ssm_ba.weight", part["linear_attn.in_proj_ba.weight"]
        yield "ssm_conv1d.weight", part["linear_attn.conv1d.weight"][:, 0]
        yield "ssm_a", -np.exp(part["linear_attn.A_log"])
        yield "ssm_dt.bias", part["linear_attn.dt_bias"]
        yield "ssm_norm.weight", part["linear_attn.norm.weight"]
        yield "ssm_out.weight", part["linear_attn.out_proj.weight"]

    def _tiled_delta(self, part: Tensors) -> Iterator[tuple[str, Array]]:
        """qwen35moe: V heads are grouped by K head in transformers, tiled in GGUF."""
        keys = 2 * self.toy.key_dim
        qkv = part["linear_attn.in_proj_qkv.weight"]
        conv = part["linear_attn.conv1d.weight"][:, 0]
        yield "attn_qkv.weight", np.concatenate([qkv[:keys], self._tile(qkv[keys:])])
        yield "attn_gate.weight", self._tile(part["linear_attn.in_proj_z.weight"])
        yield "ssm_beta.weight", self._tile(part["linear_attn.in_proj_b.weight"])
        yield "ssm_alpha.weight", self._tile(part["linear_attn.in_proj_a.weight"])
        yield "ssm_conv1d.weight", np.concatenate([conv[:keys], self._tile(conv[keys:])])
        yield "ssm_a", self._tile(-np.exp(part["linear_attn.A_log"]))
        yield "ssm_dt.bias", self._tile(part["linear_attn.dt_bias"])
        yield "ssm_norm.weight", part["linear_attn.norm.weight"]
        yield "ssm_out.weight", self._tile(part["linear_attn.out_proj.weight"].T).T

    def _tile(self, rows: Array) -> Array:
        """Rows of V heads from order [K head][V head of it] to [V head of it][K head]."""
        group = self.toy.v_heads // self.toy.k_heads
        by_head = rows.reshape(self.toy.k_heads, group, -1, *rows.shape[1:])
        return by_head.swapaxes(0, 1).reshape(rows.shape)


def _model(toy: Toy) -> torch.nn.Module:
    common = {
        "vocab_size": toy.vocab,
        "hidden_size": toy.hidden,
        "num_hidden_layers": toy.layers,
        "num_attention_heads": toy.heads,
        "num_key_value_heads": toy.kv_heads,
        "head_dim": toy.head_dim,
        "num_experts": toy.experts,
        "num_experts_per_tok": toy.top_k,
        "moe_intermediate_size": toy.ff,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "attn_implementation": "eager",
    }
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
    if not toy.hybrid:
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, rope_parameters=rope))
    rope["partial_rotary_factor"] = toy.rope_dims / toy.head_dim
    recurrent = [toy.is_recurrent(i) for i in range(toy.layers)]
    hybrid = common | {
        "shared_expert_intermediate_size": toy.shared_ff,
        "linear_num_key_heads": toy.k_heads,
        "linear_num_value_heads": toy.v_heads,
        "linear_key_head_dim": toy.state_dim,
        "linear_value_head_dim": toy.state_dim,
        "linear_conv_kernel_dim": toy.conv_kernel,
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent],
    }
    if toy.architecture == "qwen3next":
        return Qwen3NextForCausalLM(Qwen3NextConfig(**hybrid, rope_parameters=rope))
    del hybrid["norm_topk_prob"]
    rope |= {"mrope_section": rope_sections(toy)[:3], "mrope_interleaved": True}
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**hybrid, rope_parameters=rope))


def _randomise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Weights that keep activations of order one, and none at a telling default."""
    zero_centred = not isinstance(model, Qwen3MoeForCausalLM)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        noise = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            centre = 0 if zero_centred and "linear_attn" not in name else 1
            values = centre + 0.3 * noise
        elif name.endswith("A_log"):
            values = rng.uniform(-1, 1.5, shape)
        elif name.endswith(("dt_bias", "embed_tokens.weight")):
            values = noise
        elif "conv1d" in name:
            values = 0.5 * noise
        else:
            values = noise / np.sqrt(shape[-1])
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
