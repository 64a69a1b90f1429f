"""fomoe.experts.predict: recall, what is worth reading, and switching itself off."""

from __future__ import annotations

import pytest

from fomoe.errors import RequestError
from fomoe.experts.predict import Mode, Prefetcher, RecallMeter

MB = 1_000_000


def prefetcher(mode: Mode = "auto") -> Prefetcher:
    """A megabyte takes 1.1 ms, and as long to be rid of."""
    return Prefetcher(mode, 2, bytes_per_s=1e9, latency_s=100e-6, in_flight_bytes=MB)


def places(*experts: int) -> list[tuple[int, int]]:
    return list(enumerate(experts))


def test_recall_counts_picks_and_misses() -> None:
    meter = RecallMeter()
    meter.note([4, 1, 9, 7], [1, 7, 8], [7, 8])
    assert (meter.picks, meter.foreseen_at_k, meter.foreseen) == (3, 1, 2)
    assert (meter.misses, meter.misses_foreseen_at_k, meter.misses_foreseen) == (2, 0, 1)
    meter.note([8, 1], [1, 8], [8])
    assert (meter.layers, meter.picks, meter.foreseen_at_k) == (2, 5, 3)
    assert meter.misses_foreseen_at_k == 1


def test_reads_go_out_one_after_the_other_as_long_as_the_window_lasts() -> None:
    ahead = prefetcher()
    assert ahead.choose(0, places(1, 2, 3), MB, clock=0) == []  # no window is known yet
    ahead.note_window(0, 0.3e-3)
    assert ahead.choose(0, places(1, 2, 3), MB, clock=1) == []  # too little of it would be read
    ahead.note_window(1, 2.2e-3)
    assert ahead.choose(1, places(1, 2, 3), MB, clock=1) == [1, 2]
    assert ahead.choose(1, [], MB, clock=1) == []
    assert ahead.stats.issued == 2


def test_windows_are_running_means() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 10e-3)
    for _ in range(200):
        ahead.note_window(0, 2.3e-3)
    assert ahead.choose(0, places(1, 2, 3), MB, clock=1) == [1, 2]


def test_a_place_that_is_mostly_wrong_is_left_out() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 5e-3)
    for _ in range(100):
        ahead.note_place(0, picked=True)
        ahead.note_place(1, picked=False)
    assert ahead.choose(0, places(5, 6), MB, clock=1) == [5]
    assert ahead.choose(0, [(1, 6)], MB, clock=1) == []


def test_what_is_cheap_to_be_rid_of_may_be_less_sure() -> None:
    cheap = Prefetcher("auto", 1, bytes_per_s=1e9, latency_s=0.0, in_flight_bytes=MB // 10)
    dear = Prefetcher("auto", 1, bytes_per_s=1e9, latency_s=0.0, in_flight_bytes=MB)
    for ahead in (cheap, dear):
        ahead.note_window(0, 5e-3)
        for i in range(400):
            ahead.note_place(0, picked=i % 10 < 3)
    assert cheap.choose(0, places(5), MB, clock=1) == [5]
    assert dear.choose(0, places(5), MB, clock=1) == []


def test_it_pauses_when_it_does_not_pay_and_tries_again() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 5e-3)
    assert ahead.choose(0, places(5), MB, clock=10) == [5]
    for _ in range(32):
        ahead.note_outcome(10, used=False, cost_s=1e-3)
    assert ahead.stats.switched_off == 1
    assert ahead.stats.paused
    assert not ahead.active(11)
    assert ahead.choose(0, places(5), MB, clock=10 + 255) == []
    assert ahead.choose(0, places(5), MB, clock=10 + 256) == [5]
    assert not ahead.stats.paused
    for _ in range(32):
        ahead.note_outcome(266, used=False, cost_s=1e-3)
    assert not ahead.active(266 + 511)
    assert ahead.active(266 + 512)
    for _ in range(500):
        ahead.note_outcome(800, used=True, saved_s=1e-3)
    assert ahead.active(801)
    assert ahead.stats.switched_off == 2


def test_predictions_that_are_never_good_enough_are_not_made() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 5e-3)
    for _ in range(100):
        ahead.note_place(0, picked=False)
    for clock in range(32):
        assert ahead.choose(0, places(5), MB, clock=clock) == []
    assert not ahead.active(32)


def test_forced_on_and_off() -> None:
    on, off = prefetcher("on"), prefetcher("off")
    for _ in range(100):
        on.note_outcome(0, used=False, cost_s=1.0)
    assert on.choose(0, places(5, 6, 7, 8), MB, clock=1) == [5, 6, 7]
    off.note_window(0, 1.0)
    assert off.choose(0, places(5, 6, 7), MB, clock=1) == []
    with pytest.raises(RequestError):
        prefetcher("maybe")  # type: ignore[arg-type]
