"""Which rule of a claim was in force when a run was made: a rule younger than its runs may have been fitted to them.

Every manifest carries a hash of the rule of each claim, at any tier, that rests on the run. A claim whose rule is
another one now, or did not exist then, is younger than the run. It says nothing of runs that were thrown away and made
again: of those the git commit in the manifest does. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dynarep.experiment import Experiment, identity
from dynarep.statements import TIERS, Judged, RankClaim

# What decides a verdict. Wording, sources and published numbers that are only shown may be corrected at any time.
DECIDES = {"contrast", "direction", "no_effect", "smallest", "tiers", "runs"}
DIGITS = 16

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
    for experiment in experiments:
        for claim in experiment.spec.judged():
            now = rule(experiment, claim)
            judging = [
                job for tier in TIERS if claim.role(tier) != "untested" for job in _jobs(experiment, claim, tier)
            ]
            for identifier in {job.config.identity() for job in judging}:
                found.setdefault(identifier, {})[claim.id] = now
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
