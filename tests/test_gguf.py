"""Opening GGUF files: what a sound one says, and what is said of damaged ones."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

from fomoe.demo import DEMO_MODEL
from fomoe.errors import FormatError, UnsupportedError
from fomoe.gguf import ByteRange, GgufFile


def write(path: Path, *, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A small file with one key of every kind and these tensors (F32), or a layer of experts."""
    writer = gguf.GGUFWriter(path, "toy")
    writer.add_name("a toy")
    writer.add_block_count(3)
    writer.add_float32("toy.eps", 1e-6)
    writer.add_bool("toy.flag", True)
    writer.add_array("toy.strings", ["a", "", "ß" * 300])
    writer.add_array("toy.numbers", [1, 2, 3])
    writer.add_array("toy.bools", [True, False])
    writer.add_string("toy.long", "x" * 3_000_000)
    rng = np.random.default_rng(0)
    for name, data in (tensors or experts(rng)).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def experts(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"gate": (5, 16, 32), "up": (5, 16, 32), "down": (5, 32, 16)}
    return {
        f"blk.1.ffn_{name}_exps.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def test_metadata(tmp_path: Path) -> None:
    model = GgufFile.open(write(tmp_path / "m.gguf"))
    assert (model.architecture, model.name) == ("toy", "a toy")
    assert model.arch_value("block_count", int) == 3
    assert model.value("toy.eps", float) == pytest.approx(1e-6)
    assert model.value("toy.flag", bool) is True
    assert model.value("toy.long", str) == "x" * 3_000_000
    assert model.array("toy.strings") == ["a", "", "ß" * 300]
    assert model.numbers("toy.numbers").tolist() == [1, 2, 3]
    assert model.numbers("toy.bools").dtype == np.bool_
    assert model.value("toy.none", int, None) is None
    assert model.file_type_name == "unknown"


@pytest.mark.parametrize("strings", [[""], ["a"], ["", ""], ["a\0b", "\0", ""], ["é" * 5000] * 300])
def test_arrays_of_strings(tmp_path: Path, strings: list[str]) -> None:
    """Among them such as hold the NUL at which joined strings are split, and megabytes."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "toy")
    writer.add_array("first", strings)
    writer.add_array("second", strings[::-1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = GgufFile.open(tmp_path / "m.gguf")
    assert model.strings("first") == strings
    assert model.strings("second") == strings[::-1]


def test_keys_of_the_wrong_kind(tmp_path: Path) -> None:
    model = GgufFile.open(write(tmp_path / "m.gguf"))
    with pytest.raises(FormatError, match=r"m\.gguf: the required key toy\.none is missing"):
        model.arch_value("none", int)
    with pytest.raises(FormatError, match=r"toy\.eps: int expected, not float"):
        model.value("toy.eps", int)
    with pytest.raises(FormatError, match=r"toy\.flag: int expected, not bool"):
        model.value("toy.flag", int)
    with pytest.raises(FormatError, match=r"toy\.numbers: int expected, not array"):
        model.value("toy.numbers", int)
    with pytest.raises(FormatError, match="array of strings expected"):
        model.strings("toy.numbers")
    with pytest.raises(FormatError, match="array of numbers expected"):
        model.numbers("toy.strings")


def test_expert_slices_are_the_experts(tmp_path: Path) -> None:
    tensors = experts(np.random.default_rng(0))
    model = GgufFile.open(write(tmp_path / "m.gguf"))
    data = (tmp_path / "m.gguf").read_bytes()
    assert model.experts(0) is None
    for expert in range(5):
        ranges = model.expert_ranges(1, expert)
        for r, want in zip(ranges, tensors.values(), strict=True):
            assert data[r.offset : r.offset + r.nbytes] == want[expert].tobytes()


def test_fused_experts(tmp_path: Path) -> None:
    gate_up = np.zeros((5, 32, 32), np.float32)
    down = np.zeros((5, 32, 16), np.float32)
    model = GgufFile.open(
        write(
            tmp_path / "m.gguf",
            tensors={"blk.0.ffn_gate_up_exps.weight": gate_up, "blk.0.ffn_down_exps.weight": down},
        )
    )
    first, last = model.expert_ranges(0, 0), model.expert_ranges(0, 4)
    assert [r.nbytes for r in first] == [gate_up[0].nbytes, down[0].nbytes]
    assert last[0] == ByteRange(0, first[0].offset + 4 * gate_up[0].nbytes, gate_up[0].nbytes)


def test_experts_that_do_not_fit(tmp_path: Path) -> None:
    tensors = experts(np.random.default_rng(0))
    tensors["blk.1.ffn_up_exps.weight"] = np.zeros((4, 16, 32), np.float32)
    model = GgufFile.open(write(tmp_path / "m.gguf", tensors=tensors))
    with pytest.raises(FormatError, match=r"ffn_up_exps.*does not fit"):
        model.experts(1)
    del tensors["blk.1.ffn_up_exps.weight"]
    model = GgufFile.open(write(tmp_path / "m2.gguf", tensors=tensors))
    with pytest.raises(FormatError, match=r"ffn_up_exps\.weight is missing"):
        model.experts(1)


def test_agrees_with_the_gguf_package() -> None:
    ours, theirs = GgufFile.open(DEMO_MODEL), gguf.GGUFReader(DEMO_MODEL)
    assert len(ours.tensors) == len(theirs.tensors)
    for t in theirs.tensors:
        info = ours.tensors[t.name]
        assert info.type.id == t.tensor_type
        assert info.offset == t.data_offset
        assert info.nbytes == t.n_bytes
        shape = [int(n) for n in t.shape]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        assert info.shape == tuple(reversed(shape))
    assert (
        ours.strings("tokenizer.ggml.tokens") == theirs.fields["tokenizer.ggml.tokens"].contents()
    )
    assert ours.file_type_name == "Q4_K - Medium"
    assert ours.num_parameters == 30_243_760


def test_quantised_tensors(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "toy")
    data = np.arange(3 * 2 * 144, dtype=np.uint8).reshape(3, 288)
    writer.add_tensor("w", data, raw_dtype=QType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = GgufFile.open(tmp_path / "m.gguf").tensor("w")
    assert (info.type.name, info.shape, info.nbytes) == ("Q4_K", (3, 512), 864)
    assert info.offset % 32 == 0


def test_fingerprint_follows_the_content_not_the_name(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf")
    c = write(tmp_path / "c.gguf", tensors={"w": np.zeros((4, 4), np.float32)})
    assert GgufFile.open(a).fingerprint == GgufFile.open(b).fingerprint
    assert GgufFile.open(a).fingerprint != GgufFile.open(c).fingerprint


def test_imports_neither_gguf_nor_torch() -> None:
    code = "import fomoe.gguf, sys; print(sorted({'gguf', 'torch'} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines()[-1] == "[]"  # an editable build may print before


def test_unsupported_type_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "toy")
    writer.add_tensor("w", np.zeros((1, 66), np.uint8), raw_dtype=QType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"tensor w .*IQ2_XXS.*supported: F32, F16"):
        GgufFile.open(tmp_path / "m.gguf")
