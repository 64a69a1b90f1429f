import numpy as np
import pytest

from fomoe.errors import RequestError
from fomoe.sampling import Sampler, Sampling, _largest


def draw(logits, n=1, history=(), **options):
    sampler = Sampler(Sampling(seed=7, **options))
    return [sampler.sample(np.asarray(logits, np.float32), history) for _ in range(n)]


def test_temperature_zero_takes_the_likeliest():
    assert draw([0.0, 3.0, 1.0], temperature=0.0) == [1]


def test_draws_follow_the_probabilities():
    logits = np.log([0.5, 0.3, 0.2])
    drawn = np.bincount(draw(logits, 20000, temperature=1.0, top_p=1.0, min_p=0.0)) / 20000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.2], atol=0.02)


def test_temperature_sharpens():
    drawn = np.bincount(draw(np.log([0.5, 0.3, 0.2]), 20000, temperature=0.5, top_p=1, min_p=0))
    np.testing.assert_allclose(drawn / 20000, np.array([25, 9, 4]) / 38, atol=0.02)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2, "top_p": 1.0, "min_p": 0.0}, {0, 1}),
        ({"top_k": 0, "top_p": 0.75, "min_p": 0.0}, {0, 1}),
        ({"top_k": 0, "top_p": 0.4, "min_p": 0.0}, {0}),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.5}, {0, 1}),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {0, 1, 2}),
    ],
)
def test_truncation(options, allowed):
    assert set(draw(np.log([0.5, 0.3, 0.2]), 500, temperature=1.0, **options)) == allowed


def test_a_seed_repeats_the_draws():
    logits = np.zeros(1000)
    assert draw(logits, 20) == draw(logits, 20)


def test_penalties_look_at_recent_tokens():
    greedy = {"temperature": 0.0}
    assert draw([2.0, 1.9], history=[0], repeat_penalty=1.5, **greedy) == [1]
    assert draw([-1.0, -1.1], history=[0], repeat_penalty=1.5, **greedy) == [1]
    assert draw([2.0, 1.9], history=[0], presence_penalty=0.2, **greedy) == [1]
    assert draw([2.0, 1.7], history=[0, 0], frequency_penalty=0.2, **greedy) == [1]
    assert draw([2.0, 1.9], history=[0, 1], repeat_last_n=1, presence_penalty=1, **greedy) == [0]


@pytest.mark.parametrize("k", [1, 5, 40, 300])
def test_largest_equals_a_full_sort(k):
    rng = np.random.default_rng(k)
    for size in (300, 4096, 100_003):
        logits = rng.standard_normal(size).astype(np.float32)
        np.testing.assert_array_equal(_largest(logits, k), np.argsort(-logits)[:k])


def test_largest_survives_ties():
    assert len(_largest(np.zeros(100_000, np.float32), 40)) == 40


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"seed": -2}]
)
def test_bad_options_are_refused(bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        Sampling(**bad)
