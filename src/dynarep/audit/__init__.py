"""Does what lies in a folder of results follow from what was run? Reads everything, writes nothing, trusts nobody.

    1  what is there against what is planned; links and strange files                          `places`
    2  every run: types, hashes, identity, rows, times, divergence; then beside each other     `runs`, `contents`
    3  every figure from its runs, every image from its CSV, verdicts, the report              `products`
    4  on request: some runs, drawn at random, trained again                                   `rerun`

Experiments and code are this checkout's: whoever can change those can change the audit. `KINDS` says what is found.
What only training again can find is a run whose metrics were changed with every hash of them, in its own manifest and
in those of the seeds that its process trained. Source: ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dynarep.audit import places, products, rerun, runs
from dynarep.audit.findings import KINDS as KINDS
from dynarep.audit.findings import Audit, Finding
from dynarep.experiment import Experiment
from dynarep.files import tier_file

__all__ = ["KINDS", "Audit", "Finding", "audit"]
Progress = Callable[[str, int, int], None]


def audit(
    path: Path,
    experiments: Sequence[Experiment],
    tier: str | None = None,
    again: int | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
    source: str = "runs",
) -> Audit:
    """Audit a folder.

    Args:
        path: a folder with results/runs and figures, or a folder of runs.
        experiments: all there are; they say what is planned.
        tier: only this one; without: every tier that something is there of.
        again: train so many runs again.
        seed: draws them.
        progress: called with what is done, units done, units in all.
        source: below `path`/results: runs, or reference.

    Raises:
        UserError: no such folder or nothing in it, unknown tier, numbers that make no sense.
    """
    if tier is not None:
        tier_file(tier)
    place, found = places.find(path, source), Audit()
    tree = places.walk(place, place.runs, found)
    drawn = places.walk(place, place.figures, found) if place.figures else places.Tree()
    found.tiers = places.tiers_of(place, tree, drawn, experiments, tier)
    plan = places.Plan()
    for name in found.tiers:
        plan.add(experiments, name)
    drawn_again = rerun.chosen(plan, again, seed) if again is not None else []
    places.unplanned(place, tree, plan, experiments, tier, found)
    if place.figures:
        places.strange_figures(place, drawn, experiments, found)
    whole = [name for name in found.tiers if place.has_pages(name)]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers from elsewhere may be any
        known = runs.check(place, plan, experiments, whole, found)
        products.figures(place, plan, known, experiments, found, lambda done, total: progress("figures", done, total))
        for name in found.tiers:
            products.pages(place, name, whole, experiments, found)
    if again is None:
        found.skip(f"whether training gives these numbers: --rerun K trains K of the {len(plan.runs)} runs again")
    elif drawn_again:
        rerun.check(place, plan, again, seed, found, progress)
    return found
