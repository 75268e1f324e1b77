"""Estimates over a suite of tasks: equal to rliable's, unmoved by order, as certain as they say."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from rliable import library, metrics

from dynarep import aggregates, stats
from dynarep.aggregates import GAP, IMPROVEMENT, IQM, MEAN, MEDIAN, interval

SCORES = st.floats(-2, 2).map(lambda x: round(x, 3))
SHAPES = [(1, 1), (3, 1), (5, 2), (10, 7), (13, 3)]
TAUS = np.linspace(-1, 2, 13)
OF_ONE = {"iqm": IQM, "median": MEDIAN, "mean": MEAN, "gap": GAP}


def scores_of(shape, seed=0):
    """Runs x tasks; one decimal, so that there are ties."""
    return np.random.default_rng([seed, *shape]).normal(0.5, 1, shape).round(1)


def suites(tasks=(1, 4), runs=(2, 5)):
    """A list of tasks of different numbers of runs."""
    return st.lists(st.lists(SCORES, min_size=runs[0], max_size=runs[1]), min_size=tasks[0], max_size=tasks[1])


# -- rliable ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["iqm", "median", "mean", "optimality_gap"])
def test_an_aggregate_is_rliables_of_the_same_name(name, shape):
    scores = scores_of(shape)
    ours, theirs = getattr(aggregates, f"aggregate_{name}"), getattr(metrics, f"aggregate_{name}")
    assert ours(scores) == pytest.approx(theirs(scores), rel=1e-12, abs=1e-14)
    if name == "optimality_gap":
        assert ours(scores, 0.3) == pytest.approx(theirs(scores, 0.3), rel=1e-12, abs=1e-14)
    over_time = np.random.default_rng(1).normal(size=(*shape, 3))
    np.testing.assert_allclose(ours(over_time), [theirs(over_time[..., t]) for t in range(3)], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_probability_of_improvement_is_rliables_ties_included(shape):
    x, y = scores_of(shape), scores_of((shape[0] + 2, shape[1]), 1)
    assert aggregates.probability_of_improvement(x, y) == pytest.approx(metrics.probability_of_improvement(x, y))
    assert aggregates.probability_of_improvement(x, x) == 0.5 == metrics.probability_of_improvement(x, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_performance_profiles_are_rliables(shape):
    scores = scores_of(shape)
    runs, tasks = library.score_distributions(scores, TAUS), library.average_score_distributions(scores, TAUS)
    np.testing.assert_allclose(aggregates.score_distributions(scores, TAUS), runs, atol=1e-14)
    np.testing.assert_allclose(aggregates.average_score_distributions(scores, TAUS), tasks, atol=1e-14)


def our_draws(sorted_arms, reps, key):
    """The indices that `interval` draws for matrices in its canonical order, (runs, tasks) per arm and resample."""
    sizes = [arm.shape[0] for arm in sorted_arms for _ in range(arm.shape[1])]
    draw = stats.rng(*key).random((reps, sum(sizes)))
    columns = np.split(draw, np.cumsum(sizes)[:-1], axis=1)
    indices = [(u * n).astype(int) for u, n in zip(columns, sizes, strict=True)]
    tasks = sorted_arms[0].shape[1]
    arms = [np.stack(indices[k * tasks : (k + 1) * tasks], axis=2) for k in range(len(sorted_arms))]
    return [[arm[r] for arm in arms] for r in range(reps)]


def canonical(scores):
    scores = np.sort(scores, axis=0)
    return scores[:, np.lexsort(scores[::-1])]


@pytest.mark.parametrize("name", [*OF_ONE, "profile", "average profile"])
def test_the_percentile_interval_of_one_arm_is_rliables_on_identical_draws(name):
    scores, reps, key = canonical(np.random.default_rng(2).normal(0.6, 0.5, (6, 4))), 300, ("same",)
    statistic, theirs = {
        "iqm": (IQM, metrics.aggregate_iqm),
        "median": (MEDIAN, metrics.aggregate_median),
        "mean": (MEAN, metrics.aggregate_mean),
        "gap": (GAP, metrics.aggregate_optimality_gap),
        "profile": (aggregates.profile(TAUS), lambda x: library.score_distributions(x, TAUS)),
        "average profile": (
            aggregates.average_profile(TAUS),
            lambda x: library.average_score_distributions(x, TAUS),
        ),
    }[name]
    draws = iter(our_draws([scores], reps, key))

    class OurDraws(library.StratifiedBootstrap):
        """rliable's own bootstrap class, with its unseeded draw replaced by ours."""

        def update_indices(self):
            return (next(draws)[0], *self._strata_indices)

    expected = OurDraws(scores).conf_int(lambda x: np.atleast_1d(theirs(x)), reps=reps, size=0.95, method="percentile")
    ours = interval(statistic, scores, key=key, reps=reps)
    np.testing.assert_allclose(np.atleast_1d(ours.point), np.atleast_1d(theirs(scores)), atol=1e-12)
    np.testing.assert_allclose(np.atleast_2d([ours.boot_low, ours.boot_high]).reshape(2, -1), expected, atol=1e-12)


def test_the_percentile_interval_of_an_improvement_is_rliables_on_identical_draws():
    x = canonical(np.random.default_rng(3).normal(0.6, 0.5, (6, 4)))
    y, reps, key = np.sort(np.random.default_rng(4).normal(0.5, 0.5, (4, 4)), axis=0), 300, ("pair",)
    draws = iter(our_draws([x, y], reps, key))

    class OurDraws(library.StratifiedIndependentBootstrap):
        """rliable's own class for two arms, with our draws."""

        def update_indices(self):
            places = zip(next(draws), self._args_strata_indices, strict=True)
            return [(index, *strata) for index, strata in places], {}

    theirs = OurDraws(x, y).conf_int(
        lambda a, b: np.array([metrics.probability_of_improvement(a, b)]), reps=reps, size=0.95, method="percentile"
    )
    ours = interval(IMPROVEMENT, x, y, key=key, reps=reps)
    np.testing.assert_allclose([ours.boot_low, ours.boot_high], theirs[:, 0], atol=1e-12)


def test_whole_runs_are_resampled_along_a_curve():
    """Each curve is flat; resampling its points apart would make the aggregate wiggle, and narrow at every point."""
    flat = np.repeat(np.random.default_rng(5).normal(size=(6, 3, 1)), 4, axis=2)
    along = interval(IQM, flat, key=("curve",), reps=200)
    for values in (along.point, along.low, along.high, along.boot_low, along.boot_high):
        assert len(set(values)) == 1
    assert along.boot_low[0] < along.point[0] < along.boot_high[0]


# -- order, keys, missing -----------------------------------------------------------------------------------------


def written(estimate):
    return [np.asarray(getattr(estimate, name)).tobytes() for name in estimate.__dataclass_fields__]


@given(suites(), st.randoms(use_true_random=False), st.sampled_from([IQM, MEDIAN, MEAN, GAP, aggregates.profile(TAUS)]))
@settings(max_examples=30, deadline=None)
def test_the_order_of_seeds_and_tasks_moves_no_byte(tasks, random, statistic):
    shuffled = [random.sample(task, len(task)) for task in random.sample(tasks, len(tasks))]
    whole = interval(statistic, tasks, key=("k",), reps=50)
    assert written(interval(statistic, shuffled, key=("k",), reps=50)) == written(whole)


@given(suites(), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_tasks_and_seeds_moves_no_byte_of_an_improvement_and_the_other_way_round_is_one_minus_it(
    tasks, random
):
    other = [[score + random.choice([-0.5, 0, 0.5]) for score in task[:2]] for task in tasks]
    whole = interval(IMPROVEMENT, tasks, other, key=("k",), reps=50)
    order = random.sample(range(len(tasks)), len(tasks))
    arms = [[random.sample(list(arm[k]), len(arm[k])) for k in order] for arm in (tasks, other)]
    assert written(interval(IMPROVEMENT, *arms, key=("k",), reps=50)) == written(whole)
    back = interval(IMPROVEMENT, other, tasks, key=("k",), reps=0)
    np.testing.assert_allclose([back.point, back.low, back.high], [1 - whole.point, 1 - whole.high, 1 - whole.low])
    assert 0 <= whole.low <= whole.point <= whole.high <= 1


@given(st.dictionaries(st.sampled_from("abcd"), suites((2, 2), (2, 3)), min_size=2))
@settings(max_examples=10, deadline=None)
def test_another_method_or_another_order_of_methods_moves_no_interval(arms):
    def each(names):
        return {name: written(interval(IQM, arms[name], key=("fig", name, "return"), reps=50)) for name in names}

    names = list(arms)
    assert each(reversed(names)) == each(names)
    assert each(names[:1]) == {names[0]: each(names)[names[0]]}


def test_the_key_decides_the_draws_and_the_size_of_a_chunk_does_not(monkeypatch):
    scores = scores_of((6, 3))
    whole = interval(IQM, scores, key=("a",), reps=333)
    assert interval(IQM, scores, key=("b",), reps=333).boot_low != whole.boot_low
    assert (whole.boot_low, whole.boot_high) == stats.bootstrap(scores, stats.iqm, 333, ("a",))
    monkeypatch.setattr(aggregates, "_CHUNK", 100)
    assert written(interval(IQM, scores, key=("a",), reps=333)) == written(whole)


def test_a_task_that_lost_seeds_weighs_as_much_as_the_others():
    """Pooled, as in rliable's matrix, the task with more runs would decide."""
    # eight runs of a task at 0, four of one at 1: each has half of the weight, a quarter of which is cut at either end
    full, half = [[0.0] * 8, [1.0] * 8], [[0.0] * 8, [1.0] * 4]
    for aggregate in (aggregates.aggregate_iqm, aggregates.aggregate_mean, aggregates.aggregate_median):
        assert aggregate(full) == aggregate(half) == 0.5
    assert aggregates.aggregate_optimality_gap(half) == 0.5
    assert aggregates.score_distributions(half, [0.5]) == 0.5
    repeated = [np.repeat([0.1, 0.5, 0.9], 4), np.repeat([0.2, 0.3, 0.7], 4)]
    fewer = [[0.1, 0.5, 0.9], np.repeat([0.2, 0.3, 0.7], 4)]
    assert abs(aggregates.aggregate_iqm(fewer) - aggregates.aggregate_iqm(repeated)) < 0.03
    assert interval(IQM, fewer, reps=0).runs == 15


@given(suites(runs=(2, 6)))
@settings(max_examples=30, deadline=None)
def test_unequal_tasks_are_trimmed_by_weight_as_equal_ones_by_number(tasks):
    """Copies of every run, as many as make the tasks equal, change no share of the weight; only the cut is rounded."""
    common = math.lcm(*map(len, tasks))
    copies = [np.repeat(task, common // len(task)) for task in tasks]
    total, pooled = sum(map(len, tasks)), np.sort(np.concatenate(copies))
    cut = total // 4 / total * len(pooled)
    whole, part = int(cut), cut - int(cut)
    weight = np.ones(len(pooled))
    for end in (slice(None), slice(None, None, -1)):
        weight[end][:whole] = 0
        weight[end][whole] -= part
    assert aggregates.aggregate_iqm(tasks) == pytest.approx((pooled * weight).sum() / weight.sum(), abs=1e-9)


def test_a_diverged_run_counts_at_the_floor_and_a_nan_is_never_trimmed_away():
    runs = [1.0, math.nan, math.inf, -math.inf, 0.5]
    assert aggregates.at_floor(runs, -0.1).tolist() == [1.0, -0.1, -0.1, -0.1, 0.5]
    for statistic in OF_ONE.values():
        with pytest.raises(ValueError, match="NaN in task 1; give diverged runs a floor first"):
            interval(statistic, [[1.0, 2.0], [1.0, math.nan]])


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([[]], "no tasks"),
        ([[[1.0], []]], r"task 1 has shape \(0,\)"),
        ([np.ones(3)], r"shape \(3,\); give runs x tasks"),
        ([[[[1.0, 2.0]], [[1.0]]]], r"task 1 has shape \(1, 1\)"),
        ([[[1.0]], [[1.0], [2.0]]], "1 and 2 tasks; both arms need the same tasks"),
    ],
)
def test_scores_of_a_wrong_shape_are_refused(arms, said):
    with pytest.raises(ValueError, match=said):
        interval(IMPROVEMENT if len(arms) > 1 else IQM, *arms)


# -- one number per run -------------------------------------------------------------------------------------------


def test_the_area_under_a_curve_is_its_mean_height_whatever_the_spacing():
    assert aggregates.area_under_curve([0, 1, 4], [[2.0, 4.0, 0.0], [3.0, 3.0, 3.0]]).tolist() == [(3 + 6) / 4, 3]
    assert aggregates.area_under_curve([7], [[2.0]]).tolist() == [2.0]
    with pytest.raises(ValueError, match="increase"):
        aggregates.area_under_curve([0, 0], [1.0, 2.0])
    with pytest.raises(ValueError, match="one height for every x"):
        aggregates.area_under_curve([0, 1, 2], [1.0, 2.0])
    with pytest.raises(ValueError, match="NaN"):
        aggregates.area_under_curve([0, 1], [1.0, math.nan])


def test_a_run_that_never_reaches_a_threshold_takes_forever_and_is_not_forgotten():
    times = aggregates.time_to_threshold([10, 20, 30], [[0.0, 0.6, 0.4], [0.5, 0.0, 0.0], [0.1, 0.2, 0.3]], 0.5)
    assert times.tolist() == [20, 10, math.inf]
    few = [[10.0, 20.0, 20.0, 30.0, 30.0, 40.0, 50.0, math.inf]]
    estimate = interval(IQM, few, key=("t",), reps=400)
    assert estimate.point == np.mean([20, 30, 30, 40])
    assert (estimate.low, estimate.high) != (estimate.point, estimate.point)
    assert estimate.boot_high == math.inf, "a resample in which three never get there"
    many = interval(IQM, [[10.0, math.inf, math.inf, math.inf]], reps=100)
    assert (many.point, many.high) == (math.inf, math.inf)


# -- certainty ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (10, 3)])
def test_the_interval_of_a_mean_is_students_t_of_the_verdicts(shape):
    scores = scores_of(shape)
    ours, verdict = interval(MEAN, scores, reps=0), stats.level(scores, 0.0)
    assert (ours.point, ours.low, ours.high) == pytest.approx((verdict.point, verdict.low, verdict.high), rel=1e-9)
    assert math.isnan(ours.boot_low), "no resamples were asked for"


def test_the_interval_of_an_iqm_worked_by_hand():
    """One task, five runs: leaving one out, one of four is cut at either end."""
    values = [0.0, 1.0, 3.0, 7.0, 20.0]
    left = [np.mean(np.sort(np.delete(values, k))[1:3]) for k in range(5)]
    error = math.sqrt(4 / 5 * np.square(left - np.mean(left)).sum())
    half = scipy.stats.t.ppf(0.975, 4) * error
    ours = interval(IQM, [values], reps=0)
    assert (ours.point, ours.low, ours.high) == pytest.approx((11 / 3, 11 / 3 - half, 11 / 3 + half))


@pytest.mark.parametrize("statistic", [IQM, MEAN, GAP, MEDIAN])
def test_values_without_spread_are_no_certainty_before_the_sign_test_allows_it(statistic):
    few, many = (interval(statistic, [[0.5] * n] * 2, reps=50) for n in (6, 7))
    assert (few.low, few.high) == (-math.inf, math.inf), "2 x 2^-5 exceeds .05"
    assert (many.low, many.high) == pytest.approx((0.5, 0.5)) == (few.point, few.point)


def test_a_single_run_of_a_task_leaves_everything_open():
    for statistic in (IQM, MEAN, GAP):
        ours = interval(statistic, [[0.1, 0.5, 0.4], [0.3]], reps=0)
        assert (ours.low, ours.high) == (-math.inf, math.inf)
    chance = interval(IMPROVEMENT, [[0.5]], [[0.1, 0.2]], reps=0)
    assert (chance.point, chance.low, chance.high) == (1, 0, 1)


def test_a_win_of_all_few_runs_on_every_task_is_not_certain():
    """All resamples are won too: rliable's interval is 1 to 1."""
    x, y = np.ones((5, 7)) + scores_of((5, 7)) / 100, scores_of((5, 7), 1) / 100
    ours = interval(IMPROVEMENT, x, y, reps=200)
    assert (ours.point, ours.boot_low, ours.boot_high, ours.high) == (1, 1, 1, 1)
    q = 0.025 ** (1 / 5)
    assert ours.low == pytest.approx(1 - (1 - q) / math.sqrt(7))
    back = interval(IMPROVEMENT, y, x, reps=0)
    assert (back.low, back.high) == pytest.approx((0, 1 - ours.low))
    tied = interval(IMPROVEMENT, [[0.0] * 5], [[0.0] * 5], reps=0)
    assert (tied.low, tied.high) == pytest.approx((q / 2, 1 - q / 2)), "ties may be of either kind next time"
    split = interval(IMPROVEMENT, [[1.0] * 5, [0.0] * 5], [[0.0] * 5, [1.0] * 5], reps=0)
    assert split.point == 0.5
    assert (split.low, split.high) == pytest.approx((0.5 - (1 - q) / 2, 0.5 + (1 - q) / 2))


# -- coverage by simulation ---------------------------------------------------------------------------------------

TASKS = 7
LEVELS = np.linspace(0.1, 0.9, TASKS)
LAWS = {
    "normal, tasks apart": lambda g, shape: LEVELS + 0.1 * g.standard_normal(shape),
    "normal, tasks alike": lambda g, shape: 0.5 + 0.2 * g.standard_normal(shape),
    "beta, tasks apart": lambda g, shape: g.beta(5 * LEVELS, 5 * (1 - LEVELS), shape),
    "fails or learns": lambda g, shape: g.beta(0.5, 0.5, shape),
    "log-normal, sigma .5": lambda g, shape: LEVELS * np.exp(0.5 * g.standard_normal(shape)),
    "log-normal, sigma 1": lambda g, shape: LEVELS * np.exp(g.standard_normal(shape)),
}


def sets_of(scores):
    """(data sets, runs, tasks) -> one array per task."""
    return list(np.moveaxis(scores, 2, 0))


def coverage(statistic, arms, true, resamples=0):
    """How often our interval, and the percentile interval, hold the truth; and their median widths.

    Arms are (data sets, runs, tasks). The indices of a resample are the same for all data sets.
    """
    samples = [sets_of(arm) for arm in arms]
    point = statistic.on(*samples)
    found = []
    if statistic.kind != "percentile":
        below, above = aggregates.halves(statistic, samples)
        found.append((point - below, point + above))
    if resamples:
        generator, results = stats.rng("resamples"), np.empty((resamples, len(point)))
        for r in range(resamples):
            drawn = [[t[:, generator.integers(0, t.shape[1], t.shape[1])] for t in arm] for arm in samples]
            results[r] = statistic.on(*drawn)
        found.append(tuple(np.quantile(results, [0.025, 0.975], axis=0)))
    return [(np.mean((low <= true + 1e-12) & (true - 1e-12 <= high)), np.median(high - low)) for low, high in found]


def truth(statistic, law):
    many = LAWS[law](stats.rng("truth", law), (200_000, TASKS))
    return float(statistic.on(sets_of(many[None]))[0])


def improved(chance, n, data_sets, tasks=TASKS):
    """Two arms of normal scores of which one beats the other with a given chance on every task."""
    shift = scipy.stats.norm.ppf(chance) * math.sqrt(2)
    x, y = stats.rng("pairs", n).standard_normal((2, data_sets, n, tasks))
    return x + shift, y


def test_the_simulations_judge_the_interval_that_is_reported():
    x, y = improved(0.7, 5, 3)
    for statistic, arms in ((IQM, (x,)), (GAP, (y,)), (IMPROVEMENT, (x, y))):
        below, above = aggregates.halves(statistic, [sets_of(arm) for arm in arms])
        for k in range(3):
            ours = interval(statistic, *(arm[k] for arm in arms), reps=0)
            expected = (ours.point - below[k], ours.point + above[k])
            assert (ours.low, ours.high) == pytest.approx(np.clip(expected, *((0, 1) if len(arms) > 1 else (-9, 9))))


@pytest.mark.slow
def test_intervals_cover_as_often_as_the_docstring_says():
    """Of the table, a cell in which rliable's interval is far too narrow, one of skew, and the improvement."""
    sets, resamples = 1000, 300
    for law, documented in (("normal, tasks apart", (0.959, 0.903)), ("log-normal, sigma 1", (0.948, 0.914))):
        scores = LAWS[law](stats.rng("again", law), (sets, 5, TASKS))
        found = coverage(IQM, [scores], truth(IQM, law), resamples)
        for (share, _), expected in zip(found, documented, strict=True):
            assert share == pytest.approx(
                expected, abs=3 * math.sqrt(expected * (1 - expected) * (1 / sets + 1 / 2000))
            )
    for chance, least in ((0.5, 0.96), (0.9, 0.998)):
        ((share, _),) = coverage(IMPROVEMENT, improved(chance, 5, sets), chance)
        assert share >= 0.95
        assert share == pytest.approx(least, abs=4 * math.sqrt(least * (1 - least) * (1 / sets + 1 / 2000)))
