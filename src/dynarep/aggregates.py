"""Estimates over a suite of tasks: rliable's estimators under its names, with intervals that hold for few seeds.

Scores are runs by tasks: a matrix (runs x tasks) or (runs x tasks x times) in rliable's layout, or a list with one
array (runs,) or (runs, times) per task where tasks have different numbers of runs. Tasks always weigh equally. Source:
Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice", and rliable 1.2.0.

**What is resampled** are whole runs within their task, so that what is said of a curve knows how a run's points hang
together. Every interval has a keyed generator and sorts runs and tasks first: neither the order of files nor another
method moves it. Two arms are resampled apart, as in rliable, although they may share seeds.

**Missing seeds and diverged runs.** A missing seed leaves its task with fewer runs of the same weight, and the figure
says "n of N"; without any run of a task there is no estimate. A run whose number is not finite diverged and counts at
the floor, the worst score (`at_floor`); a NaN is refused, never trimmed away.

**Which interval is used where.** Measured coverage of nominal 95 % intervals over 7 tasks, in per cent, ours / the
percentile bootstrap of rliable (2,000 data sets, 1,000 resamples; Monte-Carlo error .5):

    seeds per task                     IQM, 5      IQM, 10      mean, 5     mean, 10
    normal, tasks apart           95.9 / 90.3  95.0 / 91.7  95.0 / 90.1  94.5 / 92.5
    normal, tasks alike           95.0 / 92.3  95.0 / 93.7  95.6 / 91.5  95.0 / 93.4
    beta, tasks apart             95.9 / 90.5  95.0 / 92.9  95.5 / 90.8  95.4 / 94.0
    beta(.5, .5): fails or learns 93.4 / 90.7  95.0 / 94.2  94.8 / 90.5  96.0 / 93.7
    log-normal, sigma .5          94.5 / 90.3  94.0 / 92.1  94.0 / 88.5  93.8 / 91.5
    log-normal, sigma 1           94.8 / 91.4  94.7 / 93.2  88.5 / 83.7  90.3 / 88.3

Percentile intervals know neither the n-1 of the variance nor the tails of t, and BCa repairs neither: in 400 data sets
(IQM, normal, tasks apart) with 5 and 10 seeds it covered 88.0 and 93.0 %, percentile 88.0 and 92.0, ours 95.2 and 96.0;
with 5 seeds, log-normal, sigma 1: BCa 89.8, percentile 89.8, ours 93.5. So:

- **t**: IQM, mean, optimality gap (94.5 to 95.5 / 89.8 to 91.5 with 5 seeds), curves. Student's t with the jackknife's
  error, Welch and Satterthwaite's degrees of freedom; of a mean that is `stats.level`, the interval of the verdicts.
- **share**: probability of improvement, profile. The same, widened by what a task without any spread leaves in doubt;
  wide rather than narrow. Of an improvement, for a chance of .5, .7, .9, .97, with 5 seeds 96.0 / 93.4, 97.0 / 93.0,
  99.8 / 92.8, 100.0 / 92.4, with 10 95.0 / 94.8, 94.9 / 94.2, 97.5 / 95.0, 99.9 / 95.5. Of a profile at one score with
  5 seeds 95.9 to 99.8 / 80.7 to 90.0.
- **percentile**: median of tasks and share of tasks above a score, which have no smooth error. The median's interval
  is not to be trusted: 65 (log-normal, sigma 1) to 97 % with 5 seeds, 79 to 99 % with 10. Read the IQM.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from dynarep import stats
from dynarep.stats import CONFIDENCE, RESAMPLES, ROUNDING, Array, Key, sign_test

Scores = Sequence[npt.ArrayLike] | npt.NDArray[Any]
Tasks = list[Array]  # one array per task: (runs, ...), of resamples (resamples, runs, ...)

FEWER_RESAMPLES = 2_000  # of profiles, curves and pairs of methods; rliable's default there
_CHUNK = 2**18  # resampled values held at once; the result does not depend on it
_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Statistic:
    """A function of resampled arms, and the interval that suits it.

    Attributes:
        on: one list of tasks per arm, each (resamples, runs, ...) -> (resamples, ...).
        kind: t, share or percentile; see the module's docstring.
        shares: of a share, its value on each task: the same arguments -> (tasks, resamples, ...).
    """

    on: Callable[..., Array]
    kind: Literal["t", "share", "percentile"]
    shares: Callable[..., Array] | None = None


@dataclass(frozen=True)
class Estimate:
    """A point and two 95 % intervals, each of the shape of the statistic: () or along times or thresholds."""

    point: Array
    low: Array  # of the statistic's kind; unbounded where nothing can be said
    high: Array
    boot_low: Array  # stratified percentile bootstrap, as rliable's; NaN without resamples
    boot_high: Array
    runs: int  # over all tasks; of two arms, of the one that has fewer
    tasks: int


# -- rliable's estimators -----------------------------------------------------------------------------------------


def aggregate_iqm(scores: Scores) -> Array:
    """Interquartile mean of the runs of all tasks, a run weighing one over the number of runs of its task."""
    return _once(IQM, scores)


def aggregate_median(scores: Scores) -> Array:
    """Median over tasks of their mean scores."""
    return _once(MEDIAN, scores)


def aggregate_mean(scores: Scores) -> Array:
    """Mean over tasks of their mean scores."""
    return _once(MEAN, scores)


def aggregate_optimality_gap(scores: Scores, gamma: float = 1.0) -> Array:
    """How far runs fall short of `gamma` on average; better ones count as `gamma`."""
    return _once(Statistic(lambda x: _gap(x, gamma), "t"), scores)


def probability_of_improvement(scores_x: Scores, scores_y: Scores) -> Array:
    """Chance that a run of X beats one of Y on the same task, a tie counting half; mean over tasks."""
    return _once(IMPROVEMENT, scores_x, scores_y)


def score_distributions(scores: Scores, tau_list: npt.ArrayLike) -> Array:
    """Performance profile: share of runs with a score above each threshold, mean over tasks."""
    return _once(profile(tau_list), scores)


def average_score_distributions(scores: Scores, tau_list: npt.ArrayLike) -> Array:
    """Share of tasks whose mean score lies above each threshold."""
    return _once(average_profile(tau_list), scores)


# -- one number per run -------------------------------------------------------------------------------------------


def at_floor(scores: npt.ArrayLike, floor: float) -> Array:
    """Return scores with every one that is not finite at the floor: the run diverged."""
    values = np.asarray(scores, dtype=np.float64)
    return np.where(np.isfinite(values), values, floor)


def area_under_curve(x: npt.ArrayLike, curves: npt.ArrayLike) -> Array:
    """Return the mean height of each curve between its first and last x, by trapezoids: (..., times) -> (...)."""
    places, heights = _curves(x, curves)
    if len(places) == 1:
        return heights[..., 0]
    return np.asarray(np.trapezoid(heights, places, axis=-1) / (places[-1] - places[0]))


def time_to_threshold(x: npt.ArrayLike, curves: npt.ArrayLike, threshold: float) -> Array:
    """Return the first x at which each curve is at least `threshold`, infinite if never: (..., times) -> (...).

    The interquartile mean of such times is finite while at most a quarter of the runs never get there.
    """
    places, heights = _curves(x, curves)
    there = heights >= threshold
    return np.where(there.any(-1), places[there.argmax(-1)], np.inf)


def _curves(x: npt.ArrayLike, curves: npt.ArrayLike) -> tuple[Array, Array]:
    places, heights = np.asarray(x, dtype=np.float64), np.asarray(curves, dtype=np.float64)
    if places.ndim != 1 or not places.size or heights.ndim < 1 or heights.shape[-1] != places.size:
        raise ValueError(f"curves {heights.shape} over x {places.shape}; give one height for every x")
    if (np.diff(places) <= 0).any() or not np.isfinite(places).all():
        raise ValueError("x must be finite and increase")
    if np.isnan(heights).any():
        raise ValueError("curves: NaN among the heights; give diverged runs a floor first")
    return places, heights


# -- intervals ----------------------------------------------------------------------------------------------------


def interval(statistic: Statistic, *arms: Scores, key: Key = (), reps: int = RESAMPLES) -> Estimate:
    """Estimate a statistic of one arm, or of two on the same tasks.

    Args:
        statistic: IQM, MEDIAN, MEAN, GAP, IMPROVEMENT, `profile` or `average_profile`. All but the pair's and the
            profiles also go along times: sample-efficiency curves.
        arms: see the module's docstring.
        key: names the random stream, by convention (figure, method, metric).
        reps: resamples; 0 leaves the percentile interval out, unless it is the statistic's own.

    Raises:
        ValueError: a NaN, a task without runs, or arms that have different tasks.
    """
    samples = _canonical([_tasks(scores) for scores in arms])
    point = _at(statistic, samples)
    reps = reps or (FEWER_RESAMPLES if statistic.kind == "percentile" else 0)
    boot_low, boot_high = _percentiles(statistic, samples, key, reps) if reps else (np.full_like(point, math.nan),) * 2
    low, high = boot_low, boot_high
    if statistic.kind == "percentile":
        known = (boot_low < boot_high) | (not _uncertain(_one_set(samples)))
        low, high = np.where(known, boot_low, -np.inf), np.where(known, boot_high, np.inf)
    else:
        below, above = (half[0] for half in halves(statistic, _one_set(samples)))
        with np.errstate(invalid="ignore"):
            low, high = point - below, point + above
        if statistic.kind == "share":
            low, high = low.clip(0, 1), high.clip(0, 1)
    runs = min(sum(len(task) for task in arm) for arm in samples)
    return Estimate(point, low, high, boot_low, boot_high, runs, len(samples[0]))


def _percentiles(statistic: Statistic, samples: list[Tasks], key: Key, reps: int) -> tuple[Array, Array]:
    """Stratified percentile bootstrap."""
    parts = [task for arm in samples for task in arm]
    ends = np.cumsum([len(task) for task in parts])
    rows = max(1, _CHUNK // sum(task.size for task in parts))
    generator, found = stats.rng(*key), []
    for start in range(0, reps, rows):
        draw = generator.random((min(rows, reps - start), ends[-1]))
        drawn = iter(
            # floor(u * n) stays below n: u <= 1 - 2^-53
            task[(draw[:, end - len(task) : end] * len(task)).astype(np.intp)]
            for task, end in zip(parts, ends, strict=True)
        )
        found.append(statistic.on(*[[next(drawn) for _ in arm] for arm in samples]))
    with np.errstate(invalid="ignore"):
        bounds = np.quantile(np.concatenate(found), [_TAIL, 1 - _TAIL], axis=0)
    low, high = np.where(np.isnan(bounds), np.inf, bounds)  # between two infinite times
    return low, high


def halves(statistic: Statistic, samples: list[Tasks]) -> tuple[Array, Array]:
    """Return how far an interval reaches below and above its point: Student's t with the jackknife's error.

    Args:
        statistic: of kind t or share.
        samples: one list of tasks per arm, each (data sets, runs, ...).
    """
    variances, freedoms = [], []
    for a, k in itertools.product(range(len(samples)), range(len(samples[0]))):
        n = (task := samples[a][k]).shape[1]
        arms = [list(arm) for arm in samples]
        left_out = []
        for i in range(n if n > 1 else 0):
            arms[a][k] = np.delete(task, i, axis=1)
            left_out.append(statistic.on(*arms))
        with np.errstate(invalid="ignore"):  # infinite times
            variances.append(
                (n - 1) / n * np.square(left_out - np.mean(left_out, axis=0)).sum(0) if left_out else np.inf
            )
        freedoms.append(max(n - 1, 1))
    each = np.array(np.broadcast_arrays(*variances), dtype=np.float64)
    freedom, whole = np.array(freedoms, dtype=np.float64), each.sum(0)
    magnitude = max(float(np.abs(task[np.isfinite(task)]).max(initial=1.0)) for arm in samples for task in arm)
    flat = np.asarray(whole <= (ROUNDING * magnitude) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = 1 / np.tensordot(1 / freedom, (each / whole) ** 2, axes=1)  # Welch and Satterthwaite
        half = np.where(flat, 0.0, special.stdtrit(dof, 1 - _TAIL) * np.sqrt(whole))
    half = np.where(np.isnan(half), np.inf, half)  # of a task with a single run nothing is known, nor is of the rest
    if statistic.shares is not None:
        still = np.array(each <= (ROUNDING * magnitude) ** 2).reshape(len(samples), -1, *half.shape)
        return _doubted(half, statistic.shares(*samples), np.asarray(still.all(0)), samples)
    half = np.where(flat & _uncertain(samples), np.inf, half)
    return half, half


def _uncertain(samples: list[Tasks]) -> bool:
    """Return whether values without any spread are too few to be taken for certain; see `stats`, zero spread."""
    return sign_test([task.shape[1] for task in samples[0]]) > 1 - CONFIDENCE


def _doubted(half: Array, shares: Array, still: npt.NDArray[Any], samples: list[Tasks]) -> tuple[Array, Array]:
    """Widen by the tasks on which no spread is seen, (tasks, data sets, ...): all runs won, lost or tied.

    What n independent pairs (or runs) all do, the next one does with a probability of at least .025^(1/n), with 97.5 %
    confidence; the rest may go either way. The tasks' parts are combined as squares (MOVER: Zou and Donner, 2008,
    Statistics in Medicine 27, 1693-1702).
    """
    sizes = [min(arm[k].shape[1] for arm in samples) for k in range(len(samples[0]))]
    rest = np.array([(1 - _TAIL ** (1 / n)) / len(sizes) for n in sizes]).reshape(-1, *[1] * half.ndim)
    below, above = (np.sqrt(half**2 + (still * (way * rest) ** 2).sum(0)) for way in (shares, 1 - shares))
    return below, above


# -- statistics of resampled arms ---------------------------------------------------------------------------------


def profile(tau_list: npt.ArrayLike) -> Statistic:
    """Return the performance profile at some thresholds: runs above them."""
    taus = np.asarray(tau_list, dtype=np.float64)

    def shares(x: Tasks) -> Array:
        return np.array([(task[..., None] > taus).mean(1) for task in x])

    return Statistic(lambda x: shares(x).mean(0), "share", shares)


def average_profile(tau_list: npt.ArrayLike) -> Statistic:
    """Return the profile of tasks: those with a mean score above the thresholds."""
    taus = np.asarray(tau_list, dtype=np.float64)
    return Statistic(lambda x: (_means(x)[..., None] > taus).mean(0), "percentile")


def _iqm(x: Tasks) -> Array:
    """Return the mean without the lowest and the highest int(N / 4) of N runs; of unequal tasks, of as much weight."""
    pooled = np.concatenate(x, axis=1)
    sizes = [task.shape[1] for task in x]
    if len(set(sizes)) == 1:
        return stats.iqm(pooled, axis=1)
    if np.isnan(pooled).any():
        raise ValueError("iqm: NaN among the scores; give diverged runs a floor first")
    total = sum(sizes)
    cut = total // 4 / total
    weight = np.repeat([1 / (len(x) * size) for size in sizes], sizes)
    order = pooled.argsort(axis=1)
    below = weight[order].cumsum(1)
    kept = below.clip(cut, 1 - cut) - (below - weight[order]).clip(cut, 1 - cut)
    values = np.where(kept > 0, np.take_along_axis(pooled, order, axis=1), 0.0)
    mean: Array = (values * kept).sum(1) / kept.sum(1)
    return mean


def _means(x: Tasks) -> Array:
    """Return each task's mean, (tasks, resamples, ...)."""
    return np.array([task.mean(1) for task in x])


def _gap(x: Tasks, gamma: float = 1.0) -> Array:
    return np.asarray(gamma - _means([np.minimum(task, gamma) for task in x]).mean(0))


def _improvement(x: Tasks, y: Tasks) -> Array:
    """Return each task's chance that a run of x beats one of y: (tasks, resamples)."""
    pairs = [np.sign(a[:, :, None] - b[:, None, :]).mean((1, 2)) for a, b in zip(x, y, strict=True)]
    return np.asarray(0.5 + 0.5 * np.array(pairs))


IQM = Statistic(_iqm, "t")
MEDIAN = Statistic(lambda x: np.median(_means(x), axis=0), "percentile")
MEAN = Statistic(lambda x: _means(x).mean(0), "t")
GAP = Statistic(_gap, "t")
IMPROVEMENT = Statistic(lambda x, y: _improvement(x, y).mean(0), "share", _improvement)


# -- scores -------------------------------------------------------------------------------------------------------


def _tasks(scores: Scores) -> Tasks:
    """Return one checked array (runs, ...) per task."""
    if isinstance(scores, np.ndarray):
        if scores.ndim not in (2, 3):
            raise ValueError(f"scores: shape {scores.shape}; give runs x tasks, or runs x tasks x times")
        scores = list(np.moveaxis(scores, 1, 0))
    tasks = [np.asarray(values, dtype=np.float64) for values in scores]
    if not tasks:
        raise ValueError("scores: no tasks")
    for k, values in enumerate(tasks):
        if values.ndim not in (1, 2) or not values.size or values.shape[1:] != tasks[0].shape[1:]:
            raise ValueError(f"scores: task {k} has shape {values.shape}; give (runs,) or (runs, times), times alike")
        if np.isnan(values).any():
            raise ValueError(f"scores: NaN in task {k}; give diverged runs a floor first")
    return tasks


def _canonical(arms: list[Tasks]) -> list[Tasks]:
    """Sort runs within tasks, then tasks: the bytes of a result must not depend on the order of files."""
    if len({len(arm) for arm in arms}) > 1:
        raise ValueError(f"{' and '.join(str(len(arm)) for arm in arms)} tasks; both arms need the same tasks")
    ordered = [[np.array(sorted(task.tolist())) for task in arm] for arm in arms]
    together = sorted(zip(*ordered, strict=True), key=lambda tasks: [(len(task), task.tolist()) for task in tasks])
    return [list(arm) for arm in zip(*together, strict=True)]


def _one_set(samples: list[Tasks]) -> list[Tasks]:
    """Put an axis of data sets, or resamples, in front."""
    return [[task[None] for task in arm] for arm in samples]


def _at(statistic: Statistic, samples: list[Tasks]) -> Array:
    """Return the statistic of what was observed."""
    value: Array = np.asarray(statistic.on(*_one_set(samples))[0])
    return value


def _once(statistic: Statistic, *arms: Scores) -> Array:
    return _at(statistic, _canonical([_tasks(scores) for scores in arms]))
