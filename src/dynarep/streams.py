"""Keyed random streams: every consumer draws from its own generator, derived from (run seed, purpose).

There is no global generator anywhere. Two variants of one seed share every stream whose key they share, so
comparisons are paired; and a draw never depends on how many other draws were made, on how many seeds run in the
same job, or on whether the job was interrupted. Source: ours (design section 3).
"""

import hashlib

import numpy as np


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the generator of one purpose of one seed.

    Args:
        seed: the run's seed, >= 0.
        purpose: what the numbers are for, from general to special, e.g. ``("init", "critic", 0)``.

    The purpose enters as 128 bits of a SHA-256, so that neither spelling nor order can collide by accident.
    """
    label = "\x1f".join(str(part) for part in purpose)
    words = np.frombuffer(hashlib.sha256(label.encode()).digest()[:16], dtype="<u4")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=tuple(map(int, words)))))


def integer(seed: int, *purpose: str | int) -> int:
    """Return one 31-bit integer of a stream, for libraries that want a seed instead of a generator."""
    return int(stream(seed, *purpose).integers(2**31 - 1))
