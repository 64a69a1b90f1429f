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
    assert ahead.choose(0, places(1, 2, 3), MB) == []  # no window is known yet
    ahead.note_window(0, 0.3e-3)
    assert ahead.choose(0, places(1, 2, 3), MB) == []  # too little of it would be read
    ahead.note_window(1, 2.2e-3)
    assert ahead.choose(1, places(1, 2, 3), MB) == [1, 2]
    assert ahead.choose(1, [], MB) == []
    ahead.note_issued(2)
    assert ahead.stats.issued == 2


def test_windows_are_running_means() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 10e-3)
    for _ in range(200):
        ahead.note_window(0, 2.3e-3)
    assert ahead.choose(0, places(1, 2, 3), MB) == [1, 2]


def test_a_place_that_is_mostly_wrong_is_left_out() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 5e-3)
    for _ in range(100):
        ahead.note_place(0, picked=True)
        ahead.note_place(1, picked=False)
    assert ahead.choose(0, places(5, 6), MB) == [5]
    assert ahead.choose(0, [(1, 6)], MB) == []


def test_what_is_cheap_to_be_rid_of_may_be_less_sure() -> None:
    cheap = Prefetcher("auto", 1, bytes_per_s=1e9, latency_s=0.0, in_flight_bytes=MB // 10)
    dear = Prefetcher("auto", 1, bytes_per_s=1e9, latency_s=0.0, in_flight_bytes=MB)
    for ahead in (cheap, dear):
        ahead.note_window(0, 5e-3)
        for i in range(400):
            ahead.note_place(0, picked=i % 10 < 3)
    assert cheap.choose(0, places(5), MB) == [5]
    assert dear.choose(0, places(5), MB) == []


def live(ahead: Prefetcher, tokens: int, *, with_reads_s: float, without_s: float) -> int:
    """Generate tokens; how many of them might have reads ahead."""
    count = 0
    for _ in range(tokens):
        count += ahead.active
        ahead.note_token(with_reads_s if ahead.active else without_s)
    return count


def test_a_trial_takes_turns_and_its_verdict_holds_for_a_term_that_grows() -> None:
    ahead = prefetcher()
    ahead.note_window(0, 5e-3)
    times = {"with_reads_s": 0.101, "without_s": 0.1}
    assert live(ahead, 96, **times) == 48
    assert (ahead.stats.switched_off, ahead.stats.paused) == (1, True)
    assert ahead.choose(0, places(5), MB) == []
    assert live(ahead, 256, **times) == 0
    assert live(ahead, 96, **times) == 48
    assert live(ahead, 512, **times) == 0  # the same verdict: it holds for longer
    assert live(ahead, 96, with_reads_s=0.099, without_s=0.1) == 48
    assert not ahead.stats.paused
    assert ahead.choose(0, places(5), MB) == [5]
    assert live(ahead, 256, **times) == 256
    assert ahead.stats.switched_off == 2


def test_a_trial_is_not_moved_by_a_few_slow_tokens() -> None:
    ahead = prefetcher()
    for i in range(96):
        ahead.note_token(5.0 if i % 24 == 1 else 0.09 if ahead.active else 0.1)
    assert ahead.active
    assert ahead.stats.switched_off == 0


def test_forced_on_and_off() -> None:
    on, off = prefetcher("on"), prefetcher("off")
    for _ in range(100):
        on.note_outcome(used=False)
        on.note_token(1.0)
        off.note_token(1.0)
    assert on.choose(0, places(5, 6, 7, 8), MB) == [5, 6, 7]
    off.note_window(0, 1.0)
    assert off.choose(0, places(5, 6, 7), MB) == []
    with pytest.raises(RequestError):
        prefetcher("maybe")  # type: ignore[arg-type]
