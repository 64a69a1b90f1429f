"""fomoe.experts.profile: round trip, refusals, the order of seeding, the atomic write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fomoe.errors import FormatError
from fomoe.experts.profile import parse, seed_order, serialise, write_atomically

PRINT = bytes(range(32))
USES = np.array([[5, 0, 1, 2], [0, 0, 9, 1]], np.float32)


def test_round_trip() -> None:
    assert parse(serialise(USES, PRINT), PRINT, 2, 4).tolist() == USES.tolist()


def test_other_models_are_refused() -> None:
    data = serialise(USES, PRINT)
    with pytest.raises(FormatError, match="another model"):
        parse(data, bytes(32), 2, 4)
    with pytest.raises(FormatError, match="another model"):
        parse(data, PRINT, 4, 2)


def test_any_damaged_byte_is_noticed() -> None:
    data = serialise(USES, PRINT)
    for at in range(len(data)):
        hurt = bytearray(data)
        hurt[at] ^= 0x40
        with pytest.raises(FormatError):
            parse(bytes(hurt), PRINT, 2, 4)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            parse(data[:length], PRINT, 2, 4)


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(FormatError):
        parse(serialise(USES * np.nan, PRINT), PRINT, 2, 4)


def test_seed_order_is_by_share_within_capacity() -> None:
    assert seed_order(USES, [2, 4]) == [(1, 2), (0, 0), (0, 3), (1, 3)]
    assert seed_order(np.zeros((2, 4), np.float32), [4, 4]) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.use"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(TypeError):
        write_atomically(path, "text")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["p.use"]
    assert path.read_bytes() == b"new"
