"""fomoe.experts.car: rules against plain restatements of themselves, bounds, weights, meter."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fomoe.errors import RequestError
from fomoe.experts.car import CacheAwareRouter, CarStats, use_amounts
from fomoe.experts.car_options import CarOptions

E, K = 64, 8
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
RULES = ["budget:0.2", "light:1", "ratio:0.35", "prior:0.2", "max-rank:2,14"]


def routed(seed: int, tokens: int = 1) -> tuple[F32, I32, F32, npt.NDArray[np.bool_]]:
    """Logits, the router's picks and renormalised weights, and which experts are there."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (tokens, E)).astype(np.float32)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :K].astype(np.int32)
    p = np.exp(np.take_along_axis(logits, ids, 1))
    return logits, ids, (p / p.sum(1, keepdims=True)).astype(np.float32), rng.random(E) < 0.5


def router(rule: str, **options: Any) -> CacheAwareRouter:
    return CacheAwareRouter(CarOptions.parse(rule, **options), 1, K)


@pytest.mark.parametrize("rule", ["off", *RULES])
def test_nothing_happens_where_all_is_there(rule: str) -> None:
    logits, ids, weights, _ = routed(0)
    selection = router(rule).select(0, logits, ids, weights, np.ones(E, np.bool_))
    assert selection.ids is ids
    assert selection.weights is weights
    assert selection.displaced == []


def test_off_never_substitutes() -> None:
    logits, ids, weights, _ = routed(0)
    assert router("off").select(0, logits, ids, weights, np.zeros(E, np.bool_)).ids is ids


@pytest.mark.parametrize("top_j", [0, 1, 3])
@pytest.mark.parametrize("seed", range(30))
def test_prior_is_top_k_of_boosted_logits(seed: int, top_j: int) -> None:
    logits, ids, weights, there = routed(seed)
    boosted = logits[0] + 0.2 * (logits.max() - logits.min()) * there
    boosted[ids[0, :top_j]] = np.inf
    expected = set(np.argsort(-boosted)[:K].tolist())
    got = router("prior:0.2", top_j=top_j).select(0, logits, ids, weights, there)
    assert set(got.ids[0].tolist()) == expected


@pytest.mark.parametrize("seed", range(30))
def test_light_picks_are_replaced_by_the_best_that_are_there(seed: int) -> None:
    logits, ids, weights, there = routed(seed)
    got = router("light:1.2", top_j=0).select(0, logits, ids, weights, there)
    light = [e for e, w in zip(ids[0], weights[0], strict=True) if w <= 1.2 / K and not there[e]]
    others = [e for e in np.argsort(-logits[0]) if there[e] and e not in ids[0]][: len(light)]
    assert sorted(e for e, _ in got.displaced) == sorted(light)
    assert set(got.ids[0].tolist()) == set(ids[0].tolist()) - set(light) | set(others)


def test_prior_follows_the_layers_logit_range() -> None:
    logits, ids, weights, there = routed(1)
    car = router("prior:0.01")
    assert car.select(0, logits, ids, weights, there).displaced == []
    wide = logits * 1000
    for _ in range(200):
        car.select(0, wide, ids, weights, there)
    assert car.select(0, logits, ids, weights, there).displaced != []


@pytest.mark.parametrize("seed", range(30))
def test_max_rank_prefers_those_that_are_there_within_the_window(seed: int) -> None:
    logits, ids, weights, there = routed(seed)
    order = np.argsort(-logits[0]).tolist()
    tail = order[2:]
    chosen = [e for e in order[2:14] if there[e]][: K - 2]
    chosen += [e for e in tail if e not in chosen][: K - 2 - len(chosen)]
    got = router("max-rank:2,14").select(0, logits, ids, weights, there)
    assert set(got.ids[0].tolist()) == set(order[:2] + chosen)


@pytest.mark.parametrize("seed", range(30))
def test_ratio_is_fomoes_rule(seed: int) -> None:
    logits, ids, weights, there = routed(seed)
    p = np.exp(logits[0] - logits.max())
    order = [e for e in np.argsort(-p).tolist() if there[e] and e not in ids[0]]
    expected = ids[0].tolist()
    for rank, expert in enumerate(ids[0].tolist()):
        if not there[expert] and order:
            stand_in = order.pop(0)
            if p[stand_in] / p[expert] >= 0.35:
                expected[rank] = stand_in
    got = router("ratio:0.35", top_j=0).select(0, logits, ids, weights, there)
    assert got.ids[0].tolist() == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_and_weights_are_unbiased(rule: str, seed: int) -> None:
    logits, ids, weights, there = routed(seed)
    got = router(rule, top_j=2, max_mass=0.2).select(0, logits, ids, weights, there)
    assert got.ids[0, :2].tolist() == ids[0, :2].tolist()
    assert len(set(got.ids[0].tolist())) == K
    changed = got.ids[0] != ids[0]
    assert not there[ids[0][changed]].any()
    assert there[got.ids[0][changed]].all()
    assert got.moved_mass == pytest.approx(float(weights[0][changed].sum()), abs=1e-6)
    assert got.moved_mass <= 0.2 + 1e-6
    assert sorted(e for e, _ in got.displaced) == sorted(ids[0][changed].tolist())

    p = np.exp(logits[0])
    dampened = p[got.ids[0]] / p[ids[0]].sum()
    np.testing.assert_allclose(got.weights[0], dampened, rtol=1e-5)
    again = router(rule, top_j=2, max_mass=0.2, weights="renorm")
    renormed = again.select(0, logits, ids, weights, there)
    np.testing.assert_allclose(renormed.weights[0], dampened / dampened.sum(), rtol=1e-5)
    assert got.ids.dtype == ids.dtype
    assert got.weights.dtype == weights.dtype


def test_inputs_are_left_alone() -> None:
    logits, ids, weights, there = routed(3)
    before = [a.copy() for a in (logits, ids, weights, there)]
    assert router("prior:0.5").select(0, logits, ids, weights, there).displaced
    for array, copy in zip((logits, ids, weights, there), before, strict=True):
        assert (array == copy).all()


def test_a_read_that_one_token_needs_serves_the_others() -> None:
    logits = np.zeros((2, E), np.float32)
    logits[0, :K] = 10 - np.arange(K)
    logits[1, :K] = 10 - np.arange(K)[::-1] * 0.1
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :K].astype(np.int32)
    weights = np.full((2, K), 1 / K, np.float32)
    there = np.ones(E, np.bool_)
    there[0] = False  # the best pick of the first token, the least of the second
    car = router("max-rank:2,14")
    assert car.select(0, logits, ids, weights, there).displaced == []
    assert car.select(0, logits[1:], ids[1:], weights[1:], there).displaced == [(0, 0.125)]
    assert car.stats.picks == 3 * K
    assert car.stats.substitutions == car.stats.reads_avoided == 1


def test_meter_of_audits() -> None:
    stats = CarStats()
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    stats.note_audit(logits, logits + 5)
    assert stats.audit_kl == pytest.approx(0.0, abs=1e-12)
    stats.note_audit(logits, logits[::-1].copy())
    p = np.exp(logits) / np.exp(logits).sum()
    assert stats.audit_kl == pytest.approx(float((p * np.log(p / p[::-1])).sum()), rel=1e-5)
    assert (stats.audits, stats.audit_agreements) == (2, 1)


@pytest.mark.parametrize("there", [0.2, 0.5, 0.8])
def test_budget_is_kept_in_the_mean_however_much_is_absent(there: float) -> None:
    budget = router("budget:0.2")
    for seed in range(400):
        logits, ids, weights, _ = routed(seed)
        resident = np.random.default_rng(seed).random(E) < there
        budget.select(0, logits, ids, weights, resident)
    stats = budget.stats
    assert stats.moved_mass / stats.token_layers <= 0.21
    if there < 0.8:  # else there is not so much to be moved
        assert stats.moved_mass / stats.token_layers >= 0.19
    else:
        assert budget.limit > 1.5


def test_budget_with_a_limit_is_light_with_that_limit() -> None:
    logits, ids, weights, there = routed(1)
    budget, light = router("budget:0.2"), router("light:1")
    of_budget = budget.select(0, logits, ids, weights, there)
    of_light = light.select(0, logits, ids, weights, there)
    np.testing.assert_array_equal(of_budget.ids, of_light.ids)
    np.testing.assert_array_equal(of_budget.weights, of_light.weights)


def test_uses_count_by_weight() -> None:
    weights = np.array([[0.6, 0.1, 0.1, 0.2], [3, 0, 0, 1]], np.float32)
    expected = [[2.4, 0.4, 0.4, 0.8], [3, 0, 0, 1]]
    np.testing.assert_allclose(use_amounts(weights), expected, rtol=1e-6)
    assert not use_amounts(np.zeros((1, 4), np.float32)).any()


def test_parse() -> None:
    assert CarOptions.parse("off") == CarOptions()
    assert CarOptions.parse("ratio:0.35", top_j=0).value == 0.35
    assert CarOptions.parse("on") == CarOptions.parse("budget")
    assert CarOptions.parse("light") == CarOptions.parse("light:1")
    assert CarOptions.parse("prior").value == 0.25
    assert (CarOptions.parse("max-rank", top_j=2).top_j, CarOptions.parse("max-rank").top_j) == (
        2,
        1,
    )
    options = CarOptions.parse("max-rank:3,12", weights="renorm", max_mass=0.5)
    assert (options.top_j, options.max_rank) == (3, 12)
    assert (options.weights, options.max_mass) == ("renorm", 0.5)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("", {}),
        ("off:1", {}),
        ("on:1", {}),
        ("budget:0", {}),
        ("budget:1", {}),
        ("light:0", {}),
        ("ratio:", {}),
        ("ratio:0", {}),
        ("ratio:1.5", {}),
        ("ratio:nan", {}),
        ("ratio:x", {}),
        ("prior:-1", {}),
        ("prior:inf", {}),
        ("max-rank:2", {}),
        ("max-rank:2.5,12", {}),
        ("max-rank:5,5", {}),
        ("max-rank:2,12", {"top_j": 3}),
        ("ratio:0.5", {"top_j": -1}),
        ("ratio:0.5", {"max_mass": 0.0}),
        ("ratio:0.5", {"max_mass": float("nan")}),
        ("ratio:0.5", {"weights": "boost"}),
    ],
)
def test_bad_options_are_refused(rule: str, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        CarOptions.parse(rule, **options)


@pytest.mark.parametrize(("rule", "top_j"), [("ratio:0.5", 8), ("max-rank:2,8", None)])
def test_options_that_can_do_nothing_are_refused(rule: str, top_j: int | None) -> None:
    with pytest.raises(RequestError):
        CacheAwareRouter(CarOptions.parse(rule, top_j=top_j), 1, K)
