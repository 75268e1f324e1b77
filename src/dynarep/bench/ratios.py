"""The same work done in two ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Report = Callable[[int, int], None]  # takes rounds done and rounds in all


@dataclass(frozen=True)
class Ratio:
    """The same work done in two ways: milliseconds of each, and how many times as fast ours is."""

    name: str
    ms: float
    other_ms: float
    ratio: float  # median over rounds, of the ratio within a round
    low: float  # lowest and highest round
    high: float
    target: float | None = None
    met: bool | None = None


def compared(name: str, ours: np.ndarray, theirs: np.ndarray, target: float | None = None) -> Ratio:
    """Compare seconds for the same work, one number per round."""
    ratios = theirs / ours
    ratio, low, high = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
    ms, other_ms = float(np.median(ours)) * 1e3, float(np.median(theirs)) * 1e3
    return Ratio(name, ms, other_ms, ratio, low, high, target, None if target is None else ratio >= target)
