"""fomoe.experts.routes: what was written is what is read; damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fomoe.errors import FormatError, RequestError
from fomoe.experts.routes import DECODE, NOTHING, PROMPT, RouteShape, RouteWriter, read_routes

SHAPE = RouteShape(
    layers=3, experts=16, top_k=2, predicted=4, logits=True, model="toy", expert_bytes=[1, 2, 3]
)


def write_step(writer: RouteWriter, tokens: int, phase: int) -> list[np.ndarray]:
    rng = np.random.default_rng(tokens)
    written = []
    writer.begin([7] * tokens, range(tokens), phase)
    for layer in range(SHAPE.layers):
        logits = rng.normal(size=(tokens, 16)).astype(np.float16)
        ids = np.argsort(-logits, axis=1)[:, :2]
        writer.layer(layer, ids, np.full((tokens, 2), 0.5), logits)
        if layer:
            writer.prediction(layer, ids[:, ::-1])
        written.append(logits)
    writer.end()
    return written


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with RouteWriter(path, SHAPE) as writer:
        prompt = write_step(writer, 5, PROMPT)
        decode = write_step(writer, 1, DECODE)
    shape, records = read_routes(path)
    assert shape == SHAPE
    assert records["phase"].tolist() == [0] * 5 + [1]
    assert records["position"].tolist() == [0, 1, 2, 3, 4, 0]
    assert set(records["sequence"]) == {7}
    for layer in range(3):
        both = np.concatenate([prompt[layer], decode[layer]])
        assert (records["logits"][:, layer] == both).all()
        assert (records["ids"][:, layer] == np.argsort(-both, axis=1)[:, :2]).all()
    assert (records["predicted"][:, 0] == NOTHING).all()
    assert (records["predicted"][:, 1, :2] == records["ids"][:, 1, ::-1]).all()
    assert (records["predicted"][:, 1, 2:] == NOTHING).all()


def test_a_file_cut_short_loses_its_last_record(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with RouteWriter(path, SHAPE) as writer:
        write_step(writer, 5, PROMPT)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(read_routes(path)[1]) == 4
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    assert len(read_routes(path)[1]) == 0


@pytest.mark.parametrize(
    "head", [b"", b"GGUF", b"{}\n", b"[]\n", b'{"fomoe-routes": 2}\n', b'{"fomoe-routes": 1}\n']
)
def test_other_files_are_refused(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "r"
    path.write_bytes(head)
    with pytest.raises(FormatError):
        read_routes(path)


def test_picks_beyond_the_experts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with RouteWriter(path, RouteShape(layers=1, experts=4, top_k=1)) as writer:
        writer.begin([0], [0], DECODE)
        writer.layer(0, np.array([[9]]), np.array([[1.0]]))
        writer.end()
    with pytest.raises(FormatError, match="beyond"):
        read_routes(path)


def test_a_drive_that_is_full() -> None:
    writer = RouteWriter(Path("/dev/full"), SHAPE)
    with pytest.raises(RequestError, match="cannot record routes to /dev/full: No space left"):
        write_step(writer, 1000, PROMPT)
    with pytest.raises(RequestError, match="No space left"):
        writer.close()
    with pytest.raises(RequestError, match="/nowhere/r: No such file"):
        RouteWriter(Path("/nowhere/r"), SHAPE)
