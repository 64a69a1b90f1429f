"""Damaged and hostile GGUF files: a clear FormatError, never a crash, a hang or much memory."""

import contextlib
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from fomoe.errors import FomoeError, FormatError, UnsupportedError
from fomoe.gguf import ArrayRef, GgufFile

ROUNDS = 1500  # of each kind of damage
F32, Q4_K, STRING, ARRAY, U32 = 0, 12, 8, 9, 4


def string(text: bytes | str) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, ne: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    return (
        string(name) + struct.pack(f"<I{len(ne)}Q", len(ne), *ne) + struct.pack("<iQ", kind, offset)
    )


def file(
    keys: list[bytes], tensors: list[bytes], data: bytes = b"\0" * 256, *, version: int = 3
) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(keys))
    header = head + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


ARCH = key("general.architecture", STRING, string("toy"))


def refused(path: Path, data: bytes, match: str, error: type[FomoeError] = FormatError) -> None:
    path.write_bytes(data)
    with pytest.raises(error, match=match) as caught:
        GgufFile.open(path)
    assert str(path) in str(caught.value)


def test_versions_2_and_3(tmp_path: Path) -> None:
    for version in (2, 3):
        path = tmp_path / f"v{version}.gguf"
        path.write_bytes(file([ARCH], [tensor("w", (4, 2, 1, 1))], version=version))
        model = GgufFile.open(path)
        assert model.architecture == "toy"
        assert model.tensor("w").shape == (2, 4)
        assert model.tensor("w").offset == len(file([ARCH], [tensor("w", (4, 2, 1, 1))])) - 256


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not a GGUF"),
        (b"GGU", "not a GGUF"),
        (b"GGML" + bytes(100), "not a GGUF"),
        (b"GGUF\3\0\0\0", "truncated"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**40, 0) + bytes(64), "absurd number of tensors"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63) + bytes(64), "absurd number of keys"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 9) + bytes(64), "absurd number of keys"),
        (file([ARCH, ARCH], []), "occurs twice"),
        (file([key("", U32, bytes(4))], []), "a key is empty"),
        (file([key("\ud800".encode("utf-8", "surrogatepass").decode("latin1"), 77, b"")], []),
         "unknown value type 77"),
        (file([string(b"\xff\xfe") + bytes(8)], []), "not UTF-8"),
        (file([struct.pack("<Q", 2**62) + bytes(8)], []), "absurd length"),
        (file([key("k", STRING, struct.pack("<Q", 2**40))], []), "absurd length"),
        (file([key("k", ARRAY, struct.pack("<IQ", STRING, 2**61))], []), "absurd or truncated"),
        (file([key("k", ARRAY, struct.pack("<IQ", U32, 2**62))], []), "absurd or truncated"),
        (file([key("k", ARRAY, struct.pack("<IQ", 99, 1))], []), "unknown element type 99"),
        (file([key("k", ARRAY, struct.pack("<IQQ", STRING, 2, 2**64 - 8))], []), "truncated"),
        (file([key("k", ARRAY, struct.pack("<IQQ", STRING, 2, 2**63 - 1))], []), "truncated"),
        (file([key("general.alignment", U32, struct.pack("<I", 0))], []), "power of two"),
        (file([key("general.alignment", U32, struct.pack("<I", 48))], []), "power of two"),
        (file([key("general.alignment", STRING, string("32"))], []), "not a whole number"),
        (file([ARCH], [tensor("w", (4,) * 5)]), "5 dimensions"),
        (file([ARCH], [tensor("w", ())]), "0 dimensions"),
        (file([ARCH], [tensor("w", (4, 0))]), "not possible"),
        (file([ARCH], [tensor("w", (255,), Q4_K)]), "not possible for Q4_K"),
        (file([ARCH], [tensor("w", (2**40, 2**40, 2**40))]), "truncated"),
        (file([ARCH], [tensor("w", (2**63, 2))]), "truncated"),
        (file([ARCH], [tensor("w", (64,), offset=32)]), "truncated"),
        (file([ARCH], [tensor("w", (4,), offset=2**63)]), "truncated"),
        (file([ARCH], [tensor("w", (4,), offset=8)]), "multiple of 32"),
        (file([ARCH], [tensor("a", (8,)), tensor("a", (8,), offset=32)]), "a occurs twice"),
        (file([ARCH], [tensor("a", (9,)), tensor("b", (8,), offset=32)]), "a and b overlap"),
        (file([ARCH], [tensor("x" * 2000, (8,))]), "absurd length"),
        (file([], [])[:-250], "truncated|architecture"),
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=match) as caught:
        GgufFile.open(path).architecture  # noqa: B018
    assert str(path) in str(caught.value)


def test_sound_but_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    refused(path, file([ARCH], [], version=1), "version 1; supported: 2, 3", UnsupportedError)
    refused(path, struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian", UnsupportedError)
    refused(path, file([ARCH], [tensor("w", (32,), 40)]), "NVFP4.*40.*MXFP4", UnsupportedError)
    refused(path, file([ARCH], [tensor("w", (32,), 999)]), "ggml type 999", UnsupportedError)
    nested = key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(20))
    refused(path, file([nested], []), "array of arrays", UnsupportedError)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GgufFile.open(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="not a file"):
        GgufFile.open(tmp_path)


def test_badly_encoded_values(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    strings = key("s", ARRAY, struct.pack("<IQ", STRING, 1) + string(b"\xff"))
    path.write_bytes(file([ARCH, key("general.name", STRING, string(b"M\xfcller")), strings], []))
    model = GgufFile.open(path)
    assert model.name == "M\ufffdller"
    with pytest.raises(FormatError, match="array s: bad string"):
        model.array("s")


def test_file_that_shrinks_before_an_array_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file([ARCH, key("s", ARRAY, struct.pack("<IQ", U32, 9) + bytes(36))], []))
    model = GgufFile.open(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(FormatError, match="has shrunk"):
        model.array("s")


def test_a_huge_sparse_file_of_zeros_costs_nothing(tmp_path: Path) -> None:
    """An array of 10^10 empty strings would fit in this file, not in a header."""
    path = tmp_path / "m.gguf"
    count = 10**10
    with open(path, "wb") as out:
        head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
        out.write(head + key("s", ARRAY, struct.pack("<IQ", STRING, count)))
        out.truncate(count * 8 + 1000)
    start = time.perf_counter()
    with pytest.raises(FormatError, match="absurd"):
        GgufFile.open(path)
    assert time.perf_counter() - start < 1


def make_sound_file(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "toy")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bb", "ccc"] * 10)
    writer.add_array("toy.sections", [1, 2, 3])
    writer.add_float32("toy.eps", 1e-6)
    writer.add_bool("toy.flag", True)
    for layer in range(2):
        for name, shape in (("gate", (3, 4, 8)), ("up", (3, 4, 8)), ("down", (3, 8, 4))):
            data = np.zeros(shape, np.float32)
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def flip(rng: random.Random, data: bytearray, header: int) -> None:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray, header: int) -> None:
    del data[rng.randrange(len(data)) :]


def overwrite(rng: random.Random, data: bytearray, header: int) -> None:
    """Put a number that has trapped parsers where a count, a length or an offset may be."""
    at = rng.randrange(header - 8)
    numbers = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
    data[at : at + 8] = struct.pack("<Q", rng.choice(numbers))


def splice(rng: random.Random, data: bytearray, header: int) -> None:
    a, b, length = (rng.randrange(header) for _ in range(3))
    data[a : a + length % 64] = data[b : b + length % 64]


@pytest.mark.parametrize("damage", [flip, truncate, overwrite, splice])
def test_random_damage(
    tmp_path: Path, damage: Callable[[random.Random, bytearray, int], None]
) -> None:
    """Whatever opens is consistent; whatever does not is refused by name; memory stays small."""
    sound = make_sound_file(tmp_path / "sound.gguf")
    header = sound.index(b"blk.1.ffn_down_exps.weight") + 26 + 4 + 3 * 8 + 4 + 8
    rng = random.Random(damage.__name__)
    path = tmp_path / "m.gguf"
    path.touch()
    start, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = 0
    for _ in range(ROUNDS):
        data = bytearray(sound)
        damage(rng, data, header)
        replace(path, data)
        model, message = try_open(path)
        if model is None:
            assert str(path) in message
            continue
        opened += 1
        for info in model.tensors.values():
            assert info.offset > 0
            assert info.offset + info.nbytes <= len(data)
        read_everything(model)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    seconds = time.perf_counter() - start
    print(f"{damage.__name__}: {opened} of {ROUNDS} opened, {seconds:.2f} s, {grown} KiB more")
    assert grown < 32 << 10


def replace(path: Path, data: bytes | bytearray) -> None:
    """Write in place: emptying a file first makes some file systems flush it, 4 ms a time."""
    with open(path, "r+b", buffering=0) as out:
        out.write(data)
        out.truncate()


def try_open(path: Path) -> tuple[GgufFile | None, str]:
    try:
        return GgufFile.open(path), ""
    except (FormatError, UnsupportedError) as error:
        return None, str(error)


def read_everything(model: GgufFile) -> None:
    """All that a caller may ask of a file; the only exceptions are ours."""
    for name, value in model.metadata.items():
        if isinstance(value, ArrayRef):
            with contextlib.suppress(FormatError):
                model.array(name)
    with contextlib.suppress(FormatError):
        model.arch_value("block_count", int)
        for layer in range(2):
            experts = model.experts(layer)
            if experts is not None:
                for expert in range(min(experts.num_experts, 4)):
                    experts.ranges(expert)
    assert model.fingerprint
    assert model.num_parameters >= 0


class TestSplit:
    """Models in several files."""

    def write(self, folder: Path, *, tensors: list[dict[str, np.ndarray]]) -> list[Path]:
        total = sum(map(len, tensors))
        paths = []
        for i, group in enumerate(tensors):
            path = folder / f"m-{i + 1:05}-of-{len(tensors):05}.gguf"
            paths.append(path)
            writer = gguf.GGUFWriter(path, "toy")
            if i == 0:
                writer.add_name("split toy")
                writer.add_custom_alignment(4096)
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", len(tensors))
            writer.add_int32("split.tensors.count", total)
            for name, data in group.items():
                writer.add_tensor(name, data)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return paths

    def groups(self) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(1)
        shapes = {"gate": (3, 4, 8), "up": (3, 4, 8), "down": (3, 8, 4)}
        made = {
            f"blk.{layer}.ffn_{name}_exps.weight": rng.normal(size=shape).astype(np.float32)
            for layer in range(2)
            for name, shape in shapes.items()
        }
        names = list(made)
        return [{}, {n: made[n] for n in names[:4]}, {n: made[n] for n in names[4:]}]

    def test_any_shard_opens_all(self, tmp_path: Path) -> None:
        groups = self.groups()
        paths = self.write(tmp_path, tensors=groups)
        weights = {name: data for group in groups for name, data in group.items()}
        for path in paths:
            model = GgufFile.open(path)
            assert list(model.paths) == paths
            assert model.name == "split toy"
            assert set(model.tensors) == set(weights)
            assert model.nbytes == sum(data.nbytes for data in weights.values())
        for layer in range(2):
            for expert in range(3):
                for r, name in zip(
                    model.expert_ranges(layer, expert), ("gate", "up", "down"), strict=True
                ):
                    data = paths[r.shard].read_bytes()[r.offset : r.offset + r.nbytes]
                    want = weights[f"blk.{layer}.ffn_{name}_exps.weight"][expert]
                    assert data == want.tobytes()

    def test_missing_shard(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, tensors=self.groups())
        paths[1].unlink()
        for path in (paths[0], paths[2]):
            with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf of 3 shards missing"):
                GgufFile.open(path)

    def test_renamed_shards(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, tensors=self.groups())
        alone = tmp_path / "renamed.gguf"
        alone.write_bytes(paths[1].read_bytes())
        with pytest.raises(FormatError, match="not named like one"):
            GgufFile.open(alone)
        paths[1].write_bytes(paths[2].read_bytes())
        with pytest.raises(FormatError, match="says it is shard 2 of 3"):
            GgufFile.open(paths[0])

    def test_shard_of_another_split(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, tensors=self.groups())
        (tmp_path / "other").mkdir()
        groups = self.groups()
        groups[2].popitem()
        other = self.write(tmp_path / "other", tensors=groups)
        paths[2].write_bytes(other[2].read_bytes())
        with pytest.raises(FormatError, match="5 tensors in all shards, 6 announced"):
            GgufFile.open(paths[0])
        groups[2] = dict(list(groups[1].items())[:2])
        other = self.write(tmp_path / "other", tensors=groups)
        paths[2].write_bytes(other[2].read_bytes())
        with pytest.raises(FormatError, match="is in two shards"):
            GgufFile.open(paths[0])

    def test_truncated_shard_is_named(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, tensors=self.groups())
        paths[2].write_bytes(paths[2].read_bytes()[:-40])
        with pytest.raises(FormatError, match=r"m-00003-of-00003\.gguf.*truncated"):
            GgufFile.open(paths[0])

    def test_links_keep_the_name_they_are_opened_by(self, tmp_path: Path) -> None:
        """Download caches keep blobs under hashes, and links to them under the model's names."""
        (tmp_path / "blobs").mkdir()
        (tmp_path / "names").mkdir()
        for i, path in enumerate(self.write(tmp_path / "blobs", tensors=self.groups())):
            blob = path.rename(tmp_path / "blobs" / f"blob{i}")
            (tmp_path / "names" / path.name).symlink_to(blob)
        model = GgufFile.open(tmp_path / "names" / "m-00001-of-00003.gguf")
        assert len(model.tensors) == 6
