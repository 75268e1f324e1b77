"""Tables as pages: returns from the runs, hyperparameters and networks from the code; drawn as text with matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from dynarep.configs import AgentConfig, PartConfig, ProtocolConfig, registry
from dynarep.configs.mad_td import MadTDConfig
from dynarep.experiment import Experiment, plain
from dynarep.figures.points import PUBLISHED
from dynarep.schema import ResultTable

WHAT = {
    "hyperparameters": "every default, and where it comes from",
    "architecture": "every layer at the default width, and its parameters",
}
FIELDS = ["part", "field", "default", "changed_by", "source"]
LAYERS = ["size", "net", "layer", "inputs", "outputs", "norm", "activation", "parameters"]
# What a `Spec` does not say: what is done to its output (`mad-td` 3.2), and how many such networks there are
LAST = {"encoder": "SimNorm", "dynamics": "SimNorm", "reward": "none", "critic": "softmax over bins", "actor": "tanh"}
COPIES = {"critic": 2}
LETTER, LINE = 0.066, 0.165  # inches that a letter and a line of text take at the size of a page
MOST_LETTERS = 56  # of a column; longer text is broken into lines
HEADER_LETTERS = 22


def from_defaults(experiment: Experiment) -> pd.DataFrame:
    """Return a table that is made from the code: FIELDS or LAYERS."""
    table = experiment.spec.table
    assert table is not None
    return hyperparameters(experiment) if table.kind == "hyperparameters" else architecture(table)


def architecture(table: ResultTable) -> pd.DataFrame:
    """Return a row per layer of MAD-TD's networks, then one per network with all its copies, then the sum: LAYERS.

    Once for every size of observation and action that the table names.
    """
    from dynarep.agents import mad_td  # PyTorch

    rows: list[list[Any]] = []
    for size, (obs, action) in table.sizes.items():
        total = 0
        for net, spec in mad_td.architecture(MadTDConfig(), obs, action).items():
            shapes, own, last = spec.parameters(), 0, len(spec.sizes) - 2
            for layer, (inputs, outputs) in enumerate(zip(spec.sizes[:-1], spec.sizes[1:], strict=True)):
                count = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"{layer}."))
                norm = "LayerNorm" if f"{layer}.scale" in shapes else "none"
                activation = LAST[net] if layer == last else spec.activation.__name__.capitalize()
                rows.append([size, net, layer + 1, inputs, outputs, norm, activation, count])
                own += count
            copies = COPIES.get(net, 1)
            rows.append([size, net, "all" if copies == 1 else f"all, x {copies}", "", "", "", "", copies * own])
            total += copies * own
        rows.append([size, "all networks", "", "", "", "", "", total])
    return pd.DataFrame(rows, columns=LAYERS)


def hyperparameters(experiment: Experiment) -> pd.DataFrame:
    """Return a row per field of the named agents and protocols: FIELDS. Read from the code, so it cannot drift.

    Parts that share a field, as MBPO shares SAC's, share its row.
    """
    chosen = experiment.spec.table
    assert chosen is not None
    parts: list[tuple[str, type[PartConfig]]] = [("agent", registry(AgentConfig)[name]) for name in chosen.agents]
    parts += [("protocol", registry(ProtocolConfig)[name]) for name in chosen.protocols]
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for section, part in parts:
        defaults = part()
        for field, info in part.model_fields.items():
            default = getattr(defaults, field)
            row = rows.setdefault((field, plain(default), info.description or ""), {"parts": [], "changes": []})
            row["parts"].append(part.name)
            for variant in experiment.spec.variants.values():
                value = getattr(variant, section).get(field, default)
                if value != default and (variant.algorithm or part.name) == part.name:
                    row["changes"].append(f"{variant.label}: {plain(value)}")
    cells = [
        [", ".join(row["parts"]), field, default, "; ".join(dict.fromkeys(row["changes"])), source]
        for (field, default, source), row in rows.items()
    ]
    return pd.DataFrame(cells, columns=FIELDS)


def page(experiment: Experiment, data: pd.DataFrame, note: str) -> Any:
    """Draw a table from its data, as tall as it has to be."""
    table = experiment.spec.table
    assert table is not None
    if table.kind == "hyperparameters":
        header, cells = FIELDS, data.fillna("").astype(str).to_numpy().tolist()
        header = ["part", "hyperparameter", "default", "changed by", "source of the default"]
    elif table.kind == "architecture":
        header, cells = _layers(data)
    else:
        header, cells = _returns(experiment, data)
    return _page(f"{experiment.spec.id}: {experiment.spec.title}", header, cells, note)


def _layers(data: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return header and cells: a row per layer; where sizes differ, their values beside each other."""
    sizes = list(dict.fromkeys(data["size"]))
    cells = []
    words = data.map(lambda value: "" if pd.isna(value) else _count(value))
    for _, rows in words.groupby(["net", "layer"], sort=False):
        values = [rows[column].tolist() for column in LAYERS[1:]]
        cells.append([" / ".join(each if len(set(each)) > 1 else each[:1]) for each in values])
    return [*LAYERS[1:-1], f"parameters ({' / '.join(sizes)})"], cells


def _returns(experiment: Experiment, data: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return header and cells: a row per task, a column per variant, then one per published source."""
    result = experiment.spec.table
    assert result is not None
    means = data[data["seed"].isna()]
    theirs = means["series"] == PUBLISHED
    ours = [name for name in experiment.shown(result) if name in set(means[~theirs]["variant"])]
    keys = [(False, name) for name in ours] + [(True, name) for name in dict.fromkeys(means[theirs]["variant"])]
    cells = []
    for task in dict.fromkeys(means["task"]):
        row = [str(task)]
        for published, name in keys:
            found = means[(means["task"] == task) & (theirs == published) & (means["variant"] == name)]
            row.append(_cell(found.iloc[0], published) if len(found) else "–")
        cells.append(row)
    labels = [name if published else experiment.spec.variants[name].label for published, name in keys]
    return [result.label, *labels], cells


def _cell(row: Any, published: bool) -> str:
    interval = "" if pd.isna(row["low"]) else f" [{_number(row['low'])}, {_number(row['high'])}]"
    count = "" if pd.isna(row["n"]) else f"n = {int(row['n'])}" + ("" if published else f" of {int(row['planned'])}")
    return f"{_number(row['estimate'])}{interval}\n{count}"


def _count(value: Any) -> str:
    """Write a count with its thousands apart; a word as it is."""
    return f"{value:,.0f}".replace(",", " ") if isinstance(value, int | float) else str(value)


def _number(value: float) -> str:
    """Write a number with three digits, whole from 100 on; "–" for one that does not exist (divergence)."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _page(title: str, header: Sequence[str], cells: Sequence[Sequence[str]], note: str) -> Any:
    """Set text in columns as wide as their longest line, with a rule under each row."""
    rows = [[_broken(word, HEADER_LETTERS) for word in header]]
    rows += [[_broken(cell, MOST_LETTERS) for cell in row] for row in cells]
    widths = [max(len(line) for row in rows for line in row[k].split("\n")) + 3 for k in range(len(header))]
    heights = [max(cell.count("\n") + 1 for cell in row) + 0.7 for row in rows]
    inches = max(6.0, LETTER * sum(widths) + 0.4)
    title, note = textwrap.fill(title, int(inches * 10)), textwrap.fill(note, int(inches * 15))
    above, below = 0.3 * (title.count("\n") + 1) + 0.2, 0.15 * (note.count("\n") + 1) + 0.2
    tall = LINE * sum(heights) + above + below
    image = plt.figure(figsize=(inches, tall))

    def write(x: float, y: float, text: str, **look: Any) -> None:
        image.text(x / inches, 1 - y / tall, text, va="top", **{"fontsize": 8, "linespacing": 1.35, **look})

    def rule(y: float, weight: float) -> None:
        line = plt.Line2D([0.2 / inches, 1 - 0.2 / inches], [1 - y / tall] * 2, color="0.6", lw=weight)
        image.add_artist(line)

    write(0.2, 0.15, title, fontsize=11, weight="bold")
    y = above
    for index, (row, height) in enumerate(zip(rows, heights, strict=True)):
        x = 0.2
        for cell, width in zip(row, widths, strict=True):
            write(x, y + 0.35 * LINE, cell, weight="bold" if index == 0 else "normal")
            x += LETTER * width
        y += LINE * height
        rule(y, 1.0 if index == 0 else 0.4)
    write(0.2, y + 0.12, note, fontsize=7.5, color="0.3")
    plt.close(image)
    return image


def _broken(text: str, letters: int) -> str:
    """Break long lines."""
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))
