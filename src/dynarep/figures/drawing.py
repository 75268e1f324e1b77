"""The table of a figure -> the drawing: a band per panel, a place per task.

Colours are seaborn's colour-blind palette; line styles and markers say the same again. More than five tasks are
wrapped, every panel into the same grid.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogFormatter, SymmetricalLogLocator

from dynarep.experiment import Experiment
from dynarep.figures import palette, scatter, suite
from dynarep.figures.points import PUBLISHED
from dynarep.schema import SUITE, Panel

MOST_COLUMNS = 5  # ours: as many tasks side by side as a page can show
LINE, LETTER, SHORT = 0.19, 0.07, 10  # inches of a line and a letter of a legend; letters that need no more room
NAME = 22  # characters of a line of an arm's name below a panel
LONGEST_DOSE = 5  # characters, of a decimal
MARKERS = scatter.MARKERS
STYLES = suite.STYLES
DOTTED = (0, (1, 1.5))
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

PLACES = 9  # decimals, of a figure's width and height


def style(salt: str) -> Any:
    """Return the context in which figures are made: the same `salt`, the same identifiers in an SVG."""
    return mpl.rc_context({**STYLE, "svg.hashsalt": salt})


def render(image: Any, kind: str) -> bytes:
    """Return a figure as svg, pdf or png, without a date."""
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[kind]
    image.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def figure(experiment: Experiment, data: pd.DataFrame, note: str) -> Any:
    """Draw the panels from their points, with a title above and the note below; one without points is left out."""
    there = set(data["panel"])
    panels = [(index, panel) for index, panel in enumerate(experiment.spec.panels) if index in there]
    wide = [index for index, panel in panels if panel.kind in ("scatter", *SUITE)]  # over all tasks
    suites = {index: suite.height(experiment, panel) for index, panel in panels if panel.kind in SUITE}
    tasks = list(dict.fromkeys(data[~data["panel"].isin(wide)]["task"])) or [""]
    sources = list(dict.fromkeys(data[data["series"] == PUBLISHED]["variant"]))
    bands = math.ceil(len(tasks) / MOST_COLUMNS)
    columns = math.ceil(len(tasks) / bands)
    legend_lines = scatter.lines(experiment.spec.pairs) if wide else []
    heights = [max(2.7, LINE * len(legend_lines) / bands) if index in wide else 2.7 for index, _ in panels]
    heights = [
        suites[index] / bands if index in suites else inches for inches, (index, _) in zip(heights, panels, strict=True)
    ]
    room = LETTER * max(0, max(map(len, legend_lines), default=0) - SHORT)
    size = (max(3.3 * columns + 1.9 + room, suite.NARROWEST if suites else 0), bands * sum(heights) + 1.1)
    shape: dict[str, Any] = {"gridspec_kw": {"height_ratios": np.repeat(heights, bands)}} if wide else {}
    image, grid = plt.subplots(bands * len(panels), columns, figsize=size, squeeze=False, layout="constrained", **shape)
    titled = min((band for band, (index, _) in enumerate(panels) if index not in wide), default=None)
    longest = SHORT
    for band, (index, panel) in enumerate(panels):
        rows = grid[band * bands : (band + 1) * bands]
        places = rows.flat
        if index in wide:
            ax = _merged(image, rows)
            if index in suites:
                suite.draw(image, ax, panel, data[data["panel"] == index], experiment)
                continue
            _panel(ax, panel, data[data["panel"] == index], experiment)
            ax.set_ylabel(textwrap.fill(panel.label, 30))
            continue
        legend: dict[str, Any] = {}
        for place, ax in enumerate(places):
            task = tasks[place] if place < len(tasks) else None
            points = data[(data["panel"] == index) & (data["task"] == task)]
            if points.empty:
                ax.set_axis_off()
                continue
            _panel(ax, panel, points, experiment)
            _published(ax, panel, points, sources)
            if band == titled or bands > 1:
                ax.set_title(task)
            if place % columns == 0:
                ax.set_ylabel(textwrap.fill(panel.label, 30))
            handles, labels = ax.get_legend_handles_labels()
            legend |= dict(zip(labels, handles, strict=True))
        where = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
        grid[band * bands, -1].legend(legend.values(), legend.keys(), **where)
        longest = max([longest, *map(len, legend)])
    if not wide:  # else there is room for the longest line of a scatter's or a suite's
        image.set_figwidth(size[0] + LETTER * (longest - SHORT))
    inches = image.get_figwidth()
    title = textwrap.fill(f"{experiment.spec.id}: {experiment.spec.title}", int(inches * 10))
    image.suptitle(title, fontsize=11, weight="bold")
    image.supxlabel(textwrap.fill(note, int(inches * 15)), fontsize=7.5, color="0.3", x=0.01, ha="left")
    image.get_layout_engine().execute(image)
    image.set_layout_engine(None)  # the layout that was just made holds for all formats; "none" would draw each twice
    for ax in image.axes:
        # Its solver adds in the order of memory addresses: last bits differ, and what an SVG names after them.
        ax.set_position(np.round(ax.get_position(original=True).bounds, PLACES))
        if hasattr(ax, "numbers"):
            scatter.number(ax)
    plt.close(image)  # pyplot forgets it; it can still be rendered
    return image


def _merged(image: Any, rows: Any) -> Any:
    """Put one place over a band of them."""
    spans = [ax.get_subplotspec() for ax in rows.flat]
    for ax in rows.flat:
        ax.remove()
    first, last = spans[0], spans[-1]
    grid = first.get_gridspec()
    return image.add_subplot(grid[first.rowspan.start : last.rowspan.stop, first.colspan.start : last.colspan.stop])


def _panel(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """Draw one task of one panel."""
    _DRAW[panel.kind](ax, panel, points[points["series"] != PUBLISHED], experiment)
    if panel.scale == "log":
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(_PlainLog())
        ax.yaxis.set_minor_formatter(_PlainLog(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    if panel.scale == "symlog":
        ax.set_yscale("symlog", linthresh=panel.linear_within)
        decades = sum(math.log10(max(1.0, abs(end) / panel.linear_within)) for end in ax.get_ylim())
        subs = [1, 2, 5] if decades < 3 else [1]
        ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=panel.linear_within, subs=subs))
        ax.yaxis.set_major_formatter("{x:g}")
    if panel.reference is not None:
        ax.axhline(panel.reference, color="0.35", lw=1, ls=DOTTED, label=panel.reference_label or None)


def _published(ax: Any, panel: Panel, points: pd.DataFrame, sources: list[str]) -> None:
    """Draw published numbers in grey, a source the same in every place: a line across for each, or a curve over frames.

    The bars of a curve's points are intervals over seeds, or the reading error of a number that was read off a figure.
    """
    for source, theirs in points[points["series"] == PUBLISHED].groupby("variant", sort=False):
        number = sources.index(str(source))
        grey, dashes = ("0.35", "0.65")[number // len(STYLES) % 2], STYLES[number % len(STYLES)]
        look: dict[str, Any] = {"color": grey, "ls": dashes, "lw": 1, "label": source, "zorder": 0.5}
        if panel.kind == "curves":
            line = theirs.sort_values("x").astype({"low": float, "high": float})
            ends = [line["estimate"] - line["low"], line["high"] - line["estimate"]]
            bars = np.nan_to_num(np.array(ends))  # no length where nothing is known
            mark = MARKERS[number % len(MARKERS)]
            ax.errorbar(line["x"], line["estimate"], bars, marker=mark, ms=3, elinewidth=0.8, **look)
        else:
            for height in theirs["estimate"]:
                ax.axhline(height, **look)


class _PlainLog(LogFormatter):
    """Labels of a log axis as people write them: 0.6, not 6e-01."""

    def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
        return f"{x:g}"


def _colours(names: Iterable[str]) -> dict[str, Any]:
    listed = list(dict.fromkeys(names))
    return dict(zip(listed, palette.colours(len(listed)), strict=True))


def _groups(points: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Split points by variant and series, in the order of the table."""
    for _, group in points.groupby(["variant", "series"], sort=False):
        yield str(group["variant"].iloc[0]), str(group["series"].iloc[0]), group


def _curves(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """Of one metric, colour and line style are the variant, or colour is its series; of several, the metric."""
    variants = experiment.spec.variants
    several, families = len(panel.metrics) > 1, panel.colour_by == "series"
    family = {name: (families and variant.series) or name for name, variant in variants.items()}
    colours = _colours(panel.metrics if several else family.values())
    styles = dict(zip(variants, STYLES * len(variants), strict=False))
    if families:
        shown = experiment.shown(panel)
        mates = {name: [other for other in shown if family[other] == family[name]] for name in shown}
        styles = {name: STYLES[mates[name].index(name)] for name in shown}
    for variant, metric, line in _groups(points):
        label = variants[variant].label
        label = f"{panel.metrics[metric]}, {label}" if several else label
        colour = colours[metric if several else family[variant]]
        look = {"marker": "o", "ms": 4} if len(line) == 1 else {}  # one point alone is no line
        ax.plot(line["x"], line["estimate"], color=colour, ls=styles[variant], lw=1.6, label=label, **look)
        ax.fill_between(line["x"], line["low"], line["high"], color=colour, alpha=0.13, lw=0)
    ax.set_xlabel({"update": "updates", "frame": "frames", "agent_step": "agent steps"}[panel.x])


def _finals(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """A dot per seed, a bar for the mean and its interval; one column per variant and metric."""
    variants = experiment.spec.variants
    colours = _colours(variants)
    marks = dict(zip(variants, MARKERS * len(variants), strict=False))
    names = []
    for place, (variant, metric, group) in enumerate(_groups(points)):
        seeds, mean = group[group["seed"].notna()], group[group["seed"].isna()].iloc[0]
        spread = np.linspace(-0.18, 0.18, len(seeds)) if len(seeds) > 1 else np.zeros(1)
        names.append(variants[variant].label + (f", {panel.metrics[metric]}" if len(panel.metrics) > 1 else ""))
        look: dict[str, Any] = {"ms": 3.5, "alpha": 0.6, "color": colours[variant]}
        look |= {"label": variants[variant].label} if panel.kind == "dots" else {}
        ax.plot(place + spread, seeds["estimate"], marks[variant], **look)
        ax.plot([place - 0.3, place + 0.3], [mean["estimate"]] * 2, color=colours[variant], lw=2)
        ax.plot([place, place], [mean["low"], mean["high"]], color=colours[variant], lw=1.2)
    ax.set_xticks([])
    if panel.kind == "final":
        names = [textwrap.fill(name, NAME) for name in names]  # a long one would begin outside the figure
        look = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 7.5, "linespacing": 0.95}
        ax.set_xticks(range(len(names)), names, **look)
    ax.margins(x=0.15)


def _doses(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """The line of a series goes through its variants' means; a faint dot per seed."""
    variants = experiment.spec.variants
    names = [
        ", ".join(filter(None, [variants[variant].series, panel.metrics[metric] if len(panel.metrics) > 1 else ""]))
        for variant, metric in zip(points["variant"], points["series"], strict=True)
    ]
    colours = _colours(names)
    for number, (name, group) in enumerate(points.groupby(pd.Series(names, points.index), sort=False)):
        seeds, means = group[group["seed"].notna()], group[group["seed"].isna()].sort_values("x")
        mark, colour = MARKERS[number % len(MARKERS)], colours[str(name)]
        ax.plot(seeds["x"], seeds["estimate"], mark, ms=3, alpha=0.35, color=colour)
        look = {"color": colour, "marker": mark, "ms": 5, "lw": 1.6, "ls": STYLES[number % len(STYLES)]}
        ax.plot(means["x"], means["estimate"], label=name or None, **look)
        ax.fill_between(means["x"], means["low"], means["high"], color=colour, alpha=0.13, lw=0)
    _scale_x(ax, panel)
    ticks = sorted(set(points["x"]))
    ax.set_xticks(ticks, _apart(ticks, ax.xaxis.get_transform().transform(np.array(ticks))))
    ax.set_xticks([], minor=True)
    ax.set_xlabel(panel.x_label)


def _scale_x(ax: Any, panel: Panel) -> None:
    ax.set_xscale(panel.x_scale, **({"linthresh": panel.x_linear_within} if panel.x_scale == "symlog" else {}))


def _apart(ticks: list[float], places: np.ndarray) -> list[str]:
    """Label the ticks that are far enough from the last one that has a label, a twelfth of the axis."""
    apart, last, labels = (places[-1] - places[0]) / 12, -math.inf, []
    for place, word in zip(places, _words(ticks), strict=True):
        far = place - last >= apart
        labels.append(word if far else "")
        last = place if far else last
    return labels


def _words(ticks: list[float]) -> list[str]:
    """Write doses as people do: 1/128 rather than 0.0078125, where every one is whole or one over a whole number."""
    plain = [f"{tick:g}" for tick in ticks]
    whole = all(tick == int(tick) or (tick > 0 and 1 / tick == int(1 / tick)) for tick in ticks)
    if max(map(len, plain)) <= LONGEST_DOSE or not whole:
        return plain
    return [f"1/{1 / tick:g}" if 0 < tick < 1 else word for tick, word in zip(ticks, plain, strict=True)]


def _calibration(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """Median over seeds with the middle half; the dotted diagonal is a right model."""
    variants = experiment.spec.variants
    colours = _colours(variants)
    marks = dict(zip(variants, MARKERS * len(variants), strict=False))
    for variant, _, line in _groups(points):
        label = variants[variant].label
        ax.plot(line["x"], line["estimate"], marker=marks[variant], ms=3.5, lw=1.2, color=colours[variant], label=label)
        ax.fill_between(line["x"], line["low"], line["high"], color=colours[variant], alpha=0.13, lw=0)
    ends = [points["x"].min(), points["x"].max()]
    ax.plot(ends, ends, color="0.35", lw=1, ls=DOTTED, label="right model")
    ax.set_xlabel("real reward (mean of each tenth)")


def _spectrum(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """A mark per eigenvalue, a line at the mean of the smallest real part; left of the dotted line lies divergence."""
    variants = experiment.spec.variants
    names = experiment.shown(panel)
    colours = _colours(names)
    for variant, _, group in _groups(points):
        values, mean = group[group["seed"].notna()], group[group["seed"].isna()].iloc[0]
        look: dict[str, Any] = {"ms": 3, "alpha": 0.5, "color": colours[variant], "label": variants[variant].label}
        ax.plot(values["x"], values["estimate"], MARKERS[names.index(variant) % len(MARKERS)], **look)
        ax.axvline(mean["estimate"], color=colours[variant], lw=1.2, ls=STYLES[names.index(variant) % len(STYLES)])
    ax.axvline(0, color="0.35", lw=1, ls=DOTTED, label="limit of stability")
    if panel.scale == "symlog":
        ax.set_xscale("symlog", linthresh=panel.linear_within)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("real part")


def _scatter(ax: Any, panel: Panel, points: pd.DataFrame, experiment: Experiment) -> None:
    """A numbered point per pair; see `scatter`."""
    _scale_x(ax, panel)
    scatter.draw(ax, panel, points, experiment)
    if panel.x_scale == "log":
        ax.xaxis.set_major_formatter(_PlainLog())
        ax.xaxis.set_minor_formatter(_PlainLog(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    if panel.x_scale == "symlog":
        ax.xaxis.set_major_formatter("{x:g}")


_DRAW = {
    **{"curves": _curves, "dots": _finals, "final": _finals, "dose": _doses},
    **{"calibration": _calibration, "spectrum": _spectrum, "scatter": _scatter},
}
