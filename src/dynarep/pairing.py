"""The pairs of an experiment as points: a cheap measurement beside the difference in outcome that it should foretell.

Used where pairs are drawn and where they are judged, so that both say the same numbers. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dynarep import stats
from dynarep.statements import Average

Runs = Mapping[str, Mapping[int, float]]  # task -> seed -> value, all finite


class Interval(NamedTuple):
    """An average over seeds with its 95 % interval, of no use (infinite) where a task has a single seed."""

    point: float
    low: float
    high: float


class Setting(NamedTuple):
    """A pair that was measured."""

    predictor: Interval
    outcome: Interval


def measure(x: Runs, of: Runs, to: Runs, average: Average) -> Setting:
    """Place a pair; ValueError where a task has no values in common, or none that the average can be taken of."""
    return Setting(_predictor(x, average), _outcome(of, to))


def _predictor(runs: Runs, average: Average) -> Interval:
    """Average a cheap measurement over seeds, then over tasks with equal weights.

    Intervals are Student's t, of `geometric` on logarithms; of a median that of the sign test, for a single task.
    """
    values = [np.array(list(seeds.values())) for seeds in runs.values()]
    if average == "median":
        medians = [stats.median(each) for each in values]
        bounds = medians[0][1:] if len(medians) == 1 else (-math.inf, math.inf)
        return Interval(float(np.mean([point for point, _, _ in medians])), *bounds)
    estimate = stats.log_level(values, 1.0) if average == "geometric" else stats.level(values, 0.0)
    return Interval(estimate.point, estimate.low, estimate.high)


def _outcome(of: Runs, to: Runs) -> Interval:
    """Average the difference of two arms over the seeds that both have, then over tasks with equal weights."""
    common = {task: [seed for seed in of[task] if seed in to[task]] for task in of}
    left, right = ([np.array([arm[task][seed] for seed in common[task]]) for task in common] for arm in (of, to))
    estimate = stats.paired_difference(left, right)
    return Interval(estimate.point, estimate.low, estimate.high)


def rank(settings: Sequence[Setting], metric: str, outcome: str) -> stats.Estimate:
    """Correlate the ranks of predictors and outcomes; ValueError where there is no order to compare."""
    x, y = ([side.point for side in sides] for sides in zip(*settings, strict=True))
    return stats.rank_correlation(x, y, ("rank", metric, outcome))
