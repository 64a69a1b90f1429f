"""What recordings add up to: figures worked out by hand, and an acted run that must agree."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import EXPERT_BYTES, record
from toy import K_TOY, write_toy

from fomoe import BudgetError, Engine, Sampling, Stats
from fomoe.trace import Tracer
from fomoe.trace_format import HEADER_BYTES, RECORD_TYPE, Kind, Part, Reason, Source
from fomoe.tracing.intervals import covered, following, lanes, union
from fomoe.tracing.layers import expert_counts
from fomoe.tracing.page import page_data
from fomoe.tracing.perfetto import write_chrome_trace
from fomoe.tracing.recording import read_recording
from fomoe.tracing.summary import Summary, as_json, summarise
from fomoe.tracing.text import render

MS = 1_000_000
TOOL = Path(__file__).parent.parent / "tools" / "trace"

Pairs = list[tuple[int, int]]
pairs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)), max_size=12)


def arrays(spans: Pairs) -> tuple[np.ndarray, np.ndarray]:
    begin = np.array([b for b, _ in spans], np.int64)
    return begin, begin + np.array([n for _, n in spans], np.int64)


@settings(deadline=None)  # machines may be busy
@given(pairs, pairs)
def test_union_and_cover_count_nanoseconds(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> None:
    begin, end = arrays(a)
    inside = {t for i, j in zip(begin, end, strict=True) for t in range(i, j)}
    spans = union(begin, end)
    assert spans.total == len(inside)
    assert (spans.begin[1:] > spans.end[:-1]).all()
    found = covered(spans, *arrays(b)).tolist()
    assert found == [sum(t in inside for t in range(i, i + n)) for i, n in b]


@settings(deadline=None)  # machines may be busy
@given(pairs)
def test_lanes_do_not_overlap(spans: Pairs) -> None:
    begin, end = arrays(sorted((b, n + 1) for b, n in spans))
    lane = lanes(begin, end)
    depth = max((((begin <= t) & (end > t)).sum() for t in begin), default=0)
    assert lane.max(initial=-1) < max(depth, 1)
    for i in range(len(begin)):
        same = lane[:i] == lane[i]
        assert (end[:i][same] <= begin[i]).all()


@settings(deadline=None)  # machines may be busy
@given(pairs, pairs)
def test_following_finds_the_next_of_the_group(have: Pairs, ask: Pairs) -> None:
    times, groups = (np.array([p[i] for p in have], np.int64) for i in (0, 1))
    asked, of = (np.array([p[i] for p in ask], np.int64) for i in (0, 1))
    for found, time, group in zip(following(groups, times, of, asked), asked, of, strict=True):
        later = [t for t, g in have if g == group and t >= time]
        assert (found >= 0) == bool(later)
        if later:
            assert (times[found], groups[found]) == (min(later), group)


def summary_of(tmp_path: Path, *events: tuple[int, ...], **info: object) -> Summary:
    """Of events (kind, begin ms, end ms, layer, expert, token, a, b)."""
    with Tracer.create(tmp_path / "t", capacity=99, info=info) as tracer:
        for kind, begin, end, *rest in events:
            tracer.event(kind, begin * MS, end * MS, *rest)
    return summarise(read_recording(tmp_path / "t"))


def test_one_token_by_hand(tmp_path: Path) -> None:
    summary = summary_of(
        tmp_path,
        (Kind.STEP, 0, 100, -1, -1, 0, 1, 0),
        (Kind.LAYER, 10, 90, 0),
        (Kind.COMPUTE, 10, 30, 0, -1, 0, Part.MIX),
        (Kind.USE, 30, 30, 0, 5, 0, 1, Source.MISSING),
        (Kind.USE, 30, 30, 0, 6, 0, 1, Source.RESIDENT),
        (Kind.READ, 30, 70, 0, 5, 0, 60 * MS, 10 * MS),  # 60 MB in 30 ms, after 10 ms in the queue
        (Kind.COMPUTE, 30, 50, 0, -1, 0, Part.RESIDENT, 1),
        (Kind.STALL, 50, 70, 0, 5),
        (Kind.COMPUTE, 71, 85, 0, 5, 0, Part.LANDED, 1),
        (Kind.COMPUTE, 110, 120, -1, -1, 1, Part.SAMPLE),
        drive_gbps=4.0,
    )
    (phase,) = summary.phases
    assert (phase.name, phase.steps, phase.tokens) == ("decode", 1, 1)
    assert phase.wall_ns == 100 * MS
    assert phase.compute_ns == 54 * MS
    assert phase.stalled_ns == 20 * MS
    assert phase.overhead_ns == 26 * MS
    assert phase.parts == {"mix": 20 * MS, "resident": 20 * MS, "landed": 14 * MS}
    assert phase.outside == {"sample": 10 * MS}
    assert phase.hit_rate == 0.5
    reading = phase.reading
    assert reading.gbps_in_flight == pytest.approx(2.0)
    assert reading.gbps_overall == pytest.approx(0.6)
    assert reading.covered_share == pytest.approx(1 / 3)
    assert reading.queued_us.tolist() == [10_000, 10_000]
    assert phase.ratio == pytest.approx(100 / 54)
    assert phase.landed_us.tolist() == [1000, 1000]
    (stall,) = summary.stalls
    assert (stall.layer, stall.expert, stall.why) == (0, 5, "never read before")
    (row,) = summary.layers["decode"]
    assert (row.wall_ns, row.compute_ns, row.stalled_ns) == (80 * MS, 54 * MS, 20 * MS)
    assert (row.picks, row.hits, row.read_bytes) == (2, 1, 60 * MS)


def test_compute_that_was_busy_is_not_blamed_on_the_hand_over(tmp_path: Path) -> None:
    (phase,) = summary_of(
        tmp_path,
        (Kind.STEP, 0, 100, -1, -1, 0, 1, 0),
        (Kind.LAYER, 0, 100, 0),
        (Kind.USE, 0, 0, 0, 1, 0, 1, Source.MISSING),
        (Kind.READ, 0, 20, 0, 1, 0, 1, 0),
        (Kind.PREFETCH, 0, 5, 0, 2, 0, 1, 0),  # landed before it was asked for
        (Kind.USE, 8, 8, 0, 2, 0, 1, Source.RESIDENT),
        (Kind.COMPUTE, 10, 50, 0, -1, 0, Part.RESIDENT, 1),
        (Kind.COMPUTE, 52, 60, 0, 1, 0, Part.LANDED, 1),
    ).phases
    assert phase.landed_us.tolist() == [32_000, 32_000]
    assert phase.landed_idle_us.tolist() == [2000, 2000]


def test_a_read_across_two_phases_counts_in_each_for_its_time_there(tmp_path: Path) -> None:
    decode, prompt = summary_of(
        tmp_path,
        (Kind.STEP, 0, 100, -1, -1, 0, 8, 1),
        (Kind.READ, 50, 105, 0, 1, 8, 60 * MS, 0),
        (Kind.READ, 60, 110, 0, 2, 8, 60 * MS, 0),
        (Kind.STEP, 100, 120, -1, -1, 8, 1, 0),
        (Kind.COMPUTE, 90, 102, 0, -1, 0, Part.RESIDENT, 1),
    ).phases
    assert decode.reading.flight_ns == 10 * MS
    assert decode.reading.gbps_in_flight == pytest.approx(12.0)
    assert decode.reading.gbps_overall == pytest.approx(6.0)
    assert decode.reading.depth == pytest.approx(1.5)
    assert decode.reading.covered_share == pytest.approx(0.2)
    assert prompt.reading.flight_ns == 50 * MS
    assert prompt.reading.depth == pytest.approx(1.8)
    assert prompt.reading.covered_share == pytest.approx(0.2)
    assert math.isnan(prompt.reading.gbps_in_flight), "nothing landed there"


def test_the_share_of_stand_ins_is_of_decode(tmp_path: Path) -> None:
    summary = summary_of(
        tmp_path,
        (Kind.STEP, 0, 100, -1, -1, 0, 8, 1),
        (Kind.USE, 10, 10, 0, 5, 0, 8, Source.MISSING),
        (Kind.STEP, 100, 120, -1, -1, 8, 2, 0),
        (Kind.USE, 105, 105, 0, 5, 8, 2, Source.RESIDENT),
        (Kind.USE, 105, 105, 0, 6, 8, 1, Source.RESIDENT),
        (Kind.USE, 105, 105, 0, 7, 8, 1, Source.RESIDENT),
        (Kind.SUBSTITUTE, 105, 105, 0, 8, 8, 7, 1000),
    )
    assert summary.substitution is not None
    assert (summary.substitution.replaced, summary.substitution.picks) == (1, 4)
    assert "1 experts replaced (25.0 % of the picks)" in render(summary)


def test_as_many_stalls_are_listed_as_asked_for(tmp_path: Path) -> None:
    recording = read_recording(record(tmp_path / "t", decode=3))
    for asked, listed in ((3, 3), (1, 1), (0, 0), (-1, 0)):
        summary = summarise(recording, stalls=asked)
        assert len(summary.stalls) == listed
        text = render(summary)
        assert "Why compute waited" in text
        assert ("Worst stalls" in text) == bool(listed)


def stalled_on(tmp_path: Path, *history: tuple[int, ...], queued: int = 0, kind: int = 5) -> str:
    """The reason of a stall on layer 3, expert 7 in token 4, after the given events."""
    steps = [(Kind.STEP, 100 * i, 100 * i + 90, -1, -1, i, 1, 0) for i in range(5)]
    read = (kind, 410, 450, 3, 7, 4, 1000, queued * MS)
    stall = (Kind.STALL, 420, 450, 3, 7)
    return summary_of(tmp_path, *steps, *history, read, stall).stalls[0].why


def test_reasons_of_stalls(tmp_path: Path) -> None:
    earlier = (Kind.READ, 110, 120, 3, 7, 1, 1000, 0)
    evicted = (Kind.EVICT, 250, 250, 3, 7)
    other = (Kind.EVICT, 350, 350, 3, 8)
    assert stalled_on(tmp_path) == "never read before"
    assert stalled_on(tmp_path, earlier, evicted, other) == "evicted 2 tokens ago"
    assert stalled_on(tmp_path, kind=Kind.PREFETCH) == "predicted too late"
    before = (Kind.READ, 405, 440, 2, 1, 4, 1000, 0)
    assert stalled_on(tmp_path, before, queued=30) == "never read before, behind 1 reads"


def test_the_engines_own_reason_is_kept(tmp_path: Path) -> None:
    step = (Kind.STEP, 0, 9, -1, -1, 0, 1, 0)
    summary = summary_of(tmp_path, step, (Kind.STALL, 1, 2, -1, -1, 0, Reason.FILE))
    assert summary.stalls[0].reason is Reason.FILE
    assert summary.reasons[0].wait_ns == MS


def test_nothing_unmeasured_is_zero(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, (Kind.STEP, 0, 5, -1, -1, 0, 1, 0))
    (phase,) = summary.phases
    assert math.isnan(phase.hit_rate)
    assert math.isnan(phase.reading.gbps_in_flight)
    assert math.isnan(phase.ratio)
    found = as_json(summary)["phases"][0]
    assert found["reading"]["gbps_in_flight"] is None
    assert "nothing was read" in render(summary)


def test_empty_recording(tmp_path: Path) -> None:
    assert "No step was recorded" in render(summary_of(tmp_path))


def test_acted_run_adds_up(tmp_path: Path) -> None:
    summary = summarise(read_recording(record(tmp_path / "t")))
    for phase in summary.phases:
        assert phase.compute_ns + phase.stalled_ns + phase.overhead_ns == phase.wall_ns
        # The actor spends 5 us a layer, and 30 us for each expert that landed, on nothing.
        landed = phase.reading.reads
        assert phase.overhead_ns == phase.steps * 6 * 5000 + landed * 30_000
        assert phase.landed_us[0] == pytest.approx(30)
        assert phase.reading.bytes == landed * EXPERT_BYTES
        assert sum(row.stalled_ns for row in summary.layers[phase.name]) == phase.stalled_ns
    decode, prompt = summary.phases
    assert (decode.tokens, prompt.tokens) == (40, 16)
    assert sum(total.wait_ns for total in summary.reasons) == decode.stalled_ns + prompt.stalled_ns
    counts = expert_counts(summary.timeline)
    assert counts.uses.shape == (6, 64)
    assert counts.uses.sum() == decode.picks + prompt.picks
    assert counts.misses.sum() == decode.reading.reads + prompt.reading.reads


def test_a_step_that_was_overwritten_in_part_is_left_out(tmp_path: Path) -> None:
    whole = summarise(read_recording(record(tmp_path / "t", prompt=0, decode=9)))
    capacity = len(whole.recording.records) - 1
    part = summarise(read_recording(record(tmp_path / "u", prompt=0, decode=9, capacity=capacity)))
    assert part.recording.dropped == 1
    assert part.times.wall.tolist() == whole.times.wall[1:].tolist()
    assert part.phases[0].overhead_ns == int(whole.times.overhead[1:].sum())


def test_text_of_an_acted_run(tmp_path: Path) -> None:
    text = render(summarise(read_recording(record(tmp_path / "t", decode=3, capacity=500))))
    assert "acted-moe, 6 layers, 64 experts, 4 picked" in text
    assert "options: dram=16GiB threads=2" in text
    assert "earlier ones were overwritten" in text
    assert "% of 1.25)" in text
    assert "nan" not in text
    assert max(map(len, text.splitlines()[1:])) <= 100


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_damaged_is_shown_without_complaint(tmp_path: Path, seed: int) -> None:
    path, random = record(tmp_path / "t", decode=5), np.random.default_rng(seed)
    records = np.memmap(path, RECORD_TYPE, "r+", HEADER_BYTES)
    data = records[: np.count_nonzero(records["serial"])].view(np.uint8)
    data[random.integers(0, len(data), 200)] = random.integers(0, 256, 200)
    records.flush()
    summary = summarise(read_recording(path))
    assert summary.recording.damaged
    assert expert_counts(summary.timeline).uses.shape == (6, 64)
    assert render(summary)
    assert page_data(summary, 10_000)
    json.dumps(as_json(summary), allow_nan=False)
    write_chrome_trace(summary, io.StringIO())


@pytest.mark.parametrize("rate", [10**400, 1e-320, -1, True, "fast"])
def test_a_ceiling_that_is_none(tmp_path: Path, rate: object) -> None:
    summary = summary_of(
        tmp_path,
        (Kind.STEP, 0, 9, -1, -1, 0, 1, 0),
        (Kind.READ, 1, 5, 0, 5, 0, 60 * MS, 0),
        drive_gbps=rate,
    )
    assert render(summary)


def tool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(TOOL), *map(str, args)]
    env = os.environ | {"SKBUILD_EDITABLE_VERBOSE": "0"}  # a rebuild would be told on stdout
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_show_on_the_command_line(tmp_path: Path) -> None:
    path = record(tmp_path / "t")
    shown = tool("show", path)
    assert shown.returncode == 0, shown.stderr
    assert "Where the time went" in shown.stdout
    figures = json.loads(tool("show", path, "--json").stdout)
    assert figures["phases"][0]["tokens"] == 40
    assert len(figures["steps"]) == 41
    assert sum(step["wall_ns"] for step in figures["steps"][1:]) == figures["phases"][0]["wall_ns"]
    path.write_bytes(path.read_bytes()[:70_000])
    cut = tool("show", path)
    assert cut.returncode == 1
    assert cut.stderr.startswith(f"trace: error: {path} is cut short")
    assert len(cut.stderr.splitlines()) == 1


def test_a_real_run_agrees_with_the_engines_own_counts(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy.gguf", dataclasses.replace(K_TOY, layers=5, experts=16))

    async def main() -> Stats:
        # A read ahead of the last token may land after its step, and belong to no phase.
        options = {"context": 256, "ubatch": 64, "trace": tmp_path / "t", "prefetch": "off"}
        with pytest.raises(BudgetError) as refusal:
            await Engine.open(toy, dram=1 << 20, **options)
        least = int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20
        async with Engine.open(toy, dram=least, **options) as engine:
            greedy = Sampling(temperature=0.0)
            async for _ in engine.generate(
                [5] * 20, sampling=greedy, max_tokens=30, ignore_eos=True
            ):
                pass
        return engine.stats()

    stats = asyncio.run(main())
    summary = summarise(read_recording(tmp_path / "t"))
    assert summary.recording.closed
    assert summary.recording.info["options"]["context"] == 256
    for phase, own in zip(summary.phases, (stats.generation, stats.prompt), strict=True):
        assert (phase.tokens, phase.steps) == (own.tokens, own.steps)
        assert (phase.picks, phase.hit_rate) == (own.picks, own.hit_rate)
        # A read ahead that lands between two steps is in the recording, but in no step's counts.
        late = phase.reading.reads - own.expert_reads
        assert own.expert_reads > 0
        assert 0 <= late <= 2
        assert (phase.reading.bytes > own.expert_bytes) == bool(late)
        assert phase.compute_ns + phase.stalled_ns + phase.overhead_ns == phase.wall_ns
        assert phase.wall_ns <= own.seconds * 1e9
        assert phase.overhead_ns < 0.5 * phase.wall_ns
        own_layers = sum(row.wall_ns for row in summary.layers[phase.name])
        assert own_layers <= phase.wall_ns
    # Waits for the rows of the embedding are among both.
    waits, stalls = stats.prompt.stall_seconds + stats.generation.stall_seconds, summary.reasons
    assert sum(total.wait_ns for total in stalls) / 1e9 == pytest.approx(waits)
    assert any(total.reason is Reason.FILE for total in stalls)
    known = [total.reason for total in summary.reasons]
    assert Reason.EVICTED in known
    assert Reason.UNKNOWN not in known
    assert math.isfinite(summary.phases[0].landed_us[0])


def test_run_records_and_shows(tmp_path: Path) -> None:
    out = tmp_path / "t"
    ran = tool("run", "--out", out, "--", "generate", "-p", "The old man", "-n", "3", "--temp", "0")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("The old man")
    assert "books-moe, 8 layers, 32 experts, 4 picked" in ran.stdout
    failed = tool("run", "--out", out, "--", "generate", "-m", tmp_path / "none.gguf")
    assert failed.returncode != 0
    assert "the run ended before it recorded anything" in failed.stderr
    assert "books-moe" not in failed.stdout


def traced(monkeypatch: pytest.MonkeyPatch, program: str, *args: str | Path) -> int:
    """tools/trace as a function, which runs another program than fomoe."""
    trace = runpy.run_path(str(TOOL))
    monkeypatch.setitem(trace["run"].__globals__, "START", program)
    monkeypatch.setattr("sys.argv", ["trace", "run", *map(str, args), "--", "generate"])
    status: int = trace["main"]()
    return status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_a_signal_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    program = "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    program += f"os.kill(os.getpid(), {int(number)})"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert traced(monkeypatch, program, "--out", tmp_path / "t") == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_signals_are_the_shows_own_when_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def summarised(*_: Any, **__: Any) -> Summary:
        seen.append(signal.getsignal(signal.SIGTERM))
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("fomoe.tracing.summary.summarise", summarised)
    source, out = record(tmp_path / "source", decode=1), tmp_path / "t"
    program = f"import shutil, sys; shutil.copy({str(source)!r}, sys.argv[-1])"
    with pytest.raises(KeyboardInterrupt):
        traced(monkeypatch, program, "--out", out)
    assert seen == [before]


def test_json_is_all_that_stdout_gets_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = record(tmp_path / "source", decode=1), tmp_path / "t"
    program = f"import shutil, sys; shutil.copy({str(source)!r}, sys.argv[-1]); print('a text')"
    assert traced(monkeypatch, program, "--out", out, "--json") == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["info"]["model"] == "acted-moe"
    assert "a text" in printed.err


@pytest.mark.parametrize("flag", ["--html", "--perfetto"])
def test_a_recording_is_not_overwritten(tmp_path: Path, flag: str) -> None:
    path = record(tmp_path / "t", decode=1)
    before = path.read_bytes()
    for command in (["show", path], ["run", "--out", path]):
        rest = ["--", "generate"] * (command[0] == "run")
        refused = tool(*command, flag, tmp_path / "." / "t", *rest)
        assert refused.returncode == 1
        assert refused.stderr.startswith("trace: error: ")
        assert len(refused.stderr.splitlines()) == 1
        assert path.read_bytes() == before


def test_ctrl_c_while_modules_are_imported() -> None:
    program = "import runpy, signal, sys, time\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "class Slow:\n"
    program += "    def find_spec(self, name, *_):\n"
    program += "        if name == 'fomoe.tracing.page':\n"
    program += "            print('importing', flush=True), time.sleep(60)\n"
    program += "sys.meta_path.insert(0, Slow())\n"
    program += (
        f"sys.argv = ['trace', 'show', 'none']\nrunpy.run_path({str(TOOL)!r}, None, '__main__')"
    )
    command = [sys.executable, "-P", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"importing\n" in iter(process.stdout.readline, b"")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"")
        assert process.returncode == -signal.SIGINT
