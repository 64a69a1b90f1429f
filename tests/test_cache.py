"""fomoe.experts.cache: slots, victims and what each policy thinks of a past."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.errors import RequestError
from fomoe.experts.cache import ExpertCache, make_policy

POLICIES = ["lru", "lfu", "lfru", "lfu:16"]


def filled(policy: str, num_experts: int = 8, capacity: int = 4) -> ExpertCache:
    cache = ExpertCache(num_experts, capacity, make_policy(policy, num_experts))
    for slot in range(capacity):
        cache.admit(slot, slot + 100)
    return cache


def test_admit_lookup_evict() -> None:
    cache = filled("lfu")
    assert len(cache) == 4
    assert cache.excess == 1
    assert [cache.lookup(e) for e in (0, 3, 4)] == [100, 103, -1]
    assert cache.resident.tolist() == [True] * 4 + [False] * 4
    assert cache.evict(3) == 103
    assert cache.lookup(3) == -1
    assert not cache.resident[3]
    assert cache.excess == 0
    with pytest.raises(AssertionError):
        cache.evict(3)
    with pytest.raises(AssertionError):
        cache.admit(0, 7)


def test_capacity_may_change() -> None:
    cache = filled("lru")
    cache.capacity = 2
    assert cache.excess == 3
    for expert in cache.victims(cache.excess):
        cache.evict(expert)
    assert len(cache) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_protected_never_leave(policy: str) -> None:
    cache = filled(policy)
    cache.touch([0, 1], 5)
    assert cache.victim([0, 1, 2]) == 3
    assert cache.victim([0, 1, 2, 3, 7]) is None
    assert sorted(cache.victims(4, np.array([2, 6], np.int32))) == [0, 1, 3]
    assert ExpertCache(4, 2, make_policy(policy, 4)).victim() is None


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_victims_is_victim_repeated(policy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = filled(policy, 16, 9)
    for clock in range(20):
        cache.touch(rng.choice(16, 3, replace=False), clock)
    several = cache.victims(5, [4])
    one_by_one = []
    for _ in range(5):
        victim = cache.victim([4])
        assert victim is not None
        cache.evict(victim)
        one_by_one.append(victim)
    assert several == one_by_one


def test_lru_takes_the_oldest() -> None:
    cache = filled("lru")
    for clock, expert in enumerate([3, 0, 2, 1, 3]):
        cache.touch([expert], clock)
    assert cache.victims(4) == [0, 2, 1, 3]


def test_lfu_counts_and_forgets() -> None:
    cache = filled("lfu:10")
    for clock in range(5):
        cache.touch([0], clock)
    cache.touch([1], 5)
    assert cache.victims(2) == [2, 3]
    assert cache.victim([2, 3]) == 1
    # Three half-lives later the five old uses weigh less than one new one.
    cache.touch([1, 2, 3], 35)
    assert cache.victim() == 0


def test_lfu_remembers_those_without_a_slot() -> None:
    cache = filled("lfu")
    for clock in range(4):
        cache.touch([7, 0, 1, 2], clock)
    cache.evict(3)
    cache.admit(7, 103)
    cache.touch([0, 1, 2, 3], 4)
    cache.touch([0, 1, 2, 3], 5)
    assert cache.victim([0, 1, 2]) == 7
    cache.touch([7], 6)
    assert cache.victim([7]) == 0


def test_lfru_weighs_age_by_uses() -> None:
    cache = filled("lfru:1000")
    for clock in range(9):
        cache.touch([0], clock)
    cache.touch([1], 8 + 79)
    # At clock 88: expert 0 has 81 ** (1/4) / 10, expert 1 has 2 ** (1/4) / 2.
    cache.touch([2, 3], 88)
    assert cache.victim([2, 3]) == 1
    cache.touch([1], 89)
    cache.touch([1], 90)
    cache.touch([1], 91)
    cache.touch([2, 3], 92)
    assert cache.victim([2, 3]) == 0


def test_lfu_is_a_sum_of_halving_uses_however_long_it_runs() -> None:
    rng = np.random.default_rng(0)
    policy = make_policy("lfu:2", 8)
    plain = np.zeros(8)
    for clock in range(3000):
        used = rng.choice(8, 3, replace=False)
        policy.touch(used, clock)
        plain *= 2**-0.5
        plain[used] += 1
        assert (np.argsort(policy.scores(clock)) == np.argsort(plain)).all()


@pytest.mark.parametrize("policy", ["lfu:1", "lfru:1"])
def test_sums_stay_finite_for_ever(policy: str) -> None:
    cache = filled(policy)
    for clock in [0, 500, 1023, 1024, 5_000, 10_000_000]:
        cache.touch([clock % 3], clock)
        assert np.isfinite(cache.policy.scores(clock)).all()
    assert cache.victim() is not None


@pytest.mark.parametrize("spec", ["", "fifo", "lru:3", "lfu:x", "lfu:-1", "lfu:nan", "lfu:inf"])
def test_bad_names_are_refused(spec: str) -> None:
    with pytest.raises(RequestError):
        make_policy(spec, 8)
