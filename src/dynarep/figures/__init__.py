"""Records -> one tidy table per figure or table -> CSV, SVG, PDF, PNG.

The image is drawn from the table alone, so the CSV beside it holds every number that is seen. Same table, same bytes:
no dates, fixed SVG identifiers.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd

from dynarep import published, records
from dynarep.experiment import Experiment, Job
from dynarep.figures import drawing, pages, points, scatter, suite
from dynarep.schema import SUITE

FORMATS = ("svg", "pdf", "png")


def table(experiment: Experiment, tier: str, results: Path) -> pd.DataFrame:
    """Return what is shown: `points.COLUMNS`, or of a table made from the code `pages.FIELDS` or `pages.LAYERS`.

    Raises:
        UserError: it needs runs, and there are none at this tier, or none of them is there.
    """
    if experiment.spec.from_defaults:
        return pages.from_defaults(experiment)
    return points.table(experiment, tier, results)


def to_csv(data: pd.DataFrame) -> bytes:
    """Return the table as CSV, nine digits."""
    return data.to_csv(index=False, float_format="%.9g", lineterminator="\n").encode()


def draw(experiment: Experiment, tier: str, data: pd.DataFrame, note: str) -> dict[str, bytes]:
    """Draw a table: format -> file content."""
    with drawing.style(f"{experiment.key} {tier}"):
        if experiment.spec.table is None:
            figure = drawing.figure(experiment, data, note)
        else:
            figure = pages.page(experiment, data, note)
        return {kind: drawing.render(figure, kind) for kind in FORMATS}


def write(experiment: Experiment, tier: str, results: Path, figures: Path) -> list[Path]:
    """Make the four files of a figure or table and return their paths."""
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


# -- the note under the figure ------------------------------------------------------------------------------------


def note(experiment: Experiment, tier: str, data: pd.DataFrame) -> str:
    """Return the line under the figure: tier, seeds found of planned, reductions, whether a claim is judged."""
    if experiment.spec.from_defaults:
        table = experiment.spec.table
        assert table is not None
        return f"Read from the code: {pages.WHAT[table.kind]}. The same at every tier."
    means = data[data["seed"].isna() & ~data["series"].isin([points.PUBLISHED, scatter.RANK])]
    suites = means["panel"].isin([k for k, panel in enumerate(experiment.spec.panels) if panel.kind in SUITE])
    overall, means = means[suites], means[~suites]
    words = [f"Tier {tier}: {_seeds(means) if len(means) else _runs(overall)}."]
    scatters = [index for index, panel in enumerate(experiment.spec.panels) if panel.kind == "scatter"]
    placed, means = means[means["panel"].isin(scatters)], means[~means["panel"].isin(scatters)]
    settings = len(experiment.spec.pairs)
    if scatters and (without := settings - int(placed.groupby("panel")["variant"].nunique().min())):
        words.append(f"{without} of {settings} settings have no point.")
    jobs = experiment.jobs(tier)
    panels = [panel for panel in points.panels(experiment) if panel.kind not in ("scatter", *SUITE)]
    shown = {variant for panel in panels for variant in experiment.shown(panel)}
    arms = {(job.task, job.variant) for job in jobs if job.variant in shown}
    if absent := arms - set(zip(means["task"], means["variant"], strict=True)):
        words.append(f"{len(absent)} of {len(arms)} arms have no runs yet.")
    words += suite.said(overall, experiment)
    changed = reductions(experiment, tier)
    words.append(f"Reduced: {', '.join(changed)}." if changed else "Full size.")
    words += _read_off(experiment, data)
    judging = [claim for claim in experiment.spec.judged() if claim.role(tier) != "untested"]
    if experiment.spec.claims and not judging:
        words.append("No claim is judged at this tier.")
    return " ".join(words)


def _seeds(means: pd.DataFrame) -> str:
    """Say how many seeds there are of how many; where arms have different numbers, of the one that lacks most."""
    planned = sorted(set(means["planned"].astype(int)))
    if len(planned) > 1 and (means["n"] >= means["planned"]).all():
        return f"{planned[0]} to {planned[-1]} seeds, all there"
    n, planned_there = means[["n", "planned"]].iloc[int((means["n"] / means["planned"]).argmin())]
    return f"{n:.0f} of {planned_there:.0f} seeds"


def _runs(overall: pd.DataFrame) -> str:
    """Say how many runs there are of the arm that lacks most, of a figure that has panels over all tasks alone."""
    n, planned = overall[["n", "planned"]].iloc[int((overall["n"] / overall["planned"]).argmin())]
    return f"{n:.0f} of {planned:.0f} runs of each arm"


def _read_off(experiment: Experiment, data: pd.DataFrame) -> list[str]:
    """Say which of the published numbers that are shown were read off a figure."""
    labels = set(data[data["series"] == points.PUBLISHED]["variant"])
    if not labels:
        return []
    rows = [row for row in published.read(experiment.folder) if row.label in labels and row.reading_error]
    return [
        f"{algorithm}: read off a figure, ±{error:g}."
        for algorithm, error in dict.fromkeys((row.algorithm, row.reading_error) for row in rows)
    ]


def reductions(experiment: Experiment, tier: str) -> list[str]:
    """Return what a tier makes smaller: tasks, seeds and budget values, against the paper tier or else the defaults.

    A value that an arm sets is the arm, not a reduction.
    """
    here, full = (_extent(experiment.jobs(name)) for name in (tier, "paper"))
    words = [f"{what} {here[what]} (full size {full[what]})" for what in here if here[what] < full[what]]
    papers = {key: values for (_, key), values in _budget(experiment, "paper").items()}
    for (default, key), values in _budget(experiment, tier).items():
        if others := values - papers.get(key, {default}):
            whole = "/".join(map(str, sorted(papers.get(key, {default}))))
            words.append(f"{key} {'/'.join(map(str, sorted(others)))} (full size {whole})")
    return words


def _budget(experiment: Experiment, tier: str) -> dict[tuple[Any, str], set[Any]]:
    """Return default and name of the numbers that a budget may change -> their values at a tier, but for arms' own."""
    found: dict[tuple[Any, str], set[Any]] = {}
    for job in experiment.jobs(tier):
        arm = experiment.spec.variants[job.variant]
        for part, own in ((job.config.agent, arm.agent), (job.config.protocol, arm.protocol)):
            for key in sorted(part.budget - set(own)):
                default, value = type(part).model_fields[key].default, getattr(part, key)
                if isinstance(value, int | float):
                    found.setdefault((default, key), set()).add(value)
    return found


def _extent(jobs: list[Job]) -> dict[str, int]:
    """Count tasks, and the most seeds that one of their arms has."""
    seeds: dict[tuple[str, str], int] = {}
    for job in jobs:
        seeds[job.task, job.variant] = seeds.get((job.task, job.variant), 0) + len(job.seeds)
    return {"tasks": len({task for task, _ in seeds}), "seeds": max(seeds.values(), default=0)}
