"""Which side computes an expert, by costs."""

import pytest

from fomoe.experts.placement import Costs, LayerPlacement


def one(expert):
    return 1


def test_each_expert_goes_where_it_is_finished_first():
    placement = LayerPlacement(Costs(copy_s=3.5, host_s=1.0, host_token_s=0.0))
    device, host = placement.split([4, 2, 9, 7], one)
    assert (device, host) == ([9], [2, 4, 7])


def test_what_lands_later_queues_behind():
    placement = LayerPlacement(Costs(copy_s=2.5, host_s=1.0, host_token_s=0.0))
    sides = [placement.split([e], one) for e in range(7)]
    on_device = [e for e, (device, _) in enumerate(sides) if device]
    assert on_device == [2, 5]


def test_many_tokens_make_a_copy_worth_it():
    placement = LayerPlacement(Costs(copy_s=5.0, host_s=1.0, host_token_s=1.0))
    device, host = placement.split([1, 2, 3], {1: 1, 2: 100, 3: 2}.__getitem__)
    assert device == [2]
    assert host == [3, 1]


@pytest.mark.parametrize(("pinned", "sides"), [("host", ([], [3, 1])), ("device", ([3, 1], []))])
def test_a_layer_can_be_pinned(pinned, sides):
    placement = LayerPlacement(Costs(1.0, 1.0, 1.0), pinned=pinned)
    assert placement.split([3, 1], one) == sides


def test_fixed_placement_depends_on_the_step_alone():
    for costs in (Costs(1e-9, 1.0, 1.0), Costs(1.0, 1e-9, 1e-9)):
        assert LayerPlacement(costs, fixed=True).split([5], one) == ([], [5])
        assert LayerPlacement(costs, fixed=True, tokens=64).split([5], one) == ([5], [])
