"""Records -> one tidy table per figure -> CSV, SVG, PDF, PNG.

The image is drawn from the table alone, so the CSV beside it holds every number that is seen. Same table, same bytes:
no dates, fixed SVG identifiers. Colours are seaborn's colour-blind palette; line styles and markers say the same again.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogFormatter
from scipy import stats as sps

from dynarep import records
from dynarep.errors import UserError
from dynarep.experiment import Experiment, Job
from dynarep.schema import Panel

COLUMNS = ["panel", "task", "series", "variant", "seed", "x", "estimate", "low", "high", "n", "planned"]
FORMATS = ("svg", "pdf", "png")
MARKERS = "osD^vP*X"
STYLES = ["-", "--", ":", "-."]
STYLE = {
    "svg.fonttype": "path",  # looks the same where the font is not installed
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


# -- the table ----------------------------------------------------------------------------------------------------


def table(experiment: Experiment, tier: str, results: Path) -> pd.DataFrame:
    """Return what a figure shows, one row per point: COLUMNS.

    Raises:
        UserError: the experiment has no runs at this tier, or none of them is there.
    """
    jobs = experiment.jobs(tier)
    if not jobs:
        tiers = ", ".join(experiment.tiers())
        raise UserError(f"{experiment.key} has no runs at tier '{tier}'. It has some at: {tiers}.")
    runs: dict[tuple[str, str], dict[int, records.RunRecord]] = {}
    planned: dict[tuple[str, str], int] = {}
    for job in jobs:
        place = runs.setdefault((job.task, job.variant), {})
        planned[job.task, job.variant] = planned.get((job.task, job.variant), 0) + len(job.seeds)
        for seed, folder in zip(job.seeds, job.folders(), strict=True):
            if (results / folder / records.MANIFEST).exists():
                place[seed] = records.read(results / folder, job.config, seed)
    if not any(runs.values()):
        raise UserError(
            f"{experiment.key}: none of its {sum(planned.values())} runs at tier '{tier}' is there yet. "
            f"Type `make reproduce TIER={tier}`, or `dynarep train` for one job."
        )
    rows: list[dict[str, Any]] = []
    for index, panel in enumerate(experiment.spec.figure.panels):
        for (task, variant), found in runs.items():
            if found and variant in (panel.variants or experiment.spec.variants):
                common = {"panel": index, "task": task, "variant": variant, "planned": planned[task, variant]}
                rows += [{**common, **row} for row in _POINTS[panel.kind](panel, found)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _mean_interval(values: np.ndarray, log: bool) -> dict[str, Any]:
    """Mean (geometric if `log`) with its 95 % t interval; values that are not finite count in n but not in the mean."""
    usable = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(usable):
        return {"estimate": math.nan, "low": math.nan, "high": math.nan, "n": len(values)}
    scaled = np.log(usable) if log else usable
    mean = float(scaled.mean())
    half = (
        float(sps.t.ppf(0.975, len(scaled) - 1) * scaled.std(ddof=1) / math.sqrt(len(scaled)))
        if len(scaled) > 1
        else 0.0
    )
    back = math.exp if log else float
    return {"estimate": back(mean), "low": back(mean - half), "high": back(mean + half), "n": len(values)}


def _curves(panel: Panel, found: dict[int, records.RunRecord]) -> Iterator[dict[str, Any]]:
    for metric in panel.metrics:
        points: dict[float, list[float]] = {}
        for record in found.values():
            rows, values = record.series(metric)
            for x, value in zip(record.columns[panel.x][rows], values, strict=True):
                points.setdefault(float(x), []).append(float(value))
        for x, values_at in sorted(points.items()):
            yield {"series": metric, "x": x, **_mean_interval(np.array(values_at), panel.log)}


def _dots(panel: Panel, found: dict[int, records.RunRecord]) -> Iterator[dict[str, Any]]:
    for metric in panel.metrics:
        last = {seed: record.last(metric) for seed, record in found.items()}
        for seed, value in last.items():
            yield {"series": metric, "seed": seed, "estimate": value, "n": 1}
        yield {"series": metric, **_mean_interval(np.array(list(last.values())), panel.log)}


def _calibration(panel: Panel, found: dict[int, records.RunRecord]) -> Iterator[dict[str, Any]]:
    for group in panel.metrics:
        for k in range(10):
            real = np.array([record.last(f"{group}/{k}/real") for record in found.values()])
            predicted = np.array([record.last(f"{group}/{k}/predicted") for record in found.values()])
            low, middle, high = np.quantile(predicted, [0.25, 0.5, 0.75])
            yield {
                "series": group,
                "x": float(np.median(real)),
                "estimate": middle,
                "low": low,
                "high": high,
                "n": len(real),
            }


_POINTS = {"curves": _curves, "dots": _dots, "calibration": _calibration}


def to_csv(data: pd.DataFrame) -> bytes:
    """Return the table as CSV, nine digits."""
    return data.to_csv(index=False, float_format="%.9g", lineterminator="\n").encode()


# -- the drawing --------------------------------------------------------------------------------------------------


def draw(experiment: Experiment, tier: str, data: pd.DataFrame, note: str) -> dict[str, bytes]:
    """Draw a table: format -> file content."""
    panels = experiment.spec.figure.panels
    tasks = list(dict.fromkeys(data["task"]))
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"{experiment.key} {tier}"}):
        figure, axes = plt.subplots(
            len(panels),
            len(tasks),
            figsize=(3.3 * len(tasks) + 1.9, 2.7 * len(panels) + 1.1),
            squeeze=False,
            layout="constrained",
        )
        for row, panel in enumerate(panels):
            for column, task in enumerate(tasks):
                ax, points = axes[row, column], data[(data["panel"] == row) & (data["task"] == task)]
                _DRAW[panel.kind](ax, panel, points, experiment)
                if panel.log:
                    ax.set_yscale("log")
                    ax.yaxis.set_major_formatter(_PlainLog())
                    ax.yaxis.set_minor_formatter(_PlainLog(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
                if panel.reference is not None:
                    ax.axhline(
                        panel.reference, color="0.35", lw=1, ls=(0, (1, 1.5)), label=panel.reference_label or None
                    )
                if row == 0:
                    ax.set_title(task)
                if column == 0:
                    ax.set_ylabel(textwrap.fill(panel.label, 30))
            handles, labels = axes[row, -1].get_legend_handles_labels()
            unique = dict(zip(labels, handles, strict=True))
            axes[row, -1].legend(unique.values(), unique.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5))
        inches = figure.get_figwidth()
        title = textwrap.fill(f"{experiment.spec.id}: {experiment.spec.title}", int(inches * 10))
        figure.suptitle(title, fontsize=11, weight="bold")
        figure.supxlabel(textwrap.fill(note, int(inches * 15)), fontsize=7.5, color="0.3", x=0.01, ha="left")
        files = {kind: _render(figure, kind) for kind in FORMATS}
        plt.close(figure)
    return files


class _PlainLog(LogFormatter):
    """Labels of a log axis as people write them: 0.6, not 6e-01."""

    def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
        return f"{x:g}"


def _render(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[kind]
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _colours(names: Iterable[str]) -> dict[str, Any]:
    listed = list(names)
    return dict(zip(listed, sns.color_palette("colorblind", len(listed)), strict=True))


def _groups(points: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Split points by variant and series, in the order of the table."""
    for _, group in points.groupby(["variant", "series"], sort=False):
        yield str(group["variant"].iloc[0]), str(group["series"].iloc[0]), group


def _draw_curves(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """Colour is the metric, line style the variant."""
    colours = _colours(panel.metrics)
    styles = dict(zip(experiment.spec.variants, STYLES * 9, strict=False))
    for variant, metric, line in _groups(points):
        label = f"{panel.metrics[metric]}, {experiment.spec.variants[variant].label}"
        ax.plot(line["x"], line["estimate"], color=colours[metric], ls=styles[variant], lw=1.6, label=label)
        ax.fill_between(line["x"], line["low"], line["high"], color=colours[metric], alpha=0.13, lw=0)
    ax.set_xlabel({"update": "updates", "frame": "frames", "agent_step": "agent steps"}[panel.x])


def _draw_dots(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """A dot per seed, a bar for the mean and its interval; one column per variant and metric."""
    colours = _colours(experiment.spec.variants)
    marks = dict(zip(experiment.spec.variants, MARKERS, strict=False))
    for place, (variant, _, group) in enumerate(_groups(points)):
        seeds, mean = group[group["seed"].notna()], group[group["seed"].isna()].iloc[0]
        spread = np.linspace(-0.18, 0.18, len(seeds)) if len(seeds) > 1 else np.zeros(1)
        label = experiment.spec.variants[variant].label
        ax.plot(
            place + spread, seeds["estimate"], marks[variant], ms=3.5, alpha=0.6, color=colours[variant], label=label
        )
        ax.plot([place - 0.3, place + 0.3], [mean["estimate"]] * 2, color=colours[variant], lw=2)
        ax.plot([place, place], [mean["low"], mean["high"]], color=colours[variant], lw=1.2)
    ax.set_xticks([])
    ax.margins(x=0.15)


def _draw_calibration(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """Median over seeds with the middle half; the dotted diagonal is a right model."""
    colours = _colours(experiment.spec.variants)
    marks = dict(zip(experiment.spec.variants, MARKERS, strict=False))
    for variant, _, line in _groups(points):
        label = experiment.spec.variants[variant].label
        ax.plot(line["x"], line["estimate"], marker=marks[variant], ms=3.5, lw=1.2, color=colours[variant], label=label)
        ax.fill_between(line["x"], line["low"], line["high"], color=colours[variant], alpha=0.13, lw=0)
    ends = [points["x"].min(), points["x"].max()]
    ax.plot(ends, ends, color="0.35", lw=1, ls=(0, (1, 1.5)), label="right model")
    ax.set_xlabel("real reward (mean of each tenth)")


_DRAW = {"curves": _draw_curves, "dots": _draw_dots, "calibration": _draw_calibration}


# -- the note under the figure ------------------------------------------------------------------------------------


def reductions(jobs: Iterable[Job]) -> list[str]:
    """Return what the tier changed: budget values that differ from the defaults of agent and protocol."""
    found: dict[str, set[Any]] = {}
    full: dict[str, Any] = {}
    for job in jobs:
        for part in (job.config.agent, job.config.protocol):
            for key in sorted(part.budget):
                default, value = type(part).model_fields[key].default, getattr(part, key)
                if value != default and isinstance(value, int | float):
                    found.setdefault(key, set()).add(value)
                    full[key] = default
    return [f"{key} {'/'.join(map(str, sorted(values)))} (full size {full[key]})" for key, values in found.items()]


def note(experiment: Experiment, tier: str, data: pd.DataFrame) -> str:
    """Return the line under the figure: tier, seeds found of planned, reductions."""
    counts = data[data["seed"].isna()]
    n, planned = int(counts["n"].min()), int(counts["planned"].max())
    changed = reductions(experiment.jobs(tier))
    return f"Tier {tier}: {n} of {planned} seeds. " + (f"Reduced: {', '.join(changed)}." if changed else "Full size.")


def write(experiment: Experiment, tier: str, results: Path, figures: Path) -> list[Path]:
    """Make a figure's four files and return their paths."""
    folder = figures / tier / experiment.spec.paper
    records.check_writable(folder)
    csv = to_csv(table(experiment, tier, results))
    data = pd.read_csv(io.BytesIO(csv))  # what the CSV says is what is drawn, to the last digit
    files = {"csv": csv, **draw(experiment, tier, data, note(experiment, tier, data))}
    paths = []
    for kind, content in files.items():
        path = folder / f"{experiment.spec.id}.{kind}"
        records.atomic_write(path, content)
        paths.append(path)
    return paths
