"""A panel with a point per pair of the experiment: does the cheap measurement foretell the difference in outcome?

The tidy table has two rows per setting, both under its label: its predictor, and its outcome with the predictor as x.
A last row has the rank correlation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import patheffects

from dynarep import pairing, records
from dynarep.experiment import Experiment
from dynarep.figures import palette
from dynarep.schema import Pair, Panel

RANK = "rank correlation"  # the series of the number over all settings
MARKERS = "osD^vP*X"
LETTERS = 7.5  # points, of the numbers in the panel
FAR = 12  # points from a point to its number, from which a line joins them


def points(
    experiment: Experiment, panel: Panel, tier: str, runs: Mapping[tuple[str, str], Mapping[int, records.RunRecord]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a scatter, without the panel's number.

    Values that are not finite are left out, and seeds that only one arm of an outcome has; a pair of which a task has
    nothing left has no point.

    Args:
        experiment: with pairs.
        panel: the scatter.
        tier: name of the tier.
        runs: (task, variant) -> seed -> record.
    """
    (metric,), settings, every = panel.metrics, [], []
    for label, jobs in experiment.pair_jobs(tier).items():
        pair = next(pair for pair in experiment.spec.pairs if pair.label == label)
        tasks = list(dict.fromkeys(job.task for job in jobs))
        planned: dict[str, set[tuple[str, int]]] = {arm: set() for arm in pair.variants}
        for job in jobs:
            planned[job.variant] |= {(job.task, seed) for seed in job.seeds}
        x, of, to = (
            {task: _last(runs.get((task, arm), {}), name) for task in tasks}
            for arm, name in ((pair.predictor, metric), (pair.of, panel.outcome), (pair.to, panel.outcome))
        )
        try:
            setting = pairing.measure(x, of, to, panel.average)
        except ValueError:
            continue
        settings.append(setting)
        every += tasks
        both = {task: [seed for seed in of[task] if seed in to[task]] for task in tasks}
        where = {"task": " + ".join(tasks), "variant": label}
        n, wanted = min(map(len, x.values())), _fewest(tasks, planned[pair.predictor])
        yield {**where, "series": metric, **_numbers(setting.predictor), "n": n, "planned": wanted}
        n, wanted = min(map(len, both.values())), _fewest(tasks, planned[pair.of] & planned[pair.to])
        place = {"x": setting.predictor.point, **_numbers(setting.outcome), "n": n, "planned": wanted}
        yield {**where, "series": panel.outcome, **place}
    try:
        rank = pairing.rank(settings, metric, panel.outcome)
    except ValueError:
        return  # too few settings, or no order among them
    numbers = {"estimate": rank.point, "low": rank.low, "high": rank.high}
    counts = {"n": rank.n, "planned": len(experiment.spec.pairs)}
    yield {"task": " + ".join(dict.fromkeys(every)), "series": RANK, "variant": "all settings", **numbers, **counts}


def _last(found: Mapping[int, records.RunRecord], metric: str) -> dict[int, float]:
    values = {seed: record.last(metric) for seed, record in found.items() if len(record.series(metric)[0])}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _fewest(tasks: list[str], runs: set[tuple[str, int]]) -> int:
    """Count the seeds of the task that has the fewest."""
    return min(sum(task == own for own, _ in runs) for task in tasks)


def _numbers(interval: pairing.Interval) -> dict[str, float]:
    """Return an interval's columns; a bound that says nothing is left empty."""
    low, high = (bound if math.isfinite(bound) else math.nan for bound in interval[1:])
    return {"estimate": interval.point, "low": low, "high": high}


# -- the drawing --------------------------------------------------------------------------------------------------


def lines(pairs: tuple[Pair, ...]) -> list[str]:
    """Return the lines of the legend: the numbered settings, a heading before those of each series."""
    heads = dict.fromkeys(pair.series for pair in pairs)
    return [f"{k}  {pair.label}" for k, pair in enumerate(_ordered(pairs), 1)] + [head for head in heads if head]


def _ordered(pairs: tuple[Pair, ...]) -> list[Pair]:
    """Return the pairs with those of a series together: their numbers count in this order."""
    heads = list(dict.fromkeys(pair.series for pair in pairs))
    return sorted(pairs, key=lambda pair: heads.index(pair.series))


def draw(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """Draw a numbered point per setting with both intervals; `number` writes the numbers, once the layout is made."""
    pairs = _ordered(experiment.spec.pairs)
    heads = list(dict.fromkeys(pair.series for pair in pairs))
    colours = palette.colours(len(heads))
    places = points[points["x"].notna() & (points["series"] != RANK)].set_index("variant")
    predictors = points[points["x"].isna() & (points["series"] != RANK)].set_index("variant")
    ax.axhline(0, color="0.35", lw=0.8)
    legend: dict[str, Any] = {}
    ax.numbers = []
    for number, pair in enumerate(pairs, 1):
        if pair.label not in places.index:
            continue
        if pair.series and pair.series not in legend:
            legend[pair.series] = ax.plot([], [], " ")[0]
        y, x, kind = places.loc[pair.label], predictors.loc[pair.label], heads.index(pair.series)
        bars = [
            np.nan_to_num([[row["estimate"] - row["low"]], [row["high"] - row["estimate"]]]).astype(float)
            for row in (x, y)
        ]
        look = {"color": colours[kind], "marker": MARKERS[kind % len(MARKERS)], "ms": 5, "ls": "none"}
        name = f"{number}  {pair.label}"
        legend[name] = ax.errorbar(x["estimate"], y["estimate"], bars[1], bars[0], elinewidth=0.8, label=name, **look)
        ax.numbers.append((str(number), x["estimate"], y["estimate"], bars[0], bars[1]))
    texts = ax.legend(legend.values(), legend.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5)).get_texts()
    for text in texts:
        text.set_weight("bold" if text.get_text() in heads else "normal")
    ax.set_xlabel(panel.x_label if "x_label" in panel.model_fields_set else next(iter(panel.metrics.values())))
    rank = points[points["series"] == RANK]
    said = "no rank correlation"
    if len(rank):
        row = rank.iloc[0]
        said = (
            f"Spearman's \u03c1 = {row['estimate']:.2f} [{row['low']:.2f}, {row['high']:.2f}], {row['n']:.0f} settings"
        )
    ax.set_title(said, loc="left", fontsize=9)
    ax.margins(x=0.08, y=0.1)


def number(ax: Any) -> None:
    """Write each point's number where it hides least: no marker, no other number, as few bars as can be."""
    scale = 72 / ax.figure.dpi  # from pixels to points
    frame = ax.get_window_extent()
    inside = np.array([frame.x0, frame.y0, frame.x1, frame.y1]) * scale
    at = [ax.transData.transform((x, y)) * scale for _, x, y, _, _ in ax.numbers]
    marks = [_box(x, y, 7, 7) for x, y in at]
    bars = []
    for _, x, y, across, up in ax.numbers:
        for low, high in (
            ((x - across[0, 0], y), (x + across[1, 0], y)),
            ((x, y - up[0, 0]), (x, y + up[1, 0])),
        ):
            ends = np.array([ax.transData.transform(low), ax.transData.transform(high)]) * scale
            bars.append(np.array([*ends.min(0), *ends.max(0)]))
    taken: list[np.ndarray] = []
    for (text, x, y, _, _), (left, bottom) in zip(ax.numbers, at, strict=True):
        wide = 0.65 * LETTERS * len(text) + 1

        def cost(place: tuple[float, float], left: float = left, bottom: float = bottom, wide: float = wide) -> float:
            box = _box(left + place[0], bottom + place[1], wide, LETTERS)
            out = max(0.0, *(inside[:2] - box[:2]), *(box[2:] - inside[2:]))
            hidden = 10 * sum(_overlap(box, other) for other in taken) + 5 * sum(
                _overlap(box, other) for other in marks
            )
            crossed = sum(_overlap(box, bar + np.array([-0.5, -0.5, 0.5, 0.5])) for bar in bars)
            return float(100 * out + hidden + crossed + 0.3 * math.hypot(*place))

        places = [
            (far * math.cos(turn * math.pi / 4), far * math.sin(turn * math.pi / 4))
            for far, turn in itertools.product((8, 10, 13, 17, 22, 28), (1, 3, 7, 5, 0, 2, 4, 6))
        ]
        best = min(places, key=cost)
        taken.append(_box(left + best[0], bottom + best[1], wide, LETTERS))
        joined = {"arrowstyle": "-", "lw": 0.6, "color": "0.2", "shrinkA": 4, "shrinkB": 1}
        ax.annotate(
            text,
            (x, y),
            best,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=LETTERS,
            arrowprops=joined if math.hypot(*best) > FAR else None,
            path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
        )


def _box(x: float, y: float, wide: float, tall: float) -> np.ndarray:
    return np.array([x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(sides.prod()) if (sides > 0).all() else 0.0
