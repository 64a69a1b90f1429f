"""The expert store against a reader that lands reads when the test says so."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fomoe.errors import ReadError
from fomoe.experts.cache import ExpertCache, make_policy
from fomoe.experts.slots import SlotPool
from fomoe.experts.store import ExpertStore
from fomoe.io.reader import Extent, Priority

SLOT = 4096


class HandReader:
    """Keeps requests until they are landed, failed or cancelled by hand."""

    def __init__(self):
        self.flying = []
        self.promoted = []
        self.abandoned = []

    def submit(self, requests, priority=Priority.DEMAND):
        for request in requests:
            request.queued_ns = request.submitted_ns = 1
        self.flying += requests

    def promote(self, request):
        self.promoted.append(request)

    def abandon(self, request):
        self.abandoned.append(request)

    def land(self, *, error=None, count=None):
        some, self.flying = self.flying[:count], self.flying[count:] if count else []
        for request in some:
            request.landed_ns = time.perf_counter_ns()
            request.error = error
            request.done(request)


class Layout:
    """Experts of one page."""

    expert_bytes = slot_bytes = SLOT

    def __init__(self, num_experts):
        self.num_experts = num_experts

    def extents(self, expert, slot_address):
        return [Extent(0, expert * SLOT, SLOT, slot_address, SLOT)]

    def addresses(self, expert, slot_address):
        return slot_address, slot_address, slot_address


def make(quota=4, transit=3, layers=2, top_k=2, ordered=False, experts=16):
    reader = HandReader()
    pool = SlotPool(1 << 20, SLOT, quota * layers + transit, transit)
    store = ExpertStore(
        layouts=[Layout(experts)] * layers,
        pools=[pool] * layers,
        caches=[ExpertCache(experts, quota, make_policy("lru", experts)) for _ in range(layers)],
        reader=reader,
        top_k=top_k,
        ordered=ordered,
    )
    return SimpleNamespace(store=store, reader=reader, pool=pool)


def free_slots(s):
    return len(s.pool._free)


def run_step(s, layer, experts, latest_first=False):
    """Compute a step whose reads land at once; returns the experts in the order of computing."""

    async def main():
        step = s.store.begin(layer, experts, [1] * len(experts))
        order = []
        try:
            while not step.complete:
                some = step.take()
                if not some:
                    if latest_first:
                        s.reader.flying.reverse()
                    s.reader.land(count=1)
                    continue
                order += [e[0] for e in some]
                step.computed(some)
        finally:
            step.close()
        s.store.advance(1)
        return order

    return asyncio.run(main())


def test_a_second_use_hits():
    s = make()
    run_step(s, 0, [1, 2])
    assert (s.store.stats.hits, s.store.stats.expert_reads) == (0, 2)
    run_step(s, 0, [2, 3])
    assert (s.store.stats.hits, s.store.stats.expert_reads) == (1, 3)


def test_the_least_recent_leaves_and_its_slot_is_reused():
    s = make(quota=2, transit=2, layers=1)
    run_step(s, 0, [1, 2])
    run_step(s, 0, [2, 3])
    assert [e for e in range(16) if s.store.is_ready(0, e)] == [2, 3]
    assert free_slots(s) == 2


def test_who_stays_may_be_made_independent_of_the_drive():
    seen = set()
    for latest_first in (False, True):
        s = make(quota=3, transit=4, layers=1, ordered=True)
        order = []
        for experts in ([1, 2], [5, 3, 9, 7, 4, 11], [9, 2], [8, 6, 0, 12, 13]):
            s.store.note_uses(0, np.array([experts], np.int32), prompt=False)
            order += run_step(s, 0, experts, latest_first)
        seen.add((tuple(order), tuple(e for e in range(16) if s.store.is_ready(0, e))))
    assert len(seen) == 1


@pytest.mark.parametrize("quota", [0, 1, 4, 16])
def test_a_sweep_computes_every_expert_once_whatever_the_room(quota):
    s = make(quota=quota, transit=2, layers=1)
    for _ in range(3):
        assert sorted(run_step(s, 0, list(range(16)))) == list(range(16))
    assert free_slots(s) == 2 + quota - sum(s.store.is_ready(0, e) for e in range(16))


def test_memory_of_a_read_in_flight_is_not_reused_when_its_step_ends():
    s = make(quota=1, transit=1, layers=1)

    async def main():
        step = s.store.begin(0, [1, 2], [1, 1])
        step.close()
        busy = {r.extents[0].address for r in s.reader.flying}
        assert len(busy) == 2
        again = s.store.begin(0, [3], [1])
        assert not {r.extents[0].address for r in s.reader.flying[2:]} & busy
        s.reader.land()
        assert s.store.is_ready(0, 1)
        while not again.complete:
            again.computed(again.take())
            s.reader.land()
        again.close()

    asyncio.run(main())
    assert free_slots(s) == 1


def test_who_lands_while_nothing_is_left_to_compute_begins_at_once():
    s = make(quota=4, layers=1)
    run_step(s, 0, [4])
    begun = []

    async def main():
        step = s.store.begin(0, [1, 2, 3, 4, 5], [1, 1, 1, 1, 1])
        step.start = lambda expert: begun.append(expert[0]) is None
        s.reader.land(count=1)
        assert begun == []  # expert 4 is there, and has not been handed out
        some = step.take()
        assert [e[0] for e in some] == [1, 4]
        s.reader.land(count=1)
        assert begun == []  # they are being computed
        step.computed(some)
        some = step.take()
        assert [e[0] for e in some] == [2]
        step.computed(some)
        s.reader.land(count=1)
        assert begun == [3]
        s.reader.land(count=1)
        assert begun == [3]  # one at a time: 5 is handed out with it
        before = time.perf_counter_ns()
        assert [e[0] for e in step.take()] == [3, 5]
        assert 0 < step.begun_ns < before
        assert step.fresh
        assert len(s.store.stats.handover_ns) == 5  # of the first step's read and these four
        step.close()

    asyncio.run(main())


def test_held_experts_are_not_evicted_by_their_own_step():
    s = make(quota=2, transit=2, layers=1)
    run_step(s, 0, [1, 2])

    async def main():
        step = s.store.begin(0, [1, 2, 3], [1, 1, 1])
        ready = step.take()
        assert [e[0] for e in ready] == [1, 2]
        addresses = {e[1] for e in ready}
        assert s.reader.flying[0].extents[0].address not in addresses
        step.close()

    asyncio.run(main())


def test_waiting_wakes_for_each_landing():
    s = make(layers=1)

    async def main():
        step = s.store.begin(0, [1, 2], [1, 1])
        assert step.take() == []
        waiter = asyncio.create_task(step.landed())
        await asyncio.sleep(0)
        s.reader.land(count=1)
        assert [e[0] for e in await waiter] == [1]
        s.reader.land()
        assert [e[0] for e in await step.landed()] == [2]
        assert await step.landed() == []
        step.close()

    asyncio.run(main())
    assert s.store.stats.stall_ns > 0


def test_a_wait_ends_when_the_read_lands_however_late_the_loop_comes_back():
    s = make()
    landed = []

    async def main():
        step = s.store.begin(0, [1], [1])

        def land():
            s.reader.land()
            landed.append(time.perf_counter_ns())
            time.sleep(0.05)

        asyncio.get_running_loop().call_soon(land)
        begin = time.perf_counter_ns()
        await step.landed()
        step.close()
        return begin

    begin = asyncio.run(main())
    assert 0 < s.store.stats.stall_ns <= landed[0] - begin


def test_a_failed_read_raises_and_gives_its_slot_back():
    s = make(layers=1)

    async def main():
        step = s.store.begin(0, [1, 2], [1, 1])
        s.reader.land(error=OSError(5, "Input/output error"), count=1)
        with pytest.raises(ReadError, match=r"layer 0 expert 1.*Input/output"):
            await step.landed()
        step.close()
        s.reader.land()

    asyncio.run(main())
    assert not s.store.is_ready(0, 1)
    assert s.store.is_ready(0, 2)
    assert run_step(s, 0, [1]) == [1]


def test_prefetched_experts_are_promoted_when_they_are_wanted():
    s = make(layers=2)
    assert s.store.prefetch(1, [5, 6]) == 2

    async def main():
        step = s.store.begin(1, [5, 7], [1, 1])
        assert [r.what for r in s.reader.promoted] == ["layer 1 expert 5"]
        assert s.store.stats.late == 1
        s.reader.land()
        assert sorted(e[0] for e in await step.landed()) == [5, 7]
        step.close()

    asyncio.run(main())
    assert s.store.is_ready(1, 6)


def test_read_ahead_leaves_transit_slots_to_the_step_at_hand():
    s = make(quota=0, transit=4, layers=2, top_k=2)
    assert s.store.prefetch(1, [1, 2, 3, 4]) == 2
    assert sorted(run_step(s, 0, [1, 2, 3])) == [1, 2, 3]


def test_what_was_read_ahead_in_vain_is_dropped():
    s = make(quota=0, transit=4, layers=2, top_k=1)
    s.store.prefetch(1, [1, 2])
    s.reader.land(count=1)
    run_step(s, 1, [3])
    s.reader.land()
    assert free_slots(s) == 4


def test_a_guess_evicts_nobody_until_it_is_used():
    s = make(quota=2, transit=6, layers=1, top_k=2)
    run_step(s, 0, [1, 2])
    assert s.store.prefetch(0, [5, 6, 7], guess=True) == 3
    s.reader.land(count=1)
    assert s.store.is_ready(0, 1)
    assert s.store.is_ready(0, 2)

    async def main():
        step = s.store.begin(0, [5, 6], [1, 1])
        assert [r.what for r in s.reader.promoted] == ["layer 0 expert 6"]
        assert [r.what for r in s.reader.abandoned] == ["layer 0 expert 7"]
        s.reader.flying[1].cancelled = True
        s.reader.land()
        assert [e[0] for e in await step.landed()] == [5, 6]
        step.computed([(e, 0, 0, 0) for e in (5, 6)])
        step.close()

    asyncio.run(main())
    assert [e for e in range(16) if s.store.is_ready(0, e)] == [5, 6]
    assert free_slots(s) == 6


@pytest.mark.parametrize("landed_early", [False, True])
def test_in_order_reads_do_not_depend_on_when_others_landed(landed_early):
    s = make(quota=2, transit=2, layers=1, ordered=True)
    run_step(s, 0, [1, 2])
    s.store.note_uses(0, np.array([[5, 6, 7, 8]], np.int32), prompt=True)

    async def main():
        step = s.store.begin(0, [1, 2, 5, 6, 7, 8], [1] * 6)
        if landed_early:
            s.reader.land()
        some = step.take()
        assert [e[0] for e in some] == [1, 2]
        step.computed(some)
        s.reader.land()
        groups = []
        while not step.complete:
            some = step.take()
            groups.append([e[0] for e in some])
            step.computed(some)
            s.reader.land()
        step.close()
        return groups

    assert asyncio.run(main()) == [[5, 6], [7, 8]]


def test_a_guess_that_was_called_wrong_is_read_again_where_it_is_picked_after_all():
    s = make(quota=2, transit=6, layers=1, top_k=2)
    run_step(s, 0, [1, 2])
    s.store.prefetch(0, [7], guess=True)

    async def main():
        step = s.store.begin(0, [1, 2], [1, 1])
        assert [r.what for r in s.reader.abandoned] == ["layer 0 expert 7"]
        step.computed(step.take())
        step.close()
        assert not s.store.available(0, begins_ns=1e12)[7]
        step = s.store.begin(0, [1, 7], [1, 1])
        step.computed(step.take())
        first = s.reader.flying[0]
        first.cancelled = True
        s.reader.land()  # the rest of it is not coming
        assert [r.what for r in s.reader.flying] == ["layer 0 expert 7"]
        assert s.reader.flying[0] is not first
        s.reader.land()
        some = await step.landed()
        assert [e[0] for e in some] == [7]
        step.computed(some)
        step.close()

    asyncio.run(main())
    assert free_slots(s) == 6


def test_a_cancelled_read_fails_who_waits_for_it():
    s = make(layers=1)

    async def main():
        step = s.store.begin(0, [1], [1])
        s.reader.flying[0].cancelled = True
        s.reader.land()
        with pytest.raises(ReadError, match="cancelled"):
            await step.landed()
        step.close()

    asyncio.run(main())


def test_who_could_not_be_begun_early_is_not_said_to_have_been():
    s = make(layers=1)

    async def main():
        step = s.store.begin(0, [1, 2], [1, 1])
        step.start = lambda expert: False
        s.reader.land(count=1)
        assert not s.store.stats.handover_ns
        assert [e[0] for e in step.take()] == [1]
        assert step.begun_ns == 0
        assert len(s.store.stats.handover_ns) == 1
        step.close()

    asyncio.run(main())


def test_a_sweep_comes_in_batches_that_make_room_for_reads():
    s = make(quota=8, transit=40, layers=1, experts=64)
    s.store.note_uses(0, np.array([range(8)], np.int32), prompt=True)
    run_step(s, 0, list(range(8)))
    s.store.prefetch(0, [8, 9], guess=True)
    s.reader.land()

    async def main():
        step = s.store.begin(0, list(range(60)), [1] * 60)
        assert [e[0] for e in step.take()] == [8, 9], "what holds a slot for others goes first"
        assert not step.fresh
        s.reader.land(count=12)
        batch = await step.landed()
        assert step.fresh
        assert len(batch) == 8
        waiting = len(s.reader.flying)
        step.computed(batch)
        assert len(s.reader.flying) == waiting + 8, "their slots are read into at once"
        while batch := step.take():
            assert len(batch) <= 8
            step.computed(batch)
        step.close()
        s.reader.land()

    asyncio.run(main())
