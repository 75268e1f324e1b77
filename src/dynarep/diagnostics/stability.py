"""How steadily a return curve climbs: relative draw-downs (`mad-td` 7.3; the measure is ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def drawdown(curve: Sequence[float], window: int = 3) -> tuple[float, float]:
    """Return mean and maximum of DD_t = (best so far - now) / best so far, of a smoothed return curve (`mad-td` 7.3).

    Args:
        curve: returns in order, from the point on where falls count (after the warm-up).
        window: each smoothed return is the mean of so many, the newest of them included. Only whole windows count: a
            mean of fewer is more often high by luck, and whatever follows looks like a fall.

    Returns:
        Both lie in [0, 1] if no return is negative; 0 is a curve that never falls. A fall from a best that is not above
        0 has no relative size and is left out. NaN if nothing can be compared, or if a return is not finite: a policy
        that diverged has none, and to pass over it would call the worst runs stable.
    """
    values = np.asarray(curve, np.float64)
    if len(values) < window or not np.isfinite(values).all():
        return math.nan, math.nan
    smooth = np.lib.stride_tricks.sliding_window_view(values, window).mean(-1)
    best = np.maximum.accumulate(smooth)
    falls = 1.0 - smooth[best > 0] / best[best > 0]
    return (float(falls.mean()), float(falls.max())) if len(falls) else (math.nan, math.nan)
