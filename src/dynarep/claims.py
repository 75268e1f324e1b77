"""Claim + records -> verdict.

    supported      the interval lies beyond "no effect" in the claimed direction, after Holm's correction over the gated
                   claims of the tier, and the estimate is at least the smallest effect that matters
    contradicted   the interval excludes every effect that matters: it lies short of the smallest one, be that among the
                   negligible effects or beyond "no effect" the other way
    inconclusive   neither: says how many seeds would probably settle it
    untested       this tier cannot judge it, or its runs are not all there: an incomplete set could be cherry-picked;
                   or it is an argument that no experiment can judge

A claim of equality is supported if the interval lies inside the region of negligible effects, contradicted if outside.

A claim may compare with a number that others published: exact, the same for all seeds. Tasks without that number are
left out, and named in the reason.

A claim of agreement asks how many tasks agree with published numbers. A task agrees where our 95 % interval overlaps
theirs (the number, give or take the margin) and is not wider than the claim allows; it disagrees where they do not
overlap; else it is undecided, because noise would always agree. Supported if enough tasks agree, contradicted if too
few could, else inconclusive. There is no p-value, and so no gate.

Source: ours (design section 6; agreement: `mad-td` 8 U1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynarep import fingerprint, published, records, stats
from dynarep.experiment import Experiment, Job
from dynarep.files import checkout
from dynarep.schema import TIERS, AgreementClaim, Argument, Claim, Judged, Measured

ALPHA = 0.05  # family-wise, two-sided


@dataclass(frozen=True)
class Verdict:
    """What a tier says of a claim; `estimate`, `low`, `high` are None where nothing was measured.

    Of an agreement `estimate` is the share of tasks that agree, `low` to `high` what the undecided ones leave open.
    `per_task` is ours: the contrast, or of an agreement the level; `theirs` is what `theirs_label` names. `rule` says
    in words when tasks agree.
    """

    claim: str
    paper: str
    experiment: str
    tier: str
    verdict: str
    role: str
    gated: bool
    says: str
    estimate: float | None
    low: float | None
    high: float | None
    bootstrap: tuple[float, float] | None
    p: float | None
    p_holm: float | None
    n: int
    planned: int
    unit: str
    direction: str
    no_effect: float | None
    smallest: float | None
    why: str
    reason: str
    published: str
    source: str
    tasks: list[str] = field(default_factory=list)
    per_task: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    theirs: dict[str, float] = field(default_factory=dict)
    theirs_label: str = ""
    rule: str = ""
    runs: list[str] = field(default_factory=list)
    diverged: int = 0
    stale: bool = False

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON; infinite bounds (one seed says nothing) become None."""

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        return {key: plain(value) for key, value in asdict(self).items()}


class _MissingRunsError(Exception):
    """Runs that a claim needs are not there or cannot be believed."""


@dataclass
class _Arm:
    """One side of a contrast: a row of values per task, in the order of seeds."""

    values: list[np.ndarray]
    folders: list[str]
    diverged: int
    code: set[tuple[str, str, str]]  # agent, fingerprint, lock


def _arm(jobs: Sequence[Job], side: Measured, results: Path) -> _Arm:
    """Read one side; _MissingRunsError names how many runs are not there and the first reason."""
    per_task: dict[str, list[float]] = {}
    arm = _Arm([], [], 0, set())
    absent: list[str] = []
    for job in jobs:
        if job.variant != side.variant:
            continue
        for seed, folder in zip(job.seeds, job.folders(), strict=True):
            try:
                record = records.read(results / folder, job.config, seed)
                value = _value(record, side)
            except records.RecordError as error:
                absent.append(str(error))
                continue
            if not math.isfinite(value):
                arm.diverged += 1
                value = math.nan if side.worst is None else side.worst
            per_task.setdefault(job.task, []).append(value)
            arm.folders.append(str(folder))
            code = record.manifest["code"]["fingerprint"]
            arm.code.add((job.config.agent.name, code, record.manifest["lock"]))
    if absent:
        found = len(arm.folders)
        raise _MissingRunsError(f"{found} of {found + len(absent)} runs of '{side.variant}' are there. {absent[0]}")
    arm.values = [np.array(values) for values in per_task.values()]
    return arm


def _value(record: records.RunRecord, side: Measured) -> float:
    """Return a run's last value, or its last one by a frame; RecordError if there is none or it ended before."""
    if side.at_frame is None:
        return record.last(side.metric)
    frames = record.columns["frame"]
    if frames.max() < side.at_frame:
        raise records.RecordError(f"{record.folder}: ended at frame {frames.max():.0f}, before {side.at_frame}.")
    rows, values = record.series(side.metric)
    values = values[frames[rows] <= side.at_frame]
    if not len(values):
        raise records.RecordError(f"{record.folder}: has no metric '{side.metric}' by frame {side.at_frame}.")
    return float(values[-1])


def _estimate(claim: Claim, of: _Arm, to: _Arm | None, tasks: Sequence[int], null: float) -> stats.Estimate:
    """Estimate the contrast on some of the tasks."""
    key: tuple[str | int, ...] = ("claim", claim.id, *tasks)
    left = [of.values[t] for t in tasks]
    if to is None:
        return stats.level(left, null, key)
    right = [to.values[t] for t in tasks]
    function = stats.paired_log_ratio if claim.contrast.kind == "ratio" else stats.paired_difference
    return function(left, right, null, key)


def _blank(experiment: Experiment, claim: Judged | Argument, tier: str) -> Verdict:
    """Return the verdict before anything is measured: untested."""
    judged = claim if isinstance(claim, Judged) else None
    effect = claim if isinstance(claim, Claim) else None
    role = judged.role(tier) if judged else "not empirical"
    jobs = experiment.judging_jobs(judged, tier) if judged and role != "untested" else []
    return Verdict(
        claim=claim.id,
        paper=experiment.spec.paper,
        experiment=experiment.spec.id,
        tier=tier,
        verdict="untested",
        role=role,
        gated=role == "gated",
        says=claim.says,
        estimate=None,
        low=None,
        high=None,
        bootstrap=None,
        p=None,
        p_holm=None,
        n=0,
        planned=len({seed for job in jobs for seed in job.seeds}),
        unit=judged.unit if judged else "",
        direction=effect.direction if effect else "",
        no_effect=effect.no_effect if effect else None,
        smallest=effect.smallest if effect else None,
        why=claim.why,
        reason="",
        published=claim.published,
        source=claim.source,
        tasks=list(dict.fromkeys(job.task for job in jobs)),
        rule=_rule(claim) if isinstance(claim, AgreementClaim) else "",
    )


def _rule(claim: AgreementClaim) -> str:
    c = claim.contrast
    overlap = f"our 95 % interval overlaps the published number, give or take {c.margin:g}"
    return f"{overlap}, and reaches at most {c.widest:g} to both sides; needed on {c.needed} tasks"


def judge(experiment: Experiment, claim: Judged | Argument, tier: str, results: Path) -> Verdict:
    """Judge one claim at one tier, without the correction for multiplicity (see `judge_all`)."""
    verdict = _blank(experiment, claim, tier)
    if not isinstance(claim, Judged):
        return replace(verdict, reason=f"not empirical: {claim.why}")
    if verdict.role == "untested":
        able = [name for name in TIERS if claim.role(name) != "untested"]
        which = f"{', '.join(able)} can" if able else "no tier can"
        return replace(verdict, reason=f"this tier cannot judge it; {which}")
    verdict, left_out = _beside(verdict, experiment, claim)
    verdict = _measure(verdict, experiment, claim, results)
    return replace(verdict, reason=left_out + verdict.reason)


def _beside(verdict: Verdict, experiment: Experiment, claim: Judged) -> tuple[Verdict, str]:
    """Put the published numbers beside a claim's tasks; those without one are left out, and named."""
    if claim.theirs is None:
        return verdict, ""
    name, step = claim.theirs.published, claim.theirs.env_step
    numbers = published.means(experiment.folder, name, step, verdict.tasks)
    absent = [task for task in verdict.tasks if task not in numbers]
    verdict = replace(
        verdict,
        tasks=[task for task in verdict.tasks if task in numbers],
        theirs={task: numbers[task].mean for task in verdict.tasks if task in numbers},
        theirs_label=f"{' or '.join(dict.fromkeys(row.label for row in numbers.values()))} at step {step}",
    )
    return verdict, f"without {', '.join(absent)} (no number of {name} at step {step}): " if absent else ""


def _measure(verdict: Verdict, experiment: Experiment, claim: Judged, results: Path) -> Verdict:
    """Read both sides of a claim on the verdict's tasks; judge it if all runs are there and can be believed."""
    jobs = [job for job in experiment.judging_jobs(claim, verdict.tier) if job.task in verdict.tasks]
    try:
        arms = [_arm(jobs, side, results) for side in claim.sides]
    except _MissingRunsError as missing:
        return replace(verdict, reason=str(missing))
    code = set().union(*(arm.code for arm in arms))
    parts = {(job.config.agent.name, fingerprint.of_parts(job.config.agent, job.config.protocol)) for job in jobs}
    verdict = replace(
        verdict,
        runs=list(dict.fromkeys(folder for arm in arms for folder in arm.folders)),
        diverged=sum(arm.diverged for arm in arms),
        stale=code != {(*part, fingerprint.of_lock(checkout())) for part in parts},
    )
    if len(code) > len(parts) or len({lock for _, _, lock in code}) > 1:
        return replace(verdict, reason="its runs were made by different versions of the code or packages")
    if any(not np.isfinite(values).all() for arm in arms for values in arm.values):
        return replace(
            verdict,
            verdict="inconclusive",
            reason=f"{verdict.diverged} runs diverged and the claim states no worst value",
        )
    if isinstance(claim, AgreementClaim):
        return _agree(verdict, claim, arms[0])
    assert isinstance(claim, Claim)
    if claim.theirs:
        constant = [
            np.full(len(values), verdict.theirs[t]) for t, values in zip(verdict.tasks, arms[0].values, strict=True)
        ]
        arms.append(_Arm(constant, [], 0, set()))
    return _compare(verdict, claim, arms[0], arms[1] if len(arms) > 1 else None)


def _compare(verdict: Verdict, claim: Claim, of: _Arm, to: _Arm | None) -> Verdict:
    """Estimate a contrast on all tasks and on each, and decide."""
    tasks = verdict.tasks
    for arm in filter(None, (of, to)):
        units = [claim.contrast.units.get(task, 1.0) for task in tasks]
        arm.values = [values / unit for values, unit in zip(arm.values, units, strict=True)]
    if claim.contrast.kind == "ratio":
        low = sum(int((values <= 0).sum()) for arm in filter(None, (of, to)) for values in arm.values)
        if low:
            reason = f"{low} values are not positive: there is no ratio of them"
            return replace(verdict, verdict="inconclusive", n=min(len(values) for values in of.values), reason=reason)
    everything = range(len(tasks))
    estimate = _estimate(claim, of, to, everything, claim.no_effect)
    per_task = {task: _estimate(claim, of, to, [t], claim.no_effect) for t, task in enumerate(tasks)}
    p = estimate.p
    if claim.direction == "equal":  # both bounds must be excluded: two one-sided tests, at the level of the interval
        bounds = claim.negligible()
        p = max(_estimate(claim, of, to, everything, bound).p for bound in bounds)
        p = p if bounds[0] < estimate.point < bounds[1] else 1.0
    verdict = replace(
        verdict,
        estimate=estimate.point,
        low=estimate.low,
        high=estimate.high,
        bootstrap=(estimate.boot_low, estimate.boot_high),
        p=p,
        n=estimate.n,
        per_task={task: (e.point, e.low, e.high) for task, e in per_task.items()},
    )
    return _decide(verdict, claim, estimate, p)


def _agree(verdict: Verdict, claim: AgreementClaim, of: _Arm) -> Verdict:
    """Apply the rule of agreement in the module's docstring; the interval is what undecided tasks leave open."""
    contrast = claim.contrast
    agree: list[str] = []
    undecided: list[str] = []
    disagree: list[str] = []
    per_task = {}
    for task, values in zip(verdict.tasks, of.values, strict=True):
        theirs = verdict.theirs[task]
        ours = stats.level([values], theirs, ("claim", claim.id, task))
        per_task[task] = (ours.point, ours.low, ours.high)
        if ours.low > theirs + contrast.margin or ours.high < theirs - contrast.margin:
            disagree.append(task)
        else:
            (undecided if (ours.high - ours.low) / 2 > contrast.widest else agree).append(task)
    count, needed = len(verdict.tasks), contrast.needed
    most = len(agree) + len(undecided)
    reason = f"{len(agree)} of {count} tasks agree, {needed} needed"
    for word, tasks in (("disagree", disagree), ("undecided", undecided)):
        reason += f"; {word}: {', '.join(tasks)}" if tasks else ""
    return replace(
        verdict,
        verdict="supported" if len(agree) >= needed else "contradicted" if most < needed else "inconclusive",
        estimate=len(agree) / count,
        low=len(agree) / count,
        high=most / count,
        n=min(len(values) for values in of.values),
        per_task=per_task,
        reason=reason,
    )


def _decide(verdict: Verdict, claim: Claim, estimate: stats.Estimate, p: float) -> Verdict:
    """Apply the rule of the module's docstring, given the (adjusted) p-value."""
    point, low, high = estimate.point, estimate.low, estimate.high
    interval = f"{point:.3g} [{low:.3g}, {high:.3g}]"
    if claim.direction == "equal":
        near, far = claim.negligible()
        if p < ALPHA:
            return replace(verdict, verdict="supported", reason=f"{interval} lies inside [{near:.3g}, {far:.3g}]")
        if high < near or low > far:
            return replace(verdict, verdict="contradicted", reason=f"{interval} lies outside [{near:.3g}, {far:.3g}]")
        return replace(verdict, verdict="inconclusive", reason=f"{interval} reaches beyond [{near:.3g}, {far:.3g}]")
    sign = 1 if claim.direction == "greater" else -1
    best = high if sign > 0 else low  # the end of the interval that is kindest to the claim
    claimed = sign * (point - claim.no_effect) > 0
    if sign * (best - claim.no_effect) < 0:
        return replace(
            verdict, verdict="contradicted", reason=f"{interval} lies on the other side of {claim.no_effect:g}"
        )
    if sign * (best - claim.smallest) < 0:
        reason = f"{interval} excludes every effect that matters ({claim.direction} than {claim.smallest:g})"
        return replace(verdict, verdict="contradicted", reason=reason)
    if claimed and p < ALPHA and sign * (point - claim.smallest) >= 0:
        return replace(verdict, verdict="supported", reason=f"{interval} lies beyond {claim.no_effect:g} as claimed")
    if claimed and p < ALPHA:
        reason = f"{interval}: real, but the estimate is short of the {claim.smallest:g} that matters"
        return replace(verdict, verdict="inconclusive", reason=reason)
    scale = math.log if claim.contrast.kind == "ratio" else float
    needed = stats.seeds_needed(estimate.spread, scale(point) - scale(claim.no_effect), estimate.strata)
    more = (
        f"about {needed} seeds would settle an effect of this size" if needed else "no number of seeds would settle it"
    )
    return replace(verdict, verdict="inconclusive", reason=f"{interval} includes {claim.no_effect:g}; {more}")


def judge_all(experiments: Sequence[Experiment], tier: str, results: Path) -> list[Verdict]:
    """Judge every claim of a tier; gated claims are corrected for multiplicity by Holm's method."""
    pairs = [(experiment, claim) for experiment in experiments for claim in experiment.spec.claims]
    verdicts = [judge(experiment, claim, tier, results) for experiment, claim in pairs]
    measured = {v.claim: v.p for v in verdicts if v.gated and v.p is not None}
    adjusted = stats.holm(measured)
    final = []
    for (_, claim), verdict in zip(pairs, verdicts, strict=True):
        if verdict.claim in adjusted and verdict.verdict == "supported" and adjusted[verdict.claim] >= ALPHA:
            reason = f"{verdict.reason}, but not after correction for {len(adjusted)} gated claims"
            verdict = replace(verdict, verdict="inconclusive", reason=reason)
        final.append(replace(verdict, p_holm=adjusted.get(claim.id)))
    return final


def failures(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the gated claims that are not supported."""
    return [v.claim for v in verdicts if v.gated and v.verdict != "supported"]
