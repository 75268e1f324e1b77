"""How kernels start: (rng, fan_in, fan_out) -> kernel (fan_in, fan_out). Biases start at 0, scales at 1 (nets.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Initialiser = Callable[[np.random.Generator, int, int], np.ndarray]


def uniform_fan_in(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
    """Kernel with uniform entries of variance 0.3333 / fan_in (`mad-td` 3.3), shape (fan_in, fan_out)."""
    limit = math.sqrt(0.9999 / fan_in)
    return rng.uniform(-limit, limit, size=(fan_in, fan_out))


def orthogonal(gain: float) -> Initialiser:
    """Return the initialiser of kernels whose shorter side is orthonormal, times `gain`, uniformly distributed.

    The QR decomposition of a Gaussian matrix is uniform (Haar) once R's diagonal is made positive (Mezzadri 2007).
    """

    def init(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
        q, r = np.linalg.qr(rng.standard_normal((max(fan_in, fan_out), min(fan_in, fan_out))))
        q *= gain * np.sign(np.diag(r))
        return q if fan_in >= fan_out else q.T

    return init


def halves(first: Initialiser, second: Initialiser) -> Initialiser:
    """Return the initialiser of two heads in one kernel: `first` draws the first half of the outputs."""

    def init(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
        return np.hstack([draw(rng, fan_in, fan_out // 2) for draw in (first, second)])

    return init
