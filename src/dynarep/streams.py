"""Keyed random streams: every consumer draws from its own generator, derived from (run seed, purpose).

There is no global generator anywhere. Two variants of one seed share every stream whose key they share, so
comparisons are paired; and a draw never depends on how many other draws were made, on how many seeds run in the
same job, or on whether the job was interrupted. Source: ours (design section 3).
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import cast

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the generator of one purpose of one seed.

    Args:
        seed: the run's seed, >= 0.
        purpose: what the numbers are for, from general to special, e.g. ``("init", "critic", 0)``.

    The purpose enters as 128 bits of a SHA-256, so that neither spelling nor order can collide by accident.
    """
    key = tuple(map(int, _words(purpose)))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=key)))


def _words(purpose: Sequence[str | int]) -> np.ndarray:
    label = "\x1f".join(str(part) for part in purpose)
    return np.frombuffer(hashlib.sha256(label.encode()).digest()[:16], dtype="<u4")


# What NumPy's SeedSequence does with a spawn key of four words, and then to fill a generator's state: its constants.
_MIX_LEFT, _MIX_RIGHT, _SHIFT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715), np.uint32(16)


def _hash_constants(first: int, factor: int, used: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` successive pairs of what a hash is xor-ed and multiplied with, after `used` of them."""
    powers = [first * pow(factor, used + i, 2**32) % 2**32 for i in range(count + 1)]
    return np.array(powers[:-1], np.uint32), np.array(powers[1:], np.uint32)


_KEY = tuple(c.reshape(4, 4) for c in _hash_constants(0x43B0D7E5, 0x931E8875, 16, 16))
_STATE = _hash_constants(0x8B51F9DD, 0x58F38DED, 0, 8)


def streams(seeds: Sequence[int], *purpose: str | int) -> list[np.random.Generator]:
    """Return `stream(seed, *purpose)` of every seed, in a fifth of the time for ten of them.

    SeedSequence hashes the seed first, which is remembered, and the key after it, which is done for all seeds at once.
    """
    pool = _pools(tuple(seeds))
    keys = _hashed(_words(purpose)[:, None], *_KEY) * _MIX_RIGHT
    for key in keys:
        pool = pool * _MIX_LEFT - key
        pool ^= pool >> _SHIFT
    state = _hashed(np.concatenate([pool, pool], 1), *_STATE).view(np.uint64)
    return [np.random.Generator(np.random.PCG64(cast("np.random.SeedSequence", _Seeded(own)))) for own in state]


def _hashed(values: np.ndarray, xor: np.ndarray, times: np.ndarray) -> np.ndarray:
    values = (values ^ xor) * times
    values ^= values >> _SHIFT
    return values


@cache
def _pools(seeds: tuple[int, ...]) -> np.ndarray:
    """Return SeedSequence's pool of every seed before any key, (S, 4)."""
    return np.stack([np.random.SeedSequence(seed).pool for seed in seeds])


class _Seeded(ISeedSequence):
    """What a SeedSequence would say, known already."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        """Return the words: PCG64 asks once, for four of 64 bits."""
        return self._words


def integer(seed: int, *purpose: str | int) -> int:
    """Return one 31-bit integer of a stream, for libraries that want a seed instead of a generator."""
    return int(stream(seed, *purpose).integers(2**31 - 1))
