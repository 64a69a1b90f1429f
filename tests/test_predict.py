"""fomoe.experts.predict: recall, the deadline rule, and switching itself off."""

from __future__ import annotations

import pytest

from fomoe.errors import RequestError
from fomoe.experts.predict import Mode, Prefetcher, RecallMeter

MB = 1_000_000


def prefetcher(mode: Mode = "auto") -> Prefetcher:
    return Prefetcher(mode, 2, bytes_per_s=1e9, latency_s=100e-6)


def test_recall_counts_picks_and_misses() -> None:
    meter = RecallMeter()
    meter.note([4, 1, 9, 7], [1, 7, 8], [7, 8])
    assert (meter.picks, meter.foreseen_at_k, meter.foreseen) == (3, 1, 2)
    assert (meter.misses, meter.misses_foreseen_at_k, meter.misses_foreseen) == (2, 0, 1)
    meter.note([8, 1], [1, 8], [8])
    assert (meter.layers, meter.picks, meter.foreseen_at_k) == (2, 5, 3)
    assert meter.misses_foreseen_at_k == 1


def test_only_what_can_land_in_time_is_read() -> None:
    ahead = prefetcher()
    assert ahead.choose(0, [1, 2, 3], MB, idle=True, clock=0) == []  # no window is known yet
    ahead.note_window(0, 0.9e-3)
    assert ahead.budget(0, MB) == 0
    assert ahead.choose(0, [1, 2, 3], MB, idle=True, clock=1) == []
    ahead.note_window(1, 1.2e-3)
    assert ahead.choose(1, [1, 2, 3], MB, idle=True, clock=1) == [1]
    assert ahead.choose(1, [1, 2, 3], MB // 4, idle=True, clock=1) == [1, 2]
    assert ahead.choose(1, [1, 2, 3], MB // 4, idle=False, clock=1) == []
    assert ahead.choose(1, [], MB, idle=True, clock=1) == []
    assert ahead.stats.issued == 3


def test_windows_are_running_means() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 10e-3)
    for _ in range(200):
        ahead.note_window(0, 2.15e-3)
    assert ahead.budget(0, MB) == 2


def test_a_rank_that_is_mostly_wrong_is_left_out() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 5e-3)
    for _ in range(100):
        ahead.note_outcome(0, 0, used=True, saved_s=1e-3)
        ahead.note_outcome(1, 0, used=False, cost_s=0.9e-3)
    assert ahead.choose(0, [5, 6], MB, idle=True, clock=1) == [5]


def test_it_pauses_when_it_does_not_pay_and_tries_again() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 5e-3)
    assert ahead.choose(0, [5], MB, idle=True, clock=10) == [5]
    for _ in range(32):
        ahead.note_outcome(0, 10, used=False, cost_s=1e-3)
    assert ahead.stats.switched_off == 1
    assert not ahead.active(11)
    assert ahead.choose(0, [5], MB, idle=True, clock=10 + 255) == []
    assert ahead.choose(0, [5], MB, idle=True, clock=10 + 256) == [5]
    for _ in range(32):
        ahead.note_outcome(0, 266, used=False, cost_s=1e-3)
    assert not ahead.active(266 + 511)
    assert ahead.active(266 + 512)
    for _ in range(500):
        ahead.note_outcome(0, 800, used=True, saved_s=1e-3)
    assert ahead.active(801)
    assert ahead.stats.switched_off == 2


def test_reads_that_save_nothing_do_not_pay() -> None:
    ahead = prefetcher()
    for _ in range(32):
        ahead.note_outcome(0, 0, used=False)
    assert not ahead.active(1)


def test_forced_on_and_off() -> None:
    on, off = prefetcher("on"), prefetcher("off")
    for _ in range(100):
        on.note_outcome(0, 0, used=False, cost_s=1.0)
    assert on.choose(0, [5, 6, 7], MB, idle=True, clock=1) == [5, 6]
    assert on.choose(0, [5, 6, 7], MB, idle=False, clock=1) == []
    off.note_window(0, 1.0)
    assert off.choose(0, [5, 6, 7], MB, idle=True, clock=1) == []
    with pytest.raises(RequestError):
        prefetcher("maybe")  # type: ignore[arg-type]
