"""Records -> the tidy table behind a figure or a table of returns, one row per point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from dynarep import published, records
from dynarep.errors import UserError
from dynarep.experiment import Experiment
from dynarep.figures import scatter, suite
from dynarep.schema import SUITE, Panel, Shows

COLUMNS = ["panel", "task", "series", "variant", "seed", "x", "estimate", "low", "high", "n", "planned"]
PUBLISHED = "published"  # the series of numbers that are not ours; their variant is the label of their source
SPECTRA = 3  # ours: of as many seeds eigenvalues are shown; more are a blur

Runs = Mapping[int, records.RunRecord]


def table(experiment: Experiment, tier: str, results: Path) -> pd.DataFrame:
    """Return what a figure or a table of returns shows, one row per point: COLUMNS.

    A variant that never recorded a metric has no points of it.

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
    for index, panel in enumerate(panels(experiment)):
        if panel.kind == "scatter":
            rows += [{"panel": index, **row} for row in scatter.points(experiment, panel, tier, runs)]
            continue
        if panel.kind in SUITE:
            rows += [{"panel": index, **row} for row in suite.points(experiment, panel, runs, planned)]
            continue
        shown = experiment.shown(panel)
        for (task, variant), found in runs.items():
            if found and variant in shown:
                common = {"panel": index, "task": task, "variant": variant, "planned": planned[task, variant]}
                dose = experiment.spec.variants[variant].dose
                rows += [{**common, **row} for row in _POINTS[panel.kind](panel, found, dose)]
        if tier in panel.published_tiers:
            rows += [{"panel": index, **row} for row in _published(experiment, panel, [task for task, _ in runs])]
    return pd.DataFrame(rows, columns=COLUMNS)


def panels(experiment: Experiment) -> tuple[Panel, ...]:
    """Return the panels of a figure; a table of returns has the points of one panel of final values."""
    spec = experiment.spec
    if spec.table is None:
        return spec.panels
    result = spec.table
    form: dict[str, Any] = {name: getattr(result, name) for name in Shows.model_fields}
    form |= {"metrics": {result.metric: result.label}, "label": result.label, "variants": result.variants}
    return (Panel(kind="final", **form),)


def mean_interval(values: np.ndarray, log: bool) -> dict[str, Any]:
    """Mean (geometric if `log`) with its 95 % t interval; values that are not finite count in n but not in the mean."""
    usable = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(usable):
        return {"estimate": math.nan, "low": math.nan, "high": math.nan, "n": len(values)}
    scaled = np.log(usable) if log else usable
    mean = float(scaled.mean())
    half = (
        float(special.stdtrit(len(scaled) - 1, 0.975) * scaled.std(ddof=1) / math.sqrt(len(scaled)))
        if len(scaled) > 1
        else 0.0
    )
    back = _exp if log else float
    return {"estimate": back(mean), "low": back(mean - half), "high": back(mean + half), "n": len(values)}


def _exp(value: float) -> float:
    """Return e to the value; infinity where that is no number, as of seeds hundreds of orders of magnitude apart."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _curves(panel: Panel, found: Runs, dose: float | None) -> Iterator[dict[str, Any]]:
    for metric in panel.metrics:
        points: dict[float, list[float]] = {}
        for record in found.values():
            rows, values = record.series(metric)
            for x, value in zip(record.columns[panel.x][rows], values, strict=True):
                points.setdefault(float(x), []).append(float(value))
        for x, values_at in sorted(points.items()):
            yield {"series": metric, "x": x, **mean_interval(np.array(values_at), panel.scale == "log")}


def _finals(panel: Panel, found: Runs, dose: float | None) -> Iterator[dict[str, Any]]:
    """Every seed's last value, then their mean; of doses, at the variant's."""
    place = {"x": dose} if panel.kind == "dose" else {}
    for metric in panel.metrics:
        last = {seed: record.last(metric) for seed, record in found.items() if len(record.series(metric)[0])}
        for seed, value in last.items():
            yield {"series": metric, "seed": seed, **place, "estimate": value, "n": 1}
        if last:
            yield {"series": metric, **place, **mean_interval(np.array(list(last.values())), panel.scale == "log")}


def _calibration(panel: Panel, found: Runs, dose: float | None) -> Iterator[dict[str, Any]]:
    for group in panel.metrics:
        having = [record for record in found.values() if len(record.series(f"{group}/0/real")[0])]
        for k in range(10) if having else ():
            real = np.array([record.last(f"{group}/{k}/real") for record in having])
            predicted = np.array([record.last(f"{group}/{k}/predicted") for record in having])
            low, middle, high = np.quantile(predicted, [0.25, 0.5, 0.75])
            yield {
                "series": group,
                "x": float(np.median(real)),
                "estimate": middle,
                "low": low,
                "high": high,
                "n": len(real),
            }


def _spectrum(panel: Panel, found: Runs, dose: float | None) -> Iterator[dict[str, Any]]:
    """Eigenvalues of the first seeds, real part as x, imaginary as estimate; then all seeds' smallest, on average."""
    for group in panel.metrics:
        spectra: dict[int, np.ndarray] = {}
        for seed, record in found.items():
            metrics, values = record.columns["metric"], record.columns["value"]
            real, imaginary = (
                values[[name.startswith(f"{group}/") and name.endswith(f"/{part}") for name in metrics]]
                for part in ("real", "imaginary")
            )
            if len(real):
                spectra[seed] = real + 1j * imaginary
        for seed, eigenvalues in list(spectra.items())[:SPECTRA]:
            for value in eigenvalues:
                yield {"series": group, "seed": seed, "x": value.real, "estimate": value.imag, "n": 1}
        if spectra:
            smallest = np.array([eigenvalues.real.min() for eigenvalues in spectra.values()])
            yield {"series": group, **mean_interval(smallest, log=False)}


def _published(experiment: Experiment, panel: Panel, tasks: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a point per number; `low` and `high` are its interval, or the reading error where it has none."""
    for row in published.shown(experiment.folder, panel, tasks):
        low, high = row.bounds
        numbers = {"estimate": row.mean, "low": low, "high": high, "n": row.n_seeds, "planned": row.n_seeds}
        yield {"task": row.task, "series": PUBLISHED, "variant": row.label, "x": row.env_step, **numbers}


_POINTS = {
    **{"curves": _curves, "dots": _finals, "final": _finals, "dose": _finals},
    **{"calibration": _calibration, "spectrum": _spectrum},
}
