"""Model files of tools/train_demo: GGUF -> shape and float weights, and back as F16.

Owns: which keys make the shape, which tensors stay F32, writing by way of a temporary file. Does
not know: training. What a file says beside its weights (tokenizer, licence) is copied as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from demo_net import Shape, Weights
from gguf import GGMLQuantizationType as QType

from fomoe.errors import UnsupportedError

ARCHITECTURE = "qwen35moe"
# As llama.cpp's converter has it; vectors stay F32 too.
ALWAYS_F32 = ("ffn_gate_inp.weight", "ssm_conv1d.weight")
# Written anew by the writer, or true of the old weights only.
NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True, slots=True)
class DemoFile:
    """An opened model: its shape, its weights in float32 by GGUF name, and where it came from."""

    path: Path
    shape: Shape
    weights: Weights

    @classmethod
    def read(cls, path: Path) -> DemoFile:
        """Raises UnsupportedError for another architecture, what the gguf package raises for a
        damaged file, OSError."""
        reader = gguf.GGUFReader(path)
        architecture = _value(reader, "general.architecture")
        if architecture != ARCHITECTURE:
            raise UnsupportedError(f"{path}: {architecture} cannot be trained, only {ARCHITECTURE}")
        weights = {
            tensor.name: torch.from_numpy(
                np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            )
            for tensor in reader.tensors
        }
        return cls(path, _shape(reader, weights), weights)

    def write(self, path: Path, weights: Weights) -> None:
        """A copy of this file with other weights; matrices are F16. Raises OSError."""
        reader = gguf.GGUFReader(self.path)
        partial = path.with_name(path.name + ".partial")
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        for field in reader.fields.values():
            if not field.name.startswith(NOT_COPIED):
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, inner)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        for name, tensor in weights.items():
            array = tensor.detach().float().cpu().numpy()
            if is_matrix(name, tensor):
                writer.add_tensor(name, array.astype(np.float16), raw_dtype=QType.F16)
            else:
                writer.add_tensor(name, array, raw_dtype=QType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor may be narrowed: to F16 in a file, to bfloat16 in a product."""
    return tensor.ndim >= 2 and not name.endswith(ALWAYS_F32)


def _value(reader: gguf.GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    if field is None:
        raise UnsupportedError(f"the model file has no {key}")
    return field.contents()


def _shape(reader: gguf.GGUFReader, weights: Weights) -> Shape:
    def number(key: str) -> int:
        return int(_value(reader, f"{ARCHITECTURE}.{key}"))  # type: ignore[call-overload, no-any-return]

    def real(key: str) -> float:
        return float(_value(reader, f"{ARCHITECTURE}.{key}"))  # type: ignore[arg-type]

    if "output.weight" not in weights:
        raise UnsupportedError("a model whose output is its embedding cannot be trained")
    return Shape(
        layers=number("block_count"),
        hidden=number("embedding_length"),
        vocab=len(weights["token_embd.weight"]),
        heads=number("attention.head_count"),
        kv_heads=number("attention.head_count_kv"),
        head_dim=number("attention.key_length"),
        rope_dims=number("rope.dimension_count"),
        rope_base=real("rope.freq_base"),
        eps=real("attention.layer_norm_rms_epsilon"),
        experts=number("expert_count"),
        top_k=number("expert_used_count"),
        k_heads=number("ssm.group_count"),
        v_heads=number("ssm.time_step_rank"),
        state_dim=number("ssm.state_size"),
        conv_kernel=number("ssm.conv_kernel"),
        interval=number("full_attention_interval"),
    )
