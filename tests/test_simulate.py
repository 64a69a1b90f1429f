"""tools/simulate: the replay of all layers at once is ExpertCache, event by event; Belady bounds
it; formats and the command line work."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from replay import Drive, make_any, replay
from routings import Trace, load_trace
from standins import replay_car

from fomoe.errors import FormatError, RequestError
from fomoe.experts.cache import PROMPT_AMOUNT, ExpertCache, make_policy
from fomoe.experts.car_options import CarOptions
from fomoe.experts.routes import DECODE, PROMPT, RouteShape, RouteWriter

LAYERS, EXPERTS, K = 3, 24, 4
SIMULATE = Path(__file__).parents[1] / "tools" / "simulate"
DRIVE = Drive(bytes_per_s=1e9, latency_s=1e-4, overlap_s=0.0, expert_bytes=1e6)


def make_trace(tokens: int = 120, prompt: int = 10, seed: int = 0) -> Trace:
    """Picks that drift: a token's logits are mostly its predecessor's."""
    rng = np.random.default_rng(seed)
    logits = np.zeros((tokens, LAYERS, EXPERTS), np.float16)
    z = rng.normal(0, 2, (LAYERS, EXPERTS))
    for token in range(tokens):
        z = 0.9 * z + rng.normal(0, 0.8, z.shape)
        logits[token] = z
    order = np.argsort(-logits, axis=2, kind="stable").astype(np.int32)
    p = np.exp(np.take_along_axis(logits, order[..., :K], 2).astype(np.float32))
    return Trace(
        name="drift",
        experts=EXPERTS,
        ids=order[..., :K],
        prompt=np.arange(tokens) < prompt,
        expert_bytes=1e6,
        weights=p / p.sum(2, keepdims=True),
        predicted=order[..., 1 : K + 1],
        logits=logits,
    )


def write_recording(path: Path, trace: Trace) -> None:
    shape = RouteShape(
        layers=LAYERS, experts=EXPERTS, top_k=K, predicted=K, logits=True, expert_bytes=[10**6] * 3
    )
    assert trace.weights is not None
    assert trace.predicted is not None
    assert trace.logits is not None
    prompt = int(trace.prompt.sum())
    steps = [(0, prompt), *((t, t + 1) for t in range(prompt, len(trace.ids)))]
    with RouteWriter(path, shape) as writer:
        for start, end in steps:
            phase = DECODE if start >= prompt else PROMPT
            writer.begin([0] * (end - start), range(start, end), phase)
            for layer in range(LAYERS):
                part = slice(start, end), layer
                writer.layer(layer, trace.ids[part], trace.weights[part], trace.logits[part])
                writer.prediction(layer, trace.predicted[part])
            writer.end()


def one_by_one(trace: Trace, spec: str, slots: int) -> tuple[int, int]:
    """Hits and picks of decode by the engine's cache, layer by layer."""
    hits = picks = 0
    for layer in range(trace.layers):
        cache = ExpertCache(trace.experts, slots, make_policy(spec, trace.experts))
        prompt = trace.ids[trace.prompt, layer]
        counts = np.bincount(prompt.ravel(), minlength=trace.experts)
        used = np.flatnonzero(counts)
        cache.touch(used, 0, counts[used] * PROMPT_AMOUNT)
        if len(prompt):
            for expert in used.tolist():
                cache.admit(expert, 0)
            for expert in cache.victims(len(cache) - slots) if len(cache) > slots else []:
                cache.evict(expert)
        for step, ids in enumerate(trace.ids[~trace.prompt, layer]):
            cache.touch(ids, len(prompt) + step)
            picks += len(ids)
            hits += int(cache.resident[ids].sum())
            for expert in [e for e in ids.tolist() if not cache.resident[e]]:
                if cache.excess > 0:
                    victim = cache.victim(ids)
                    assert victim is not None
                    cache.evict(victim)
                cache.admit(expert, 0)
    return hits, picks


@pytest.mark.parametrize("prompt", [0, 20])
@pytest.mark.parametrize("spec", ["lru", "lfu", "lfru", "lfu:8"])
def test_replay_is_the_cache(spec: str, prompt: int) -> None:
    trace = make_trace(prompt=prompt)
    capacities = [5, 9, 16]
    for outcome in replay(trace, spec, capacities, DRIVE):
        assert (outcome.hits, outcome.picks) == one_by_one(trace, spec, outcome.slots)


def best_possible(ids: Sequence[frozenset[int]], slots: int) -> int:
    """The most hits of any demand policy, by trying every eviction."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for picks in ids:
        following: dict[frozenset[int], int] = {}
        for resident, hits in states.items():
            hits += len(picks & resident)
            everyone = picks | resident
            candidates = [everyone]
            while len(candidates[0]) > slots:
                candidates = list({c - {e} for c in candidates for e in c - picks})
            for state in candidates:
                following[state] = max(following.get(state, 0), hits)
        states = following
    return max(states.values())


@pytest.mark.parametrize("seed", range(8))
def test_belady_is_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.array([[rng.choice(7, 2, replace=False)] for _ in range(14)], np.int32)
    trace = Trace(name="t", experts=7, ids=ids, prompt=np.zeros(14, np.bool_))
    (outcome,) = replay(trace, "belady", [4], DRIVE)
    assert outcome.hits == best_possible([frozenset(row[0].tolist()) for row in ids], 4)


@pytest.mark.parametrize("spec", ["lru", "least-stale", "lfu", "lfru", "mass"])
def test_no_policy_beats_belady(spec: str) -> None:
    trace = make_trace(400)
    bound = replay(trace, "belady", [5, 10, EXPERTS], DRIVE)
    for outcome, best in zip(replay(trace, spec, [5, 10, EXPERTS], DRIVE), bound, strict=True):
        assert 0 < outcome.hits <= best.hits
    assert outcome.hits == best.hits  # with room for all


def test_mass_counts_probabilities_of_the_unpicked() -> None:
    logits = np.array([[0, 5, 0], [5, 4.9, 0], [0, 0, 5], [0, 5, 0]], np.float16)
    trace = Trace(
        name="t",
        experts=3,
        ids=np.array([1, 0, 2, 1], np.int32).reshape(4, 1, 1),
        prompt=np.zeros(4, np.bool_),
        logits=logits[:, None],
    )
    # For 2 the later pick 0 leaves, as 1 was nearly picked with it.
    assert replay(trace, "mass", [2], DRIVE)[0].hits == 1
    assert replay(trace, "lru", [2], DRIVE)[0].hits == 0
    trace.logits = None
    with pytest.raises(RequestError, match="no router logits"):
        make_any("mass", trace)


def test_least_stale_is_first_in_first_out() -> None:
    ids = np.array([0, 1, 2, 0, 3, 0], np.int32).reshape(6, 1, 1)
    trace = Trace(name="t", experts=4, ids=ids, prompt=np.zeros(6, np.bool_))
    (outcome,) = replay(trace, "least-stale", [3], DRIVE)
    assert outcome.hits == 1  # 3 pushes out 0, the first to enter, although it was just used
    (outcome,) = replay(trace, "lru", [3], DRIVE)
    assert outcome.hits == 2


def test_stall_is_latency_and_transfer_beyond_the_overlap() -> None:
    drive = Drive(bytes_per_s=1e9, latency_s=1e-4, overlap_s=1e-3, expert_bytes=1e6)
    assert drive.stall_s(np.array([0, 1, 3])).tolist() == pytest.approx([0.0, 1e-4, 2.1e-3])
    assert [drive.reads_within(s) for s in (0.0, 1e-3, 1.11e-3, 3.2e-3)] == [0, 0, 1, 3]


def test_reading_ahead_turns_misses_into_hits() -> None:
    trace = make_trace(300)
    (plain,) = replay(trace, "lfu", [7], DRIVE)
    (ahead,) = replay(trace, "lfu", [7], DRIVE, ahead=2)
    (bare,) = replay(trace, "lfu", [7], DRIVE, ahead=2, protect=False)
    assert ahead.hits > plain.hits
    assert ahead.hits >= bare.hits
    assert ahead.ahead_used <= ahead.ahead_reads
    assert plain.ahead_reads == 0


def test_car_reads_less_and_backfill_less_still() -> None:
    trace = make_trace(300)
    ratio = CarOptions.parse("ratio:0.35", top_j=0)
    exact = replay_car(trace, "lfu", 7, DRIVE, CarOptions(), 0.0)
    plain = replay_car(trace, "lfu", 7, DRIVE, ratio, 0.0)
    filled = replay_car(trace, "lfu", 7, DRIVE, ratio, 5e-3)
    (replayed,) = replay(trace.decode_only(), "lfu", [7], DRIVE)
    assert exact.demand_reads == replayed.reads
    assert plain.miss_rate < exact.miss_rate
    assert filled.stats.substitutions < plain.stats.substitutions
    assert filled.backfill_reads > 0


def test_formats_agree(tmp_path: Path) -> None:
    trace = make_trace(40)
    assert trace.weights is not None
    write_recording(tmp_path / "own.routes", trace)
    np.savez(tmp_path / "ids.npz", trace0=trace.ids[:25], trace1=trace.ids[25:])
    lines = ["# route_trace v1", f"# model=m n_expert={EXPERTS}"]
    lines += [f"# layer={layer} expert_bytes=1000000" for layer in range(LAYERS)]
    lines += ["turn,phase,step,layer,slot,expert,weight"]
    lines += [
        f"0,{int(t >= 10)},{t},{layer},{slot},{trace.ids[t, layer, slot]},0.5"
        for layer in range(LAYERS)
        for t in range(40)
        for slot in range(K)
    ]
    (tmp_path / "drift.route.csv").write_text("\n".join(lines))
    own = load_trace(tmp_path / "own.routes")
    npz = load_trace(tmp_path / "ids.npz")
    csv = load_trace(tmp_path / "drift.route.csv")
    for other in (own, npz, csv):
        assert (other.ids == trace.ids).all()
    assert (own.prompt == trace.prompt).all()
    assert (csv.prompt == trace.prompt).all()
    assert csv.experts == EXPERTS
    assert own.expert_bytes == csv.expert_bytes == 1e6
    assert own.predicted is not None
    assert (own.predicted == trace.predicted).all()
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(FormatError):
        load_trace(tmp_path / "x")


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "own.routes"
    write_recording(path, make_trace(60))
    for arguments, expected in (
        (["--policy", "lfu,mass", "--ahead", "1", "--cold"], ["belady", "million picks"]),
        (["--car", "off", "--car", "ratio:0.5"], ["ratio:0.5"]),
    ):
        command = [sys.executable, str(SIMULATE), str(path), "--capacity", "25%,12", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        assert all(word in result.stdout for word in expected)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--capacity", "1%"], "it takes 4"),
        (["--capacity", "x"], "neither"),
        (["--capacity", "50%", "--policy", "fifo"], "no cache policy"),
        (["--capacity", "50%", "--policy", "mass"], "no router logits"),
        (["--capacity", "50%", "--ahead", "1"], "no predictions"),
        (["--capacity", "50%", "--car", "ratio:0.5"], "no router logits"),
        (["--expert-bytes", "0", "--capacity", "50%"], "--expert-bytes"),
        (["--capacity", "50%", "--policy", "lfu:0"], "half-life"),
    ],
)
def test_command_line_refuses(
    arguments: list[str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "ids.npz"
    np.savez(path, trace0=make_trace(20).ids)
    monkeypatch.setattr(sys, "argv", ["simulate", str(path), "--expert-bytes", "1e6", *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(SIMULATE), run_name="__main__")
    assert exit_.value.code == 1
    assert why in capsys.readouterr().err


def test_make_any_knows_the_simulators_own() -> None:
    trace = make_trace(20)
    assert make_any("belady", trace).name == "belady"
    assert make_any("least-stale", trace).name == "least-stale"
    assert make_any("lfu", trace).name == "lfu"
