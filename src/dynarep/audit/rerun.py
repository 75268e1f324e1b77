"""Training again: what a forger cannot foresee is which runs are drawn.

Whoever changes a run's metrics and every hash of them leaves nothing to find by reading. So some runs are drawn at
random, trained again from nothing but the configuration and the seed, and their bytes compared. Source: ours.

Bytes are the same only where device, kernels and compiler are: a run is trained as its manifest says that it was, as
far as this machine can, and what is left of a difference is said.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynarep import manifests, records, untrusted
from dynarep import plan as planning
from dynarep.audit.findings import Audit
from dynarep.audit.places import Place, Plan, Planned
from dynarep.errors import UserError
from dynarep.experiment import Job

if TYPE_CHECKING:
    from dynarep import run  # PyTorch

CONFIDENCE = 0.95
Progress = Callable[[str, int, int], None]


def caught(runs: int, forged: int, drawn: int) -> float:
    """Return the probability that at least one of `forged` runs is among `drawn` ones, without replacement."""
    return 1 - math.comb(runs - forged, drawn) / math.comb(runs, drawn)


def smallest_caught(runs: int, drawn: int) -> int:
    """Return the smallest number of forged runs of which one is drawn with 95 % probability."""
    return next(forged for forged in range(1, runs + 1) if caught(runs, forged, drawn) >= CONFIDENCE)


def chosen(plan: Plan, count: int, seed: int) -> list[Path]:
    """Draw runs from all that are planned, whatever is there; UserError for a number that makes no sense."""
    if count < 1:
        raise UserError(f"--rerun {count}: at least 1.")
    if seed < 0:
        raise UserError(f"--seed {seed}: at least 0.")
    folders = sorted(plan.runs)
    if not folders:
        raise UserError("--rerun: there are no runs to draw from.")
    order = np.random.default_rng(seed).permutation(len(folders))
    return [folders[index] for index in order[: min(count, len(folders))]]


def check(place: Place, plan: Plan, count: int, seed: int, audit: Audit, progress: Progress) -> None:
    """Train the drawn runs again in a temporary folder and compare their metrics' bytes."""
    from dynarep import run  # PyTorch

    drawn, total = chosen(plan, count, seed), len(plan.runs)
    seconds = [planning.job_seconds(_alone(plan.runs[folder])) for folder in drawn]
    different, unlike = [], []
    with tempfile.TemporaryDirectory(prefix="dynarep-audit-") as temporary:
        for index, folder in enumerate(drawn):
            spent, expected, whole = sum(seconds[:index]), seconds[index], sum(seconds)

            def report(
                done: int, of: int, now: dict[str, float], spent: float = spent, expected: float = expected,
                whole: float = whole, folder: Path = folder,
            ) -> None:  # fmt: skip
                progress(str(folder), int(1000 * (spent + expected * done / of) / whole), 1000)

            theirs = _machine(place.runs / folder)
            try:
                _train(_alone(plan.runs[folder]), Path(temporary), report, theirs)
            except run.StoppedError:
                print("\nstopped: nothing is kept of an audit", file=sys.stderr)
                raise SystemExit(130) from None
            other = _differences(theirs, _machine(Path(temporary) / folder))
            if other:
                unlike.append({"run": str(folder), "made_with": other})
            if not _same(place, folder, Path(temporary), audit, other):
                different.append(folder)
    audit.checked["trained again"] += len(drawn)
    audit.rerun = {
        "seed": seed,
        "runs": total,
        "drawn": [str(folder) for folder in drawn],
        "different": [str(folder) for folder in different],
        "made_otherwise": unlike,
        "caught": [
            {"forged": forged, "probability": round(caught(total, forged, len(drawn)), 4)}
            for forged in sorted({1, math.ceil(0.05 * total), math.ceil(0.1 * total)})
        ],
        "caught_with_95_percent": smallest_caught(total, len(drawn)),
    }


def _alone(planned: Planned) -> Job:
    """Return the job that trains one seed alone: packing does not change a byte."""
    job = planned.job
    return Job(job.experiment, job.group, job.variant, job.tier, job.config, (planned.seed,))


def _train(job: Job, results: Path, report: run.Report, theirs: Mapping[str, Any]) -> None:
    """Train a job on the device and with the compiler that a manifest names; without them if they are not here."""
    from dynarep import run  # PyTorch

    compiled, device = theirs.get("compiled") is True, str(theirs.get("device", "cpu"))
    try:
        run.train(replace(job, compiled=compiled), results, report, device=device)
    except UserError:
        if not compiled and device == "cpu":
            raise
        run.train(job, results, report)


def _same(place: Place, folder: Path, made: Path, audit: Audit, other: str) -> bool:
    """Compare a run's metrics with those made now; a run that is not there was found missing already."""
    path = place.runs / folder / records.METRICS
    try:
        if untrusted.linked(path.parent, records.DEPTH):
            return True
        theirs = untrusted.read_bytes(path, untrusted.METRICS_BYTES)
    except (FileNotFoundError, untrusted.UntrustedError):
        return True
    ours = (made / folder / records.METRICS).read_bytes()
    if theirs == ours:
        return True
    a, b = theirs.split(b"\n"), ours.split(b"\n")
    line = next((n for n, (x, y) in enumerate(zip(a, b, strict=False), 1) if x != y), min(len(a), len(b)))
    said = f"line {line} is '{a[line - 1][:80].decode(errors='replace')}', made again '{b[line - 1][:80].decode()}'"
    why = f"; it was made with {other}: it may be that alone" if other else ""
    audit.find(place.name(path), "rerun", f"training the seed again gives other metrics: {said}{why}")
    return False


def _machine(run_folder: Path) -> dict[str, Any]:
    """Return what a run's manifest says of the machine; nothing if it cannot be believed."""
    try:
        data = untrusted.read_bytes(run_folder / records.MANIFEST, untrusted.MANIFEST_BYTES)
        return dict(manifests.check(untrusted.parse_json(data), records.METRICS).machine)
    except (OSError, untrusted.UntrustedError):
        return {}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Say in what a run was made otherwise than its copy: "mkl own choice (here intel path)"; "" if it says nothing."""
    if not theirs:
        return ""
    unsaid = "not recorded"
    found = [(name, theirs.get(name, unsaid), ours.get(name, unsaid)) for name in records.MACHINE]
    return ", ".join(f"{name} {there} (here {here})" for name, there, here in found if there != here)
