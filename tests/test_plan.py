import re

import pytest

from fomoe.errors import BudgetError
from fomoe.plan import LayerNeed, make_plan

MIB = 1 << 20
LAYERS = [LayerNeed(slot_bytes=(2 + i % 2) * MIB, num_experts=64, top_k=4) for i in range(6)]
EVERYTHING = sum(n.slot_bytes * n.num_experts for n in LAYERS)
FIXED = (("dense weights", 100 * MIB), ("KV cache", 20 * MIB))
MINIMUM = 120 * MIB + 4 * (2 + 3) * MIB


def plan(budget, available=64 << 30, **more):
    return make_plan(
        budget=budget,
        available=available,
        fixed=FIXED,
        layers=LAYERS,
        expert_bytes_per_token=4 * 15 * MIB,
        **more,
    )


@pytest.mark.parametrize("budget", [MINIMUM, MINIMUM + MIB, 200 * MIB, 400 * MIB, 900 * MIB])
def test_a_plan_keeps_its_budget_and_uses_it(budget):
    p = plan(budget)
    assert p.total_bytes <= budget
    assert budget - p.total_bytes < 3 * MIB * len(LAYERS)
    assert all(c.transit >= 4 for c in p.classes)
    assert len(p.quota) == 6


def test_with_room_for_everything_nothing_travels():
    p = plan(120 * MIB + EVERYTHING)
    assert p.all_resident
    assert p.quota == (64,) * 6
    assert [c.transit for c in p.classes] == [0, 0]


def test_the_embedding_is_held_where_every_expert_is():
    whole = 120 * MIB + EVERYTHING
    assert plan(None, embedding_bytes=30 * MIB).budget == whole + 30 * MIB
    held = plan(whole + 30 * MIB, embedding_bytes=30 * MIB)
    assert held.holds_embedding
    assert held.all_resident
    assert held.total_bytes == whole + 30 * MIB
    for p in (plan(whole + 29 * MIB, embedding_bytes=30 * MIB), plan(whole + 30 * MIB)):
        assert p.all_resident
        assert not p.holds_embedding
        assert p.total_bytes == whole


def test_a_share_of_the_experts_does_not_depend_on_the_budget():
    small = plan(None, cache_share=0.17)
    assert small.quota == (10,) * 6
    assert all(c.transit >= 4 for c in small.classes)
    assert plan(120 * MIB + EVERYTHING, cache_share=0.17).quota == small.quota
    assert max(plan(300 * MIB, cache_share=0.5).quota) < 32


def test_without_a_budget_what_is_free_is_planned_but_no_more_than_needed():
    assert plan(None).budget == 120 * MIB + EVERYTHING
    assert plan(None, available=400 * MIB).budget == 360 * MIB
    assert "planned from 400.00 MiB free" in "\n".join(plan(None, available=400 * MIB).lines())


def test_too_small_a_budget_is_refused_with_one_that_would_do():
    with pytest.raises(BudgetError, match="needs 148 MiB: dense weights") as refusal:
        plan(MINIMUM - 1)
    named = re.findall(r"([0-9.]+) MiB", str(refusal.value).split("needs 148 MiB")[1])
    assert sum(map(float, named)) == 148


def test_layers_share_evenly():
    quota = plan(500 * MIB).quota
    assert max(quota) - min(quota) <= 1
