"""Panels over a whole suite of tasks: aggregates, performance profile, probability of improvement, sample efficiency.

Scores are a metric over the panel's `full_score`; a run whose number is not finite counts as the panel's `worst`. Only
tasks that all shown arms are to run count, because averages over different tasks cannot be compared. An arm without any
run of one of them has no estimate, and says so. Estimators and intervals: `aggregates`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from dynarep import aggregates, records
from dynarep.experiment import Experiment
from dynarep.figures import palette
from dynarep.schema import Panel
from dynarep.stats import RESAMPLES

DIVERGED = "diverged"  # the series of the number of runs at the floor: one row per arm
STATISTICS = {
    "iqm": ("interquartile mean", aggregates.IQM),
    "median": ("median of tasks", aggregates.MEDIAN),
    "mean": ("mean", aggregates.MEAN),
    "optimality gap": ("optimality gap", aggregates.GAP),
}
THRESHOLDS = np.linspace(0, 1, 51)  # ours
STYLES = ["-", "--", ":", "-."]
NAME = 34  # characters of a line of an arm's name
ROW, AROUND = 0.36, 1.1  # inches of an arm, and of what stands around the arms
NARROWEST = 9.0  # inches of a figure with such a panel

Runs = Mapping[tuple[str, str], Mapping[int, records.RunRecord]]  # (task, variant) -> seed -> record
Scores = list[dict[int, np.ndarray]]  # per task: seed -> value(s)


def points(
    experiment: Experiment, panel: Panel, runs: Runs, planned: Mapping[tuple[str, str], int]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a panel over all tasks, without the panel's number.

    Args:
        experiment: whose variants are shown.
        panel: of a kind in `schema.SUITE`.
        runs: what is there.
        planned: (task, variant) -> number of seeds.
    """
    arms = [name for name in experiment.shown(panel) if any(variant == name for _, variant in planned)]
    tasks = [task for task in dict.fromkeys(task for task, _ in planned) if all((task, arm) in planned for arm in arms)]
    (metric,) = panel.metrics
    found: dict[str, tuple[list[float], Scores]] = {}
    for arm in arms if tasks else ():
        grid, scores, diverged = _scores(panel, metric, [runs.get((task, arm), {}) for task in tasks])
        found[arm] = grid, scores
        counts = {"n": sum(map(len, scores)), "planned": sum(planned[task, arm] for task in tasks)}
        where = {"task": " + ".join(tasks), "variant": arm}
        yield {**where, "series": DIVERGED, "estimate": diverged, **counts}
        if panel.kind == "improvement":
            continue
        if not all(scores) or not grid:
            yield {**where, "series": metric, "estimate": math.nan, **counts}
            continue
        values = [np.array(list(task.values())) for task in scores]
        key = (experiment.key, arm, metric)
        for row in _OF_ONE[panel.kind](values, grid, key):
            yield {**where, **row, **counts}
    for arm in arms if tasks and panel.kind == "improvement" else ():
        if arm == panel.of:
            continue
        mine, other = found[panel.of][1], found[arm][1]
        counts = {"n": min(sum(map(len, mine)), sum(map(len, other)))}
        counts["planned"] = min(sum(planned[task, name] for task in tasks) for name in (panel.of, arm))
        numbers: dict[str, Any] = {"estimate": math.nan}
        if all(mine) and all(other):
            pair = [[np.array(list(task.values())) for task in scores] for scores in (mine, other)]
            key = (experiment.key, f"{panel.of} > {arm}", metric)
            numbers = _numbers(aggregates.interval(aggregates.IMPROVEMENT, *pair, key=key, reps=0))
        yield {"task": " + ".join(tasks), "variant": arm, "series": metric, **numbers, **counts}


def _scores(panel: Panel, metric: str, found: list[Mapping[int, records.RunRecord]]) -> tuple[list[float], Scores, int]:
    """Return the places along training that all runs share, each task's scores, and how many runs are at the floor."""
    having = [
        {seed: record for seed, record in task.items() if len(record.series(metric)[0])} for task in found
    ]  # a run that never recorded the metric is missing
    grid, along = [math.nan], panel.kind == "efficiency"
    if along:
        places = [set(_along(record, metric, panel.x)) for task in having for record in task.values()]
        grid = sorted(set.intersection(*places)) if places else []
    scores, diverged = [], 0
    for task in having:
        values = {}
        for seed, record in task.items():
            curve = _along(record, metric, panel.x)
            raw = np.array([curve[x] for x in grid]) if along else np.array(record.last(metric))
            diverged += not np.isfinite(raw).all()
            values[seed] = aggregates.at_floor(raw, panel.floor) / panel.full_score
        scores.append(values)
    return grid, scores, diverged


def _along(record: records.RunRecord, metric: str, x: str) -> dict[float, float]:
    rows, values = record.series(metric)
    return dict(zip(record.columns[x][rows].tolist(), values.tolist(), strict=True))


def _aggregate(values: list[np.ndarray], grid: list[float], key: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for name, (_, statistic) in STATISTICS.items():
        reps = RESAMPLES if statistic.kind == "percentile" else 0
        yield {"series": name, **_numbers(aggregates.interval(statistic, values, key=(*key, name), reps=reps))}


def _profile(values: list[np.ndarray], grid: list[float], key: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    shares = aggregates.interval(aggregates.profile(THRESHOLDS), values, key=key, reps=0)
    for tau, point, low, high in zip(THRESHOLDS, shares.point, shares.low, shares.high, strict=True):
        yield {"series": "profile", "x": tau, "estimate": point, "low": low, "high": high}


def _efficiency(values: list[np.ndarray], grid: list[float], key: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    curve = aggregates.interval(aggregates.IQM, values, key=key, reps=0)
    for k, x in enumerate(grid):
        numbers = {"estimate": curve.point[k], "low": curve.low[k], "high": curve.high[k]}
        yield {"series": "iqm", "x": x, **_said(numbers)}


def _numbers(estimate: aggregates.Estimate) -> dict[str, float]:
    return _said({name: float(getattr(estimate, name)) for name in ("low", "high")}) | {
        "estimate": float(estimate.point)
    }


def _said(numbers: dict[str, float]) -> dict[str, float]:
    """Leave a bound empty that says nothing."""
    return {name: float(value) if math.isfinite(value) else math.nan for name, value in numbers.items()}


_OF_ONE = {"aggregate": _aggregate, "profile": _profile, "efficiency": _efficiency}


def said(overall: pd.DataFrame, experiment: Experiment) -> list[str]:
    """Return what the note under a figure says of its panels over all tasks."""
    words = []
    for arm, rows in overall[(overall["series"] == DIVERGED) & (overall["n"] < overall["planned"])].groupby(
        "variant", sort=False
    ):
        n, planned = rows[["n", "planned"]].iloc[0]
        words.append(f"{experiment.spec.variants[str(arm)].label}: {n:.0f} of {planned:.0f} runs.")
    if len(overall) and (~overall["task"].str.contains(" + ", regex=False)).all():
        words.append("Aggregates over a single task: they say nothing about a suite.")
    return words


# -- the drawing --------------------------------------------------------------------------------------------------


def height(experiment: Experiment, panel: Panel) -> float:
    """Return the inches that a panel needs."""
    return 2.7 if panel.kind in ("profile", "efficiency") else AROUND + ROW * len(experiment.shown(panel))


def draw(image: Any, ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """Draw a panel into the place of `ax`, with how much it rests on above it."""
    tasks = str(points["task"].iloc[0]).split(" + ")
    size = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}, {points['planned'].max():.0f} runs of each arm"
    said = f"{size}: a single task is no suite" if len(tasks) == 1 else size
    if panel.kind == "aggregate":
        _draw_aggregates(image, ax, panel, points, experiment, said)
        return
    ax.set_title(said, loc="left", fontsize=9)
    if panel.kind == "improvement":
        _draw_improvement(ax, panel, points, experiment)
        return
    colours, styles = _looks(experiment)
    for name, line in points[points["series"] != DIVERGED].groupby("variant", sort=False):
        arm = str(name)
        look = {"marker": "o", "ms": 4} if len(line) == 1 else {}
        label = _label(arm, points, experiment)
        drawstyle = "steps-post" if panel.kind == "profile" else "default"
        ax.plot(line["x"], line["estimate"], styles[arm], color=colours[arm], lw=1.6, label=label, ds=drawstyle, **look)
        step = "post" if panel.kind == "profile" else None
        ax.fill_between(line["x"], line["low"], line["high"], color=colours[arm], alpha=0.13, lw=0, step=step)
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel(textwrap.fill(panel.label, 30))
    if panel.kind == "profile":
        ax.set_xlabel(f"score τ: {next(iter(panel.metrics.values()))}{_over(panel)}")
    else:
        ax.set_xlabel({"update": "updates", "frame": "frames", "agent_step": "agent steps"}[panel.x])


def _draw_aggregates(
    image: Any, ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment, said: str
) -> None:
    """A column per statistic, a row per arm: the estimate and its interval; hollow where there is no interval."""
    cells = ax.get_subplotspec().subgridspec(1, len(STATISTICS), wspace=0.06)
    ax.remove()
    arms = [arm for arm in experiment.shown(panel) if arm in set(points["variant"])]
    for column, (name, (title, _)) in enumerate(STATISTICS.items()):
        place = image.add_subplot(cells[column])
        place.set_title(title, fontsize=9)
        _rows(place, arms, points[points["series"] == name], experiment)
        place.set_xlim(-0.05, 1.05)
        if column:
            place.set_yticklabels([])
        else:
            place.set_yticks(range(len(arms)), [_label(arm, points, experiment) for arm in arms], fontsize=8)
            below = {"xytext": (0, -20), "textcoords": "offset points", "va": "top", "xycoords": "axes fraction"}
            place.annotate(f"{panel.label}{_over(panel)}; {said}", (0, 0), **below).set_in_layout(False)
        place.set_xlabel(" ")  # room for it


def _draw_improvement(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """A row per other arm; left of the dotted line it is the better one."""
    arms = [arm for arm in experiment.shown(panel) if arm != panel.of and arm in set(points["variant"])]
    _rows(ax, arms, points[points["series"] != DIVERGED], experiment)
    ax.axvline(0.5, color="0.35", lw=1, ls=(0, (1, 1.5)))
    ax.set_yticks(range(len(arms)), [_label(arm, points, experiment) for arm in arms], fontsize=8)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel(f"chance that {_label(panel.of, points, experiment)} is better: {next(iter(panel.metrics.values()))}")


def _rows(ax: Any, arms: list[str], points: pd.DataFrame, experiment: Experiment) -> None:
    """Draw a mark per arm, the first above; hollow where there is no interval."""
    colours, _ = _looks(experiment)
    for place, arm in enumerate(arms):
        own = points[(points["variant"] == arm) & points["estimate"].notna()]
        for estimate, low, high in own[["estimate", "low", "high"]].astype(float).to_numpy():
            known = not np.isnan(low)
            if known:
                ax.plot([low, high], [place, place], color=colours[arm], lw=2, solid_capstyle="butt")
            fill = colours[arm] if known else "white"
            ax.plot(estimate, place, "o", ms=5, color=colours[arm], mfc=fill, clip_on=False, zorder=3)
    ax.set_yticks(range(len(arms)))
    ax.set_ylim(len(arms) - 0.5, -0.5)


def _looks(experiment: Experiment) -> tuple[dict[str, Any], dict[str, str]]:
    """Return every variant's colour and line style, those of curves."""
    names = list(experiment.spec.variants)
    colours = palette.colours(len(names))
    return dict(zip(names, colours, strict=True)), {name: STYLES[k % len(STYLES)] for k, name in enumerate(names)}


def _label(arm: str, points: pd.DataFrame, experiment: Experiment) -> str:
    """Return an arm's name, with what is missing of it and what diverged."""
    own, counts = points[points["variant"] == arm], []
    for fell, n, planned in own[own["series"] == DIVERGED][["estimate", "n", "planned"]].astype(int).to_numpy():
        counts += [f"{n} of {planned} runs"] * int(n < planned) + [f"{fell} diverged"] * int(fell > 0)
    counts += ["a task has none"] * bool(own["estimate"].isna().any())
    name = textwrap.fill(experiment.spec.variants[arm].label, NAME)
    return f"{name}\n({', '.join(counts)})" if counts else name


def _over(panel: Panel) -> str:
    return f" / {panel.full_score:g}" if panel.full_score != 1 else ""
