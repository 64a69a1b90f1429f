"""The recorder: what is written is read back, whatever happens to the run or the file."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fomoe.errors import FormatError, RequestError
from fomoe.trace import Tracer
from fomoe.trace_format import HEAD, HEADER_BYTES, RECORD, RECORD_TYPE, Kind, Part, Source
from fomoe.tracing.recording import read_recording


def test_round_trip(tmp_path: Path) -> None:
    info = {"model": "m", "layers": 2, "drive_gbps": math.nan, "options": {"car": None}}
    with Tracer.create(tmp_path / "t", capacity=8, info=info) as tracer:
        tracer.event(Kind.READ, 10, 30, layer=1, expert=511, token=7, a=1 << 40, b=-5)
        tracer.event(Kind.STALL, 20, 30)
        tracer.describe({"drive_gbps": 2.5})
    recording = read_recording(tmp_path / "t")
    assert recording.closed
    assert (recording.dropped, recording.damaged) == (0, 0)
    first, second = recording.records
    assert first.tolist() == (10, 30, 1 << 40, -5, 7, 511, 1, Kind.READ, 1)
    assert second.tolist() == (20, 30, 0, 0, -1, -1, -1, Kind.STALL, 2)
    assert recording.info["model"] == "m"
    assert recording.info["options"] == {"car": None}
    assert recording.info["drive_gbps"] == 2.5


def test_ring_overwrites_the_oldest_and_counts_them(tmp_path: Path) -> None:
    with Tracer.create(tmp_path / "t", capacity=10, info={}) as tracer:
        for i in range(25):
            tracer.event(Kind.USE, i, i)
    recording = read_recording(tmp_path / "t")
    assert recording.records["begin"].tolist() == list(range(15, 25))
    assert recording.dropped == 15


def test_serials_past_32_bits_stay_in_order(tmp_path: Path) -> None:
    with Tracer.create(tmp_path / "t", capacity=4, info={}) as tracer:
        tracer._next = iter(range(2**32 - 3, 2**33)).__next__
        for i in range(7):
            tracer.event(Kind.USE, i, i)
    recording = read_recording(tmp_path / "t")
    assert recording.records["begin"].tolist() == [3, 4, 5, 6]
    assert recording.dropped == 2**32


def test_recording_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, time; from fomoe.trace import Tracer; from fomoe.trace_format import Kind\n"
        "t = Tracer.create(sys.argv[1], info={'model': 'm'})\n"
        "[t.event(Kind.USE, i, i) for i in range(1000)]\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "t")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"ready\n" in iter(process.stdout.readline, b"")
        os.kill(process.pid, signal.SIGKILL)
    recording = read_recording(tmp_path / "t")
    assert not recording.closed
    assert recording.records["begin"].tolist() == list(range(1000))


def test_threads_never_share_a_slot(tmp_path: Path) -> None:
    with Tracer.create(tmp_path / "t", info={}) as tracer:

        def work(layer: int) -> None:
            for i in range(5000):
                tracer.event(Kind.USE, i, i, layer)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = read_recording(tmp_path / "t").records
    for layer in range(4):
        assert records["begin"][records["layer"] == layer].tolist() == list(range(5000))


def test_create_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("precious")
    with pytest.raises(RequestError, match="not a recording"):
        Tracer.create(other, info={})
    assert other.read_text() == "precious"
    with pytest.raises(RequestError, match="No such file or directory"):
        Tracer.create(tmp_path / "no" / "t", info={})
    with pytest.raises(RequestError, match="at least one"):
        Tracer.create(tmp_path / "t", capacity=0, info={})
    with pytest.raises(RequestError, match="description"):
        Tracer.create(tmp_path / "t", info={"x": "y" * HEADER_BYTES})


def test_create_replaces_a_recording_that_is_still_mapped(tmp_path: Path) -> None:
    old = Tracer.create(tmp_path / "t", capacity=4, info={})
    with Tracer.create(tmp_path / "t", capacity=4, info={}) as new:
        old.event(Kind.USE, 1, 1)
        new.event(Kind.USE, 2, 2)
    old.close()
    assert read_recording(tmp_path / "t").records["begin"].tolist() == [2]


def test_broken_recordings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Tracer.create(path, capacity=4, info={"model": "m"}) as tracer:
        tracer.event(Kind.USE, 1, 1)
    good = path.read_bytes()

    def check(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            read_recording(path)

    check(b"", "not a recording")
    check(b"GGUF" + good, "not a recording")
    check(good[:-1], "cut short")
    check(good[: HEADER_BYTES // 2], "cut short")
    check(good[:8] + b"\x09" + good[9:], "version 9")
    check(good[:12] + b"\x01" + good[13:], "damaged")
    check(good[: HEAD.size] + b"\xff" + good[HEAD.size + 1 :], "description")
    with pytest.raises(RequestError, match="No such file"):
        read_recording(tmp_path / "none")


def test_a_damaged_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Tracer.create(path, capacity=4, info={}) as tracer:
        for i in range(3):
            tracer.event(Kind.USE, i, i)
    data = bytearray(path.read_bytes())
    RECORD.pack_into(data, HEADER_BYTES + RECORD.size, 9, 1, 0, 0, 0, 0, 0, 77, 2)
    path.write_bytes(data)
    recording = read_recording(path)
    assert recording.damaged == 1
    assert recording.records["begin"].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expert", 2**31 - 1),
        ("expert", 64),
        ("expert", -2),
        ("layer", 6),
        ("layer", -7),
        ("begin", -1),
        ("end", 2**63 - 1),
    ],
)
def test_a_record_that_is_not_of_the_model_is_left_out(
    tmp_path: Path, field: str, value: int
) -> None:
    path = tmp_path / "t"
    with Tracer.create(path, capacity=4, info={"layers": 6, "experts": 64}) as tracer:
        for i in range(3):
            tracer.event(Kind.USE, i, i, layer=5, expert=63)
    records = np.memmap(path, RECORD_TYPE, "r+", HEADER_BYTES)
    records[field][1] = value
    records.flush()
    recording = read_recording(path)
    assert recording.damaged == 1
    assert recording.records["begin"].tolist() == [0, 2]


def test_compact_records_must_be_of_the_model_too(tmp_path: Path) -> None:
    with Tracer.create(tmp_path / "t", capacity=9, info={"layers": 6, "experts": 64}) as tracer:
        tracer.picks(5, 3, 7, [4 * 63, 4 * 2])
        tracer.picks(6, 3, 7, [4 * 2, 4 * 64])
        tracer.layer(0, 10**9, 3, 7, [(Part.FINISH, 3, 0, 10**9, 0)])  # its length is in `expert`
    recording = read_recording(tmp_path / "t")
    assert recording.damaged == 1
    assert recording.records["expert"].tolist() == [63, 2, -1, -1]


def test_a_description_that_says_nothing_sensible_bounds_nothing(tmp_path: Path) -> None:
    info = {"layers": 10**9, "experts": "many"}
    with Tracer.create(tmp_path / "t", capacity=9, info=info) as tracer:
        tracer.event(Kind.USE, 1, 1, layer=100, expert=16000)
        tracer.event(Kind.USE, 1, 1, layer=100, expert=1 << 20)
    assert read_recording(tmp_path / "t").damaged == 1


def test_a_description_without_end_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Tracer.create(path, capacity=1, info={"model": "m" * 20_000}):
        pass
    data = bytearray(path.read_bytes())
    data[HEAD.size : HEAD.size + 20_000] = b"[" * 20_000
    path.write_bytes(data)
    with pytest.raises(FormatError, match="description of the recording is damaged"):
        read_recording(path)


def test_the_head_is_strict_json(tmp_path: Path) -> None:
    info = {"drive_gbps": math.inf, "path": Path("x"), "sizes": (1, 2)}
    with Tracer.create(tmp_path / "t", capacity=1, info=info):
        pass
    data = (tmp_path / "t").read_bytes()[HEAD.size : HEADER_BYTES].rstrip(b"\0")
    loaded = json.loads(data, parse_constant=lambda name: pytest.fail(name))
    assert loaded["drive_gbps"] is None
    assert (loaded["path"], loaded["sizes"]) == ("x", [1, 2])
    assert abs(loaded["clock"]["unix_ns"] - time.time_ns()) < 60e9


def test_compact_records_read_back_as_plain_ones(tmp_path: Path) -> None:
    quiet = [(Part.MIX, 3, 0, 40, 0), (Part.ROUTE, 3, 45, 50, 0), (Part.RESIDENT, 3, 60, 80, 9)]
    stalled = [*quiet, (Part.LANDED, 3, 90, 95, 1)]
    picks = [4 * e + Source.MISSING for e in (0, 16000, *range(1, 10))]
    with Tracer.create(tmp_path / "t", capacity=99, info={}) as tracer:
        tracer.picks(55, 3, 7, picks)
        tracer.layer(0, 100, 3, 7, list(quiet))
        tracer.flush()
        tracer.layer(0, 100, 3, 7, list(stalled))
        tracer.event(Kind.READ, 1, 2)  # made before the layer is written
    records = read_recording(tmp_path / "t").records
    kinds = [Kind(int(k)) for k in records["kind"]]
    assert kinds == [Kind.USE] * 11 + [Kind.COMPUTE] * 3 + [Kind.LAYER, Kind.READ] + [
        Kind.COMPUTE
    ] * 4 + [Kind.LAYER]
    uses, compute, exact = records[:11], records[11:14], records[16:20]
    assert uses["expert"].tolist() == [p // 4 for p in picks]
    assert set(uses["b"].tolist()) == {Source.MISSING}
    assert compute["a"].tolist() == [Part.MIX, Part.ROUTE, Part.RESIDENT]
    assert (compute["end"] - compute["begin"]).tolist() == [40, 5, 20]
    assert (compute["begin"][1:] >= compute["end"][:-1]).all()
    assert compute["end"][-1] <= 100
    assert exact["begin"].tolist() == [0, 45, 60, 90]
    assert exact["b"].tolist() == [0, 0, 9, 1]
    assert set(records["token"][:15].tolist()) == {7}
    assert records["expert"][14] == -1
