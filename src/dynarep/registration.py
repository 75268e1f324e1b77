"""Which rule of a claim was in force when a run was made: a rule younger than its runs may have been fitted to them.

Every manifest carries a hash of the rule of each claim, at any tier, that rests on the run. A claim whose rule is
another one now, or did not exist then, is younger than the run. It says nothing of runs that were thrown away and made
again: of those the git commit in the manifest does. Source: ours.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, ValidationError

from dynarep.configs import Config
from dynarep.errors import UserError, explain, invalid
from dynarep.hashing import identity
from dynarep.statements import TIERS, Judged, RankClaim, Tier

if TYPE_CHECKING:
    from dynarep.experiment import Experiment

# What decides a verdict. Wording, sources and published numbers that are only shown may be corrected at any time.
DECIDES = {"contrast", "direction", "no_effect", "smallest", "tiers", "runs"}
DIGITS = 16
CALIBRATION = "calibration.csv"  # beside the experiment files; written by `dynarep claims --calibrate`
LEAST_POWER = 0.8  # of a gated claim

Rules = Mapping[str, str]  # claim -> hash


def rule(experiment: Experiment, claim: Judged) -> str:
    """Return the hash of what decides a claim's verdict; keys at their defaults do not count."""
    content = claim.model_dump(mode="json", include=DECIDES, exclude_defaults=True)
    if isinstance(claim, RankClaim):
        content["pairs"] = [pair.model_dump(mode="json", exclude_defaults=True) for pair in experiment.spec.pairs]
    return identity(content)[:DIGITS]


def registered(experiments: Iterable[Experiment]) -> dict[str, dict[str, str]]:
    """Return, by identity of a run's configuration, the rules of all claims that rest on such a run at some tier."""
    found: dict[str, dict[str, str]] = {}
    identities: dict[int, str] = {}  # of a configuration that is one object in many jobs and under many claims
    for experiment in experiments:
        for claim in experiment.spec.judged():
            now = rule(experiment, claim)
            for tier in (tier for tier in TIERS if claim.role(tier) != "untested"):
                for config in (job.config for job in _jobs(experiment, claim, tier)):
                    if id(config) not in identities:
                        identities[id(config)] = config.identity()
                    found.setdefault(identities[id(config)], {})[claim.id] = now
    return found


def _jobs(experiment: Experiment, claim: Judged, tier: str) -> list[Any]:
    jobs = experiment.judging_jobs(claim, tier)
    arms = {side.variant for side in claim.sides}
    return [job for job in jobs if not arms or job.variant in arms]


def state(now: str, claim: str, behind: Iterable[Rules | None]) -> str:
    """Say whether a claim's rule was in force when the runs behind it were made.

    Args:
        now: the hash of its rule.
        claim: its id.
        behind: what the manifest of each run says; None where it says nothing.

    Returns:
        "yes"; "no" if a run was made under another rule or before there was one; "unknown" if a run does not say.
    """
    said = list(behind)
    if any(rules is not None and rules.get(claim) != now for rules in said):
        return "no"
    return "unknown" if None in said or not said else "yes"


# -- power --------------------------------------------------------------------------------------------------------


class Calibrated(Config):
    """A row of `CALIBRATION`: see `calibration.Row`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    claim: str
    tier: Tier
    rule: str
    seeds: int = Field(ge=2)
    tasks: int = Field(ge=1)
    spread: float = Field(ge=0)
    effect: float
    false_support: float = Field(ge=0, le=1)
    false_support_error: float = Field(ge=0, le=1)
    power: float = Field(ge=0, le=1)
    power_error: float = Field(ge=0, le=1)
    power_at_seen: float = Field(ge=0, le=1)


def calibrated(folder: Path) -> dict[tuple[str, str], Calibrated]:
    """Read the calibration of gated claims, (claim, tier) -> row; empty without a file. UserError lists its faults."""
    path = folder / CALIBRATION
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    found: dict[tuple[str, str], Calibrated] = {}
    faults: list[str] = []
    for line, data in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        try:
            row = Calibrated.model_validate(data)
        except ValidationError as error:
            faults += explain(error, Calibrated, f"line {line}: ")
            continue
        if (row.claim, row.tier) in found:
            faults.append(f"line {line}: '{row.claim}' at '{row.tier}' is there twice.")
        found[row.claim, row.tier] = row
    if faults:
        raise invalid(path, faults)
    return found


def weak(experiment: Experiment) -> Iterator[str]:
    """Yield the claims that are gated where their calibrated power is too low.

    A row for another rule or another number of seeds says nothing of this one; `dynarep claims` asks for a new one.
    """
    rows = calibrated(experiment.folder)
    for claim in experiment.spec.judged():
        for tier in (tier for tier in TIERS if claim.role(tier) == "gated"):
            row = rows.get((claim.id, tier))
            if row and row.power < LEAST_POWER and not outdated(row, experiment, claim, tier):
                yield (
                    f"claims.{claim.id}.tiers.{tier}: gated, with a power of {row.power:.0%} at an effect of "
                    f"{row.effect:g} ({CALIBRATION}); a gate needs {LEAST_POWER:.0%}. Write 'reported', or plan more "
                    "seeds."
                )


def outdated(row: Calibrated, experiment: Experiment, claim: Judged, tier: str) -> bool:
    """Return whether a calibration is of another rule, or of fewer or more seeds than are planned now."""
    seeds: dict[tuple[str, str], int] = {}
    for job in _jobs(experiment, claim, tier):
        seeds[job.variant, job.task] = seeds.get((job.variant, job.task), 0) + len(job.seeds)
    return row.rule != rule(experiment, claim) or row.seeds != min(seeds.values(), default=0)
