"""Claim + records -> verdict.

    supported      the interval lies beyond "no effect" in the claimed direction, after Holm's correction over the gated
                   claims of the tier, and the estimate is at least the smallest effect that matters
    contradicted   the interval excludes every effect that matters: it lies short of the smallest one, be that among the
                   negligible effects or beyond "no effect" the other way
    inconclusive   neither: says how many seeds would probably settle it
    untested       this tier cannot judge it, or its runs are not all there: an incomplete set could be cherry-picked;
                   or it is an argument that no experiment can judge

A claim of equality is supported if the interval lies inside the region of negligible effects, contradicted if outside.

A claim of ranks has settings (an experiment's pairs) in place of seeds: Spearman's rank correlation between a cheap
measurement and a difference in outcome. Its p-value and its interval are made in different ways (`stats`), and both
must exclude "no effect". A setting without all its runs leaves it untested.

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

from dynarep import arms, fingerprint, pairing, published, registration, stats, untrusted
from dynarep.arms import Arm
from dynarep.experiment import Experiment, Job
from dynarep.files import checkout
from dynarep.statements import TIERS, AgreementClaim, Argument, Claim, Effect, Judged, Measured, RankClaim

ALPHA = 0.05  # family-wise, two-sided


@dataclass(frozen=True)
class Verdict:
    """What a tier says of a claim; `estimate`, `low`, `high` are None where nothing was measured.

    Of an agreement `estimate` is the share of tasks that agree, `low` to `high` what the undecided ones leave open.
    `per_task` is ours: the contrast, or of an agreement the level; `theirs` is what `theirs_label` names. `rule` says
    in words when tasks agree. Of ranks `n` and `planned` count settings, and `settings` has each one's predictor and
    outcome, with their intervals. `registered` says whether the rule was in force when the runs were made: yes, no (it
    is younger than a run, or has changed since) or unknown (a run does not say); empty if none was read.
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
    settings: dict[str, tuple[float, ...]] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    diverged: int = 0
    stale: bool = False
    registered: str = ""

    @property
    def sample(self) -> str:
        """Return what was measured how often, in words."""
        if self.settings:
            return f"{self.n} settings"
        return f"{self.n} seeds x {len(self.tasks)} task{'s' if len(self.tasks) > 1 else ''}"

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON; infinite bounds (one seed says nothing) become None."""

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        return {key: plain(value) for key, value in asdict(self).items()}


def _estimate(claim: Claim, of: Arm, to: Arm | None, tasks: Sequence[int], null: float) -> stats.Estimate:
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
    effect = claim if isinstance(claim, Effect) else None
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
        planned=len(experiment.spec.pairs) * bool(jobs)
        if isinstance(claim, RankClaim)
        else len({seed for job in jobs for seed in job.seeds}),
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
    if isinstance(claim, RankClaim):
        return _ranked(verdict, experiment, claim, results)
    try:
        sides = [arms.read(jobs, side, results) for side in claim.sides]
    except arms.MissingRunsError as missing:
        return replace(verdict, reason=str(missing))
    verdict, believed = _believed(verdict, registration.rule(experiment, claim), jobs, sides)
    if not believed:
        return verdict
    if isinstance(claim, AgreementClaim):
        return _agree(verdict, claim, sides[0])
    assert isinstance(claim, Claim)
    of, to = _two_sides(verdict, claim, sides)
    return _compare(verdict, claim, of, to)


def _two_sides(verdict: Verdict, claim: Claim, sides: Sequence[Arm]) -> tuple[Arm, Arm | None]:
    """Return both sides of a contrast in its units: the second may be a published number, or none."""
    sides = list(sides)
    if claim.theirs:
        constant = [
            np.full(len(values), verdict.theirs[t]) for t, values in zip(verdict.tasks, sides[0].values, strict=True)
        ]
        sides.append(Arm(constant, [], 0, set()))
    places = [claim.contrast.across] if claim.contrast.across else verdict.tasks
    units = [claim.contrast.units.get(task, 1.0) for task in places]
    for arm in sides:
        arm.values = [values / unit for values, unit in zip(arm.values, units, strict=True)]
    return sides[0], sides[1] if len(sides) > 1 else None


def differences(experiment: Experiment, claim: Claim, tier: str, results: Path) -> list[np.ndarray]:
    """Return what is averaged, per task: the paired differences of a claim's runs, of a ratio those of logarithms.

    Raises:
        MissingRunsError: a run is not there, or cannot be believed.
        ValueError: a run diverged and the claim states no worst value, or a ratio has none.
    """
    verdict, _ = _beside(_blank(experiment, claim, tier), experiment, claim)
    jobs = [job for job in experiment.judging_jobs(claim, tier) if job.task in verdict.tasks]
    of, to = _two_sides(verdict, claim, [arms.read(jobs, side, results) for side in claim.sides])
    if not all(np.isfinite(values).all() for arm in filter(None, (of, to)) for values in arm.values):
        raise ValueError("runs diverged and the claim states no worst value")
    if claim.contrast.kind != "ratio":
        return [x - y for x, y in zip(of.values, to.values if to else np.zeros(len(of.values)), strict=True)]
    assert to is not None
    if not all((values > 0).all() for arm in (of, to) for values in arm.values):
        raise ValueError("values are not positive: there is no ratio of them")
    return [np.log(x) - np.log(y) for x, y in zip(of.values, to.values, strict=True)]


def _believed(verdict: Verdict, rule: str, jobs: Sequence[Job], sides: Sequence[Arm]) -> tuple[Verdict, bool]:
    """Note which runs a verdict rests on, and whether they were made by one code and have values to judge."""
    code = set().union(*(side.code for side in sides))
    parts = {(job.config.agent.name, fingerprint.of_parts(job.config.agent, job.config.protocol)) for job in jobs}
    verdict = replace(
        verdict,
        runs=list(dict.fromkeys(folder for side in sides for folder in side.folders)),
        diverged=sum(side.diverged for side in sides),
        stale=code != {(*part, fingerprint.of_lock(checkout())) for part in parts},
        registered=registration.state(rule, verdict.claim, [rules for side in sides for rules in side.rules]),
    )
    if len(code) > len(parts) or len({lock for _, _, lock in code}) > 1:
        return replace(verdict, reason="its runs were made by different versions of the code or packages"), False
    if any(not np.isfinite(values).all() for side in sides for values in side.values):
        reason = f"{verdict.diverged} runs diverged and the claim states no worst value"
        return replace(verdict, verdict="inconclusive", reason=reason), False
    return verdict, True


def _ranked(verdict: Verdict, experiment: Experiment, claim: RankClaim, results: Path) -> Verdict:
    """Measure every pair, or say how many there are; then correlate their ranks and decide."""
    contrast = claim.contrast
    sides: dict[tuple[str, ...], Arm] = {}  # pairs may share an arm
    settings: dict[str, list[Arm]] = {}
    missing: list[str] = []
    by_pair = experiment.pair_jobs(verdict.tier)
    for pair in experiment.spec.pairs:
        jobs, own = by_pair[pair.label], []
        measured = [(pair.predictor, contrast.predictor, contrast.predictor_worst)]
        measured += [(arm, contrast.outcome, contrast.outcome_worst) for arm in (pair.of, pair.to)]
        try:
            for variant, metric, worst in measured:
                place = (variant, metric, *sorted({job.task for job in jobs}))
                side = {"variant": variant, "metric": metric, "worst": worst}
                if place not in sides:
                    sides[place] = arms.read(jobs, Measured.model_validate(side), results)
                own.append(sides[place])
        except arms.MissingRunsError as error:
            missing.append(str(error))
            continue
        settings[pair.label] = own
    if missing:
        count = f"{len(settings)} of {len(experiment.spec.pairs)} settings have all their runs"
        return replace(verdict, n=len(settings), reason=f"{count}. {missing[0]}")
    jobs = [job for jobs in by_pair.values() for job in jobs]
    verdict, believed = _believed(verdict, registration.rule(experiment, claim), jobs, list(sides.values()))
    if not believed:
        return verdict
    try:
        points = [pairing.measure(x.runs(), of.runs(), to.runs(), contrast.average) for x, of, to in settings.values()]
        estimate = pairing.rank(points, contrast.predictor, contrast.outcome)
    except ValueError as error:  # no order, or a geometric average of what is not positive
        return replace(verdict, verdict="inconclusive", n=len(settings), reason=str(error))
    shown: dict[str, tuple[float, ...]] = {label: (*x, *y) for label, (x, y) in zip(settings, points, strict=True)}
    verdict = replace(_estimated(verdict, estimate, estimate.p), settings=shown)
    return _decide(verdict, claim, estimate, estimate.p)


def _compare(verdict: Verdict, claim: Claim, of: Arm, to: Arm | None) -> Verdict:
    """Estimate a contrast on all tasks and on each, and decide."""
    tasks = [claim.contrast.across] if claim.contrast.across else verdict.tasks
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
    shown = {task: (e.point, e.low, e.high) for task, e in per_task.items()}
    return _decide(replace(_estimated(verdict, estimate, p), per_task=shown), claim, estimate, p)


def _estimated(verdict: Verdict, estimate: stats.Estimate, p: float) -> Verdict:
    """Note an estimate and the p-value that is judged."""
    return replace(
        verdict,
        estimate=estimate.point,
        low=estimate.low,
        high=estimate.high,
        bootstrap=(estimate.boot_low, estimate.boot_high),
        p=p,
        n=estimate.n,
    )


def _agree(verdict: Verdict, claim: AgreementClaim, of: Arm) -> Verdict:
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


def _decide(verdict: Verdict, claim: Effect, estimate: stats.Estimate, p: float) -> Verdict:
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
    worst = low if sign > 0 else high
    beyond = claimed and p < ALPHA and sign * (worst - claim.no_effect) > 0
    if beyond and sign * (point - claim.smallest) >= 0:
        return replace(verdict, verdict="supported", reason=f"{interval} lies beyond {claim.no_effect:g} as claimed")
    if beyond:
        reason = f"{interval}: real, but the estimate is short of the {claim.smallest:g} that matters"
        return replace(verdict, verdict="inconclusive", reason=reason)
    if isinstance(claim, RankClaim):
        reason = f"{interval}, p = {p:.2g}: too few settings to tell from no association"
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


def read(path: Path) -> list[Verdict] | None:
    """Return verdicts that `dynarep claims --out` has written; None if they are not there, or not to be understood."""
    try:
        rows = untrusted.parse_json(untrusted.read_bytes(path, untrusted.METRICS_BYTES))
        return [_unbounded(Verdict(**row)) for row in rows]
    except (OSError, TypeError, untrusted.UntrustedError):
        return None


def _unbounded(verdict: Verdict) -> Verdict:
    """Give an interval back its infinite ends, which JSON does not know."""
    if verdict.estimate is None:
        return verdict
    low = -math.inf if verdict.low is None else verdict.low
    return replace(verdict, low=low, high=math.inf if verdict.high is None else verdict.high)
