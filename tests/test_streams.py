"""Keyed streams: the same numbers for ever, and no consumer's draws depend on another's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynarep.streams import integer, stream, streams

PURPOSE = st.lists(st.one_of(st.text("ab /", max_size=4), st.integers(0, 9)), min_size=1, max_size=3)
KEYS = st.lists(st.tuples(st.integers(0, 2**40), PURPOSE.map(tuple)), min_size=1, max_size=4, unique=True)


def label(key):
    return key[0], tuple(map(str, key[1]))


def test_the_derivation_of_streams_has_not_changed():
    """If it has, every run that was ever made is of other numbers: raise `experiment.FORMAT`."""
    np.testing.assert_array_equal(
        stream(0, "init", "critic", 0).integers(2**31 - 1, size=4), [1580661455, 1408225176, 1729568485, 784845956]
    )
    np.testing.assert_allclose(
        stream(7, "replay", 3).uniform(size=3),
        [0.13675626180873657, 0.39143113418237485, 0.11352035925675863],
        rtol=0,
        atol=0,
    )
    assert integer(1, "environment", 0) == 1_729_452_988


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**128 - 1) | st.integers(0, 50), min_size=1, max_size=12), PURPOSE)
def test_streams_of_a_block_are_those_of_its_seeds(seeds, purpose):
    together = streams(seeds, *purpose)
    for seed, generator in zip(seeds, together, strict=True):
        alone = stream(seed, *purpose)
        assert generator.bit_generator.state == alone.bit_generator.state
        assert generator.bytes(8) == alone.bytes(8)


@settings(deadline=None)
@given(KEYS)
def test_streams_of_different_seeds_or_purposes_differ(keys):
    drawn = {label(key): stream(key[0], *key[1]).bytes(16) for key in keys}
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "ab", "c"), (0, "a", "bc")),
        ((0, "a", "b"), (0, "b", "a")),
        ((0, "a"), (0, "a", "")),
        ((0, "a", 1), (0, "a", 11)),
        ((0, "a", 1, 2), (0, "a", 12)),
        ((1, "a", 0), (0, "a", 1)),
        ((0, "a"), (0, "A")),
    ],
)
def test_keys_that_look_alike_have_streams_of_their_own(one, other):
    assert stream(*one).bytes(16) != stream(*other).bytes(16)


@settings(deadline=None)
@given(KEYS, st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=12))
def test_a_streams_draws_do_not_depend_on_other_draws(keys, turns):
    """Otherwise a seed's result would depend on the block that it ran in."""
    together = [stream(seed, *purpose) for seed, purpose in keys]
    mixed: list[list[float]] = [[] for _ in keys]
    for turn, count in turns:
        mixed[turn % len(keys)] += list(together[turn % len(keys)].uniform(size=count))
    np.random.default_rng(0).uniform(size=3)
    for (seed, purpose), numbers in zip(keys, mixed, strict=True):
        assert list(stream(seed, *purpose).uniform(size=len(numbers))) == numbers


@settings(deadline=None)
@given(st.integers(0, 2**63), PURPOSE)
def test_integers_are_seeds_that_every_library_takes(seed, purpose):
    number = integer(seed, *purpose)
    assert type(number) is int
    assert 0 <= number < 2**31 - 1
    assert number == integer(seed, *purpose)


def test_integers_fill_their_range():
    numbers = [integer(seed, "range") for seed in range(400)]
    assert min(numbers) < 2**31 * 0.02
    assert max(numbers) > 2**31 * 0.98
    assert len(set(numbers)) == 400


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        stream(-1, "init")
