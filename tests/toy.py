"""Small GGUF files of the three architectures, with random weights and a tiny BPE tokenizer.

Owns: names, shapes and metadata of a toy file. Needs only the gguf package, so that tests of the
engine, of reading and of the server have a real file in a fraction of a second; tests/oracle.py
writes the weights of transformers models through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as QType

Array = npt.NDArray[np.generic]

MERGES = ("t h", "th e", "Ġ the", "i n", "e r", "Ġ a", "o n", "r e", "in g", "Ġ s", "Ġ ,", "h e")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
# The scale fields of random blocks: (byte offset, factor on the wanted standard deviation).
BLOCK_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q8_0": ((0, 1 / 74),),
    "Q4_0": ((0, 1 / 4.6),),
    "Q4_1": ((0, 1 / 4.6), (2, -7.5 / 4.6)),
    "Q5_0": ((0, 1 / 9.2),),
    "Q5_1": ((0, 1 / 9.2), (2, -15.5 / 9.2)),
    "Q2_K": ((80, 1 / 16), (82, 1 / 16)),
    "Q3_K": ((108, 1 / 43),),
    "Q4_K": ((0, 1 / 260), (2, 7.5 / 260)),
    "Q5_K": ((0, 1 / 520), (2, 15.5 / 520)),
    "Q6_K": ((208, 1 / 1370),),
    "IQ4_NL": ((0, 1 / 65),),
    "IQ4_XS": ((0, 1 / 1200),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """A toy's shape. Types fall back as llama.cpp's do when a row is not a multiple of the block.

    `down_types` are dealt out to the layers in turn. K-quants need `hidden` and `ff` of 256. With
    `align` = 4096 every expert starts on a page; `shards` > 1 writes a split file.
    """

    architecture: str = "qwen35moe"
    hidden: int = 64
    layers: int = 4
    mtp_layers: int = 0
    interval: int = 4
    recurrent_layers: tuple[bool, ...] | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rope_dims: int = 16
    experts: int = 8
    top_k: int = 3
    ff: int = 32
    shared_ff: int = 64
    k_heads: int = 2
    v_heads: int = 4
    state_dim: int = 16
    conv_kernel: int = 4
    vocab: int = 320
    context: int = 4096
    tied: bool = False
    fuse_gate_up: bool = False
    fuse_qkv: bool = False
    dense_type: str = "Q8_0"
    gate_type: str = "Q4_0"
    up_type: str = "Q4_0"
    down_types: tuple[str, ...] = ("Q5_0", "Q8_0")
    embed_type: str = "Q8_0"
    align: int = 32
    shards: int = 1

    @property
    def hybrid(self) -> bool:
        return self.architecture != "qwen3moe"

    @property
    def key_dim(self) -> int:
        return self.k_heads * self.state_dim

    @property
    def value_dim(self) -> int:
        return self.v_heads * self.state_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim

    def is_recurrent(self, layer: int) -> bool:
        if not self.hybrid or layer >= self.layers:
            return False
        if self.recurrent_layers is not None:
            return self.recurrent_layers[layer]
        return (layer + 1) % self.interval != 0


# Q4_K_M's types need rows of 256: gate and up Q4_K, down Q4_K or Q6_K.
K_TOY = Toy(
    hidden=256, ff=256, shared_ff=256, dense_type="Q4_K", gate_type="Q4_K", up_type="Q4_K",
    down_types=("Q6_K", "Q4_K"), state_dim=32, v_heads=8,
)  # fmt: skip
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}

# name, row-major shape, type name
Plan = Iterator[tuple[str, tuple[int, ...], str]]


def tensor_plan(toy: Toy) -> Plan:
    """Every tensor of the file, in order."""
    yield "token_embd.weight", (toy.vocab, toy.hidden), toy.embed_type
    yield "output_norm.weight", (toy.hidden,), "F32"
    if not toy.tied:
        yield "output.weight", (toy.vocab, toy.hidden), toy.dense_type
    for layer in range(toy.layers + toy.mtp_layers):
        for name, shape, type_name in _layer_plan(toy, layer):
            yield f"blk.{layer}.{name}", shape, type_name


def _layer_plan(toy: Toy, layer: int) -> Plan:
    yield "attn_norm.weight", (toy.hidden,), "F32"
    yield from _delta_plan(toy) if toy.is_recurrent(layer) else _attention_plan(toy)
    yield "post_attention_norm.weight" if toy.hybrid else "ffn_norm.weight", (toy.hidden,), "F32"
    yield from _ffn_plan(toy, layer)
    if layer >= toy.layers:
        yield "nextn.eh_proj.weight", (toy.hidden, 2 * toy.hidden), toy.dense_type
        for name in ("enorm", "hnorm", "shared_head_norm"):
            yield f"nextn.{name}.weight", (toy.hidden,), "F32"


def _attention_plan(toy: Toy) -> Plan:
    q_dim, kv_dim = toy.heads * toy.head_dim, toy.kv_heads * toy.head_dim
    q_rows = 2 * q_dim if toy.hybrid else q_dim
    if toy.fuse_qkv:
        yield "attn_qkv.weight", (q_rows + 2 * kv_dim, toy.hidden), toy.dense_type
    else:
        yield "attn_q.weight", (q_rows, toy.hidden), toy.dense_type
        yield "attn_k.weight", (kv_dim, toy.hidden), toy.dense_type
        yield "attn_v.weight", (kv_dim, toy.hidden), toy.dense_type
    yield "attn_q_norm.weight", (toy.head_dim,), "F32"
    yield "attn_k_norm.weight", (toy.head_dim,), "F32"
    yield "attn_output.weight", (toy.hidden, q_dim), toy.dense_type


def _delta_plan(toy: Toy) -> Plan:
    yield "attn_qkv.weight", (toy.conv_dim, toy.hidden), toy.dense_type
    yield "attn_gate.weight", (toy.value_dim, toy.hidden), toy.dense_type
    yield "ssm_conv1d.weight", (toy.conv_dim, toy.conv_kernel), "F32"
    yield "ssm_dt.bias", (toy.v_heads,), "F32"
    yield "ssm_a", (toy.v_heads,), "F32"
    if toy.architecture == "qwen3next":
        yield "ssm_ba.weight", (2 * toy.v_heads, toy.hidden), toy.dense_type
    else:
        yield "ssm_beta.weight", (toy.v_heads, toy.hidden), toy.dense_type
        yield "ssm_alpha.weight", (toy.v_heads, toy.hidden), toy.dense_type
    yield "ssm_norm.weight", (toy.state_dim,), "F32"
    yield "ssm_out.weight", (toy.hidden, toy.value_dim), toy.dense_type


def _ffn_plan(toy: Toy, layer: int) -> Plan:
    yield "ffn_gate_inp.weight", (toy.experts, toy.hidden), "F32"
    if toy.fuse_gate_up:
        yield "ffn_gate_up_exps.weight", (toy.experts, 2 * toy.ff, toy.hidden), toy.gate_type
    else:
        yield "ffn_gate_exps.weight", (toy.experts, toy.ff, toy.hidden), toy.gate_type
        yield "ffn_up_exps.weight", (toy.experts, toy.ff, toy.hidden), toy.up_type
    down_type = toy.down_types[layer % len(toy.down_types)]
    yield "ffn_down_exps.weight", (toy.experts, toy.hidden, toy.ff), down_type
    if toy.hybrid:
        yield "ffn_gate_inp_shexp.weight", (toy.hidden,), "F32"
        yield "ffn_gate_shexp.weight", (toy.shared_ff, toy.hidden), toy.dense_type
        yield "ffn_up_shexp.weight", (toy.shared_ff, toy.hidden), toy.dense_type
        yield "ffn_down_shexp.weight", (toy.hidden, toy.shared_ff), toy.dense_type


def random_tensor(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], type_name: str
) -> tuple[Array, QType]:
    """Random values of a sane size for the tensor of that name: F32 values or raw blocks."""
    if name.endswith("norm.weight"):
        return (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32), QType.F32
    if name.endswith("ssm_a"):
        return -np.exp(rng.uniform(0, 2, shape)).astype(np.float32), QType.F32
    std = 0.4 if "conv1d" in name else 1 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.5
    if name == "token_embd.weight":
        std = 1.0
    if shape[-1] % gguf.GGML_QUANT_SIZES[QType[type_name]][0]:
        type_name = FALLBACKS.get(type_name, type_name)
    qtype = QType[type_name]
    if type_name in BLOCK_SCALES or type_name == "MXFP4":
        return _random_blocks(rng, shape, qtype, std), qtype
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
    if type_name == "F16":
        return values.astype(np.float16), qtype
    return values if type_name == "F32" else gguf.quants.quantize(values, qtype), qtype


def _random_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], qtype: QType, std: float
) -> Array:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    count = int(np.prod(shape)) // block_size
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    if qtype is QType.MXFP4:
        blocks[:, 0] = round(128 + np.log2(std / 6))
    for offset, factor in BLOCK_SCALES.get(qtype.name, ()):
        field = np.frombuffer(np.float16(std * factor).tobytes(), np.uint8)
        blocks[:, offset : offset + 2] = field
    return blocks.reshape(*shape[:-1], shape[-1] // block_size * block_bytes)


def write_toy(
    path: Path,
    toy: Toy | None = None,
    *,
    seed: int = 0,
    tensors: Mapping[str, npt.NDArray[np.float32]] | None = None,
    extra: Mapping[str, npt.NDArray[np.float32]] | None = None,
    keys: Mapping[str, int | float | str | list[int] | None] | None = None,
) -> Path:
    """Write the file, with `tensors` (every name of the plan) as F32 instead of random weights.

    `extra` tensors are appended as they are; `keys` replace metadata, None drops it. Returns the
    path to open: `path`, or with shards the first of `<stem>-0000i-of-0000n.gguf`.
    """
    toy = toy or Toy()
    rng = np.random.default_rng(seed)
    plan = list(tensor_plan(toy))
    limit = -(-(len(plan) + len(extra or {})) // toy.shards) if toy.shards > 1 else 0
    writer = begin_file(path, toy, split_max_tensors=limit)
    for key, value in (keys or {}).items():
        _replace_key(writer, key, value)
    for name, shape, type_name in plan:
        if tensors is not None:
            assert tensors[name].shape == shape, (name, tensors[name].shape, shape)
            writer.add_tensor(name, np.ascontiguousarray(tensors[name], np.float32))
        else:
            data, qtype = random_tensor(rng, name, shape, type_name)
            writer.add_tensor(name, data, raw_dtype=qtype)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    paths: list[Path] = writer.format_shard_names(path)
    writer.close()
    return paths[0]


def begin_file(path: Path, toy: Toy, *, split_max_tensors: int = 0) -> gguf.GGUFWriter:
    """A writer that has all of the file but its tensors."""
    writer = gguf.GGUFWriter(path, toy.architecture, split_max_tensors=split_max_tensors)
    if toy.align != 32:
        writer.add_custom_alignment(toy.align)
    _add_metadata(writer, toy)
    _add_tokenizer(writer, toy)
    return writer


def _add_metadata(writer: gguf.GGUFWriter, toy: Toy) -> None:
    writer.add_name("toy")
    writer.add_file_type(0)
    writer.add_quantization_version(2)
    writer.add_block_count(toy.layers + toy.mtp_layers)
    writer.add_context_length(toy.context)
    writer.add_embedding_length(toy.hidden)
    writer.add_head_count(toy.heads)
    writer.add_head_count_kv(toy.kv_heads)
    writer.add_key_length(toy.head_dim)
    writer.add_value_length(toy.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(toy.experts)
    writer.add_expert_used_count(toy.top_k)
    writer.add_expert_feed_forward_length(toy.ff)
    if toy.mtp_layers:
        writer.add_uint32(f"{toy.architecture}.nextn_predict_layers", toy.mtp_layers)
    if toy.hybrid:
        _add_hybrid_metadata(writer, toy)
    else:
        writer.add_feed_forward_length(toy.ff * toy.top_k)


def _add_hybrid_metadata(writer: gguf.GGUFWriter, toy: Toy) -> None:
    writer.add_expert_shared_feed_forward_length(toy.shared_ff)
    writer.add_rope_dimension_count(toy.rope_dims)
    if toy.architecture == "qwen35moe":
        writer.add_rope_dimension_sections(rope_sections(toy))
    writer.add_ssm_conv_kernel(toy.conv_kernel)
    writer.add_ssm_state_size(toy.state_dim)
    writer.add_ssm_group_count(toy.k_heads)
    writer.add_ssm_time_step_rank(toy.v_heads)
    writer.add_ssm_inner_size(toy.value_dim)
    writer.add_uint32(f"{toy.architecture}.full_attention_interval", toy.interval)
    if toy.recurrent_layers is not None:
        key = f"{toy.architecture}.attention.recurrent_layers"
        writer.add_array(key, [*toy.recurrent_layers, *[False] * toy.mtp_layers])


def _replace_key(
    writer: gguf.GGUFWriter, key: str, value: int | float | str | list[int] | None
) -> None:
    writer.kv_data[0].pop(key, None)
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_uint32(key, value)


def rope_sections(toy: Toy) -> list[int]:
    """Rotated pairs whose position is time, height and width: dealt out in turn."""
    pairs = toy.rope_dims // 2
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]


def _add_tokenizer(writer: gguf.GGUFWriter, toy: Toy) -> None:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = [alphabet[b] for b in range(256)]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    types = [int(gguf.TokenType.NORMAL)] * len(tokens)
    first_special = len(tokens)
    tokens += SPECIALS
    types += [int(gguf.TokenType.CONTROL)] * len(SPECIALS)
    padding = toy.vocab - len(tokens)
    assert padding >= 0, "a toy's vocabulary holds at least 256 bytes, the merges and the specials"
    tokens += [f"[PAD{i}]" for i in range(padding)]
    types += [int(gguf.TokenType.UNUSED)] * padding
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35" if toy.architecture == "qwen35moe" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(first_special + SPECIALS.index("<|im_end|>"))
    writer.add_pad_token_id(first_special)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
