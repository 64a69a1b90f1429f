"""Policies at work in the engine: stand-ins, backfill, audits, profiles, recorded routes."""

import asyncio
import dataclasses

import numpy as np
import pytest
from toy import K_TOY, write_toy

from fomoe import CarOptions, Engine, RequestError, Sampling
from fomoe.experts.backfill import BackfillQueue
from fomoe.experts.profile import is_profile
from fomoe.experts.routes import DECODE, PROMPT, read_routes
from fomoe.experts.store import ExpertStore
from fomoe.residency import Residency

GREEDY = Sampling(temperature=0.0)
PROMPT_TEXT = "the thing on the other side of there, "
TOY = dataclasses.replace(K_TOY, layers=4, experts=16, top_k=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


def generate(model, n=24, *, share=0.4, sampling=GREEDY, **options):
    """Ids, statistics and plan of a generation with memory for a share of the experts."""

    async def main():
        budget = None
        if share < 1:
            planned = {k: options[k] for k in ("deterministic", "car_audit") if k in options}
            async with Engine.open(model, context=128, ubatch=16, **planned) as engine:
                budget = engine.plan.fixed_bytes + int(share * engine.plan.slot_bytes)
        async with Engine.open(model, dram=budget, context=128, ubatch=16, **options) as engine:
            stream = engine.generate(PROMPT_TEXT, max_tokens=n, sampling=sampling, ignore_eos=True)
            ids = [t.id async for t in stream]
            return ids, engine.stats(), engine.plan

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_stand_ins_avoid_reads_and_are_metered(model):
    exact_ids, exact, plan = generate(model)
    assert not plan.all_resident
    _, stats, _ = generate(model, car=CarOptions.parse("ratio:0.1", top_j=1))
    car = stats.residency.car
    assert car.substitutions > 0
    assert car.reads_avoided > 0
    assert 0 < car.moved_mass / car.token_layers < 1
    assert exact.residency.car.substitutions == 0
    assert any(line.startswith("CAR ") for line in stats.lines())
    assert not any(line.startswith("CAR") for line in exact.lines())
    assert len(exact_ids) == 24


def test_backfill_leaves_who_stands_in(tmp_path, monkeypatch):
    """The router did not pick them: they would be the first to leave."""
    chosen, evicted, routed, begin = {}, [], Residency.routed, ExpertStore.begin

    def note(residency, layer, routing):
        picks = set(routing.ids.ravel().tolist())
        ready = {e for e in range(64) if residency._store.is_ready(layer, e)}
        routed(residency, layer, routing)
        chosen[layer] = ready.intersection(routing.ids.ravel().tolist()) - picks

    def check(store, layer, experts, counts, **options):
        evicted.extend(e for e in chosen.get(layer, ()) if not store.is_ready(layer, e))
        return begin(store, layer, experts, counts, **options)

    monkeypatch.setattr(Residency, "routed", note)
    monkeypatch.setattr(ExpertStore, "begin", check)
    model = write_toy(tmp_path / "toy.gguf", dataclasses.replace(TOY, experts=64))
    varied = Sampling(temperature=1.2, seed=1)
    car = CarOptions.parse("on")
    _, stats, _ = generate(model, n=100, share=0.15, sampling=varied, car=car)
    assert stats.residency.car.substitutions > 50
    assert stats.residency.backfill.read > 5
    assert evicted == []


def test_the_prompt_is_exact(model):
    _, stats, _ = generate(model, n=1, car=CarOptions.parse("ratio:0.01", top_j=0))
    assert stats.residency.car.picks == 0


def test_deterministic_stand_ins_do_not_depend_on_how_files_are_read(model, monkeypatch):
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 300 << 20)
    options = {"car": CarOptions.parse("prior:0.5", top_j=1), "deterministic": True}
    texts = [
        generate(model, io=io, direct=direct, **options)[0]
        for io, direct in (("uring", "auto"), ("threads", "auto"), ("threads", "off"))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_an_audit_measures_and_changes_nothing(model, monkeypatch):
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 300 << 20)
    options = {"car": CarOptions.parse("ratio:0.05", top_j=1), "deterministic": True}
    plain, _, _ = generate(model, **options)
    audited, stats, _ = generate(model, car_audit=0.5, **options)
    car = stats.residency.car
    assert audited == plain
    assert car.audits == pytest.approx(12, abs=1)
    assert 0 < car.audit_kl / car.audits < 10


def test_a_profile_warms_the_next_start(model, tmp_path):
    profile = tmp_path / "uses"
    cold = generate(model, share=1.0, profile=profile)[1]
    assert profile.exists()

    async def warm_start():
        async with Engine.open(model, context=128, ubatch=16, profile=profile) as engine:
            await asyncio.sleep(0.3)
            async for _ in engine.generate(PROMPT_TEXT, max_tokens=1, sampling=GREEDY):
                pass
            return engine.stats()

    warm = asyncio.run(warm_start())
    assert warm.prompt.hit_rate > cold.prompt.hit_rate


def test_a_profile_does_not_make_deterministic_text_depend_on_time(model, tmp_path):
    profile = tmp_path / "uses"
    generate(model, share=1.0, profile=profile)
    seed = profile.read_bytes()

    async def text(wait, io):
        profile.write_bytes(seed)
        options = {"car": CarOptions.parse("prior:0.5", top_j=1), "deterministic": True, "io": io}
        async with Engine.open(
            model, context=128, ubatch=16, cache_share=0.4, profile=profile, **options
        ) as engine:
            await asyncio.sleep(wait)
            stream = engine.generate(PROMPT_TEXT, max_tokens=24, sampling=GREEDY, ignore_eos=True)
            ids = [t.id async for t in stream]
            return ids, engine.stats().prompt.hits, engine.stats().generation.hits

    at_once, later = (asyncio.run(text(wait, io)) for wait, io in ((0, "threads"), (0.3, "uring")))
    assert at_once == later
    assert at_once[1] > 0


@pytest.mark.parametrize("damage", [b"fomoeuse", b"fomoeuse and not more", None])
def test_a_profile_that_cannot_serve_is_refused_with_one_line(model, tmp_path, caplog, damage):
    profile = tmp_path / "uses"
    if damage is None:
        other = write_toy(tmp_path / "other.gguf", dataclasses.replace(TOY, experts=8))
        generate(other, n=1, share=1.0, profile=profile)
    else:
        profile.write_bytes(damage)
    assert len(generate(model, n=2, share=1.0, profile=profile)[0]) == 2
    assert [r.getMessage() for r in caplog.records if "is not used" in r.getMessage()]


def test_a_file_that_is_no_profile_is_left_alone(model, tmp_path):
    path = tmp_path / "letter"
    path.write_text("Dear Sir or Madam")
    with pytest.raises(RequestError, match="is no profile, and would be overwritten"):
        generate(model, n=1, share=1.0, profile=path)
    assert path.read_text() == "Dear Sir or Madam"
    path.write_text("")
    generate(model, n=1, share=1.0, profile=path)
    assert is_profile(path.read_bytes())


def test_routes_are_recorded(model, tmp_path):
    path = tmp_path / "routes"
    ids, _, _ = generate(model, n=6, share=1.0, record_routes=path)
    shape, records = read_routes(path)
    assert (shape.layers, shape.experts, shape.top_k) == (4, 16, 4)
    phases = records["phase"].tolist()
    assert phases.count(DECODE) == len(ids) - 1
    assert phases[0] == PROMPT
    assert records["position"].tolist() == list(range(len(records)))
    picks = records["ids"]
    assert all(len(set(token.tolist())) == 4 for step in picks for token in step)
    best = np.argsort(-records["logits"].astype(np.float32), axis=-1)[..., 0]
    assert (best == picks[..., 0]).mean() > 0.95


def test_a_recording_that_cannot_be_written_is_refused(model, tmp_path):
    with pytest.raises(RequestError, match=r"--record-routes .* no folder that can be written"):
        generate(model, share=1.0, record_routes=tmp_path / "no" / "where")


def test_the_backfill_queue_hands_out_the_most_wanted_and_forgets_the_least():
    queue = BackfillQueue(room=3)
    for layer, expert, share in ((0, 1, 0.1), (0, 2, 0.3), (1, 1, 0.2), (0, 1, 0.9), (2, 5, 0.05)):
        queue.add(layer, expert, share)
    assert [queue.take() for _ in range(len(queue))] == [(0, 2), (1, 1), (0, 1)]
    assert (queue.stats.queued, queue.stats.taken, queue.stats.forgotten) == (4, 3, 1)


def test_what_is_said_to_be_read_ahead_is_read(tmp_path, monkeypatch):
    made, prefetch = [], ExpertStore.prefetch

    def count(store, layer, experts, **options):
        done = prefetch(store, layer, experts, **options)
        if options.get("guess"):
            made.append(done)
        return done

    monkeypatch.setattr(ExpertStore, "prefetch", count)
    model = write_toy(tmp_path / "toy.gguf", dataclasses.replace(TOY, experts=64))
    _, stats, plan = generate(model, n=48, share=0.6, prefetch="on")
    assert plan.classes[0].transit == 7  # a token's picks, and three guesses
    assert stats.residency.prefetch.issued == sum(made) > 0
    made.clear()
    _, stats, plan = generate(model, n=48, share=0.15, prefetch="on")
    assert [c.transit for c in plan.classes] == [4, 4]
    assert stats.residency.prefetch.issued == sum(made)


def test_the_recall_on_misses_counts_those_that_nobody_foresaw(model):
    _, stats, _ = generate(model, n=48, prefetch="on")
    recall = stats.residency.recall
    assert recall.picks == recall.layers * 4
    assert 0 < recall.foreseen_at_k < recall.picks
    assert 0 < recall.misses_foreseen_at_k < recall.misses < recall.picks
