"""A claim in full: `dynarep claims --explain C6`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from dynarep import arms, registration
from dynarep.claims import ALPHA, Verdict
from dynarep.cli.common import console
from dynarep.experiment import Experiment, span
from dynarep.statements import TIERS, AgreementClaim, Argument, Claim, Effect, Judged, Measured, Rank

SIDE = {"greater": ("above", "at least"), "less": ("below", "at most")}
REGISTERED = {
    "yes": "this rule was written down before the runs: every manifest carries its hash",
    "no": "THIS RULE IS YOUNGER THAN ITS RUNS: some were made under another one, or before the claim existed",
    "unknown": "not known: some runs were made before manifests recorded rules; ask git for the file's history",
}


def explain(experiment: Experiment, claim: Judged | Argument, verdict: Verdict, results: Path) -> None:
    """Print what the paper says, the rule, the runs used, what they give, and how the verdict follows."""
    screen = console()
    screen.print(f"[bold]{claim.id}[/]  {claim.says}")
    facts = [
        ("source", claim.source),
        ("published", claim.published),
        ("experiment", f"{experiment.key}, {experiment.file.name}"),
    ]
    if isinstance(claim, Judged):
        facts += [("rule", " ".join(_rule(claim, experiment))), ("why so", claim.why)]
        facts += [("tiers", ", ".join(f"{tier}: {claim.role(tier)}" for tier in TIERS))]
        facts += [("gate", power(experiment, claim, verdict.tier))] if verdict.gated else []
        facts += _runs(experiment, claim, verdict)
    _print(screen, facts)
    if isinstance(claim, Claim) and verdict.estimate is not None:
        screen.print(_values(experiment, claim, verdict, results))
    elif verdict.settings:
        screen.print(_settings(verdict))
    elif verdict.theirs:
        screen.print(_agreement(verdict))
    _print(screen, list(_measured(claim, verdict)))
    for text, holds in _steps(claim, verdict):
        screen.print(f"  {'[green]yes[/]' if holds else '[red]no [/]'}  {text}")
    screen.print(
        f"[bold]verdict at tier {verdict.tier}: {verdict.verdict}[/] ({verdict.role}). {verdict.reason}", soft_wrap=True
    )


def _print(screen: object, facts: list[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in facts:
        table.add_row(name, text)
    screen.print(table)  # type: ignore[attr-defined]


def _side(side: Measured, experiment: Experiment) -> str:
    when = f" at frame {side.at_frame}" if side.at_frame is not None else ""
    worst = f" (a diverged run counts as {side.worst:g})" if side.worst is not None else ""
    return f"{side.metric} of '{experiment.spec.variants[side.variant].label}'{when}{worst}"


def _rule(claim: Judged, experiment: Experiment) -> Iterator[str]:
    """Say in sentences what is compared and when it is called what."""
    contrast = claim.contrast
    if isinstance(claim, AgreementClaim):
        yield f"{_side(claim.contrast.of, experiment)} against {claim.contrast.to.published}: how many tasks agree?"
        return
    assert isinstance(claim, Effect)
    if isinstance(claim, Claim):
        to = claim.contrast.to
        what = [_side(side, experiment) for side in claim.sides]
        what += [f"the published {to.published} at step {to.env_step}"] if to and not isinstance(to, Measured) else []
        yield {"ratio": "The ratio of {} to {}.", "difference": "{} minus {}.", "level": "{}."}[contrast.kind].format(
            *what
        )
        yield (
            "Paired by seed, " * (len(what) > 1)
            + "averaged over seeds, then over tasks with equal weight; 95 % t interval."
        )
    else:
        assert isinstance(contrast, Rank)
        foretold = f"{contrast.predictor} and the difference in {contrast.outcome}"
        yield f"Spearman's rank correlation of {foretold} over {len(experiment.spec.pairs)} settings."
    if claim.direction == "equal":
        near, far = claim.negligible()
        yield f"Supported if the interval lies inside [{near:.3g}, {far:.3g}], contradicted if outside."
        return
    side, least = SIDE[claim.direction]
    yield (
        f"Supported if the interval lies {side} {claim.no_effect:g} and the estimate is {least} {claim.smallest:g}; "
        f"contradicted if the interval excludes every effect of {least} {claim.smallest:g}; else inconclusive."
    )


def _runs(experiment: Experiment, claim: Judged, verdict: Verdict) -> Iterator[tuple[str, str]]:
    jobs = experiment.judging_jobs(claim, verdict.tier) if verdict.role != "untested" else []
    for job in jobs:
        if not claim.sides or job.variant in {side.variant for side in claim.sides}:
            yield "runs", f"{job.config.folder()}/seed={{{span(job.seeds)}}}"


def _values(experiment: Experiment, claim: Claim, verdict: Verdict, results: Path) -> Table:
    """Return every pair of runs, so that the estimate can be checked by hand."""
    jobs = [job for job in experiment.judging_jobs(claim, verdict.tier) if job.task in verdict.tasks]
    sides = [arms.read(jobs, side, results).runs() for side in claim.sides]
    table = Table(title="last values of each run", title_justify="left", title_style="dim")
    for name in ("task", "seed", *(f"{side.variant}: {side.metric}" for side in claim.sides), claim.unit):
        table.add_column(name, justify="left" if name == "task" else "right")
    if claim.contrast.across:
        sides = [{claim.contrast.across: next(iter(side.values()))} for side in sides]
    for task, of in sides[0].items():
        for seed, value in of.items():
            row = [value, *(side[task][seed] for side in sides[1:])]
            other = row[1] if len(row) > 1 else verdict.theirs.get(task)
            unit = claim.contrast.units.get(task, 1.0)
            if other is None:
                contrast = value / unit
            else:
                contrast = value / other if claim.contrast.kind == "ratio" else (value - other) / unit
            table.add_row(task, str(seed), *(f"{x:.4g}" for x in row), f"{contrast:.4g}")
    for task, (point, low, high) in verdict.per_task.items():
        table.add_row(task, "all", *[""] * len(sides), f"{point:.3g} [{low:.3g}, {high:.3g}]", style="bold")
    return table


def _settings(verdict: Verdict) -> Table:
    table = Table(title="averages over seeds", title_justify="left", title_style="dim")
    for name in ("setting", "predictor", "difference in outcome"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for label, x in verdict.settings.items():
        table.add_row(label, *(f"{a:.3g} [{b:.3g}, {c:.3g}]" for a, b, c in (x[:3], x[3:])))
    return table


def _agreement(verdict: Verdict) -> Table:
    table = Table(title=verdict.rule, title_justify="left", title_style="dim")
    for name in ("task", "ours", verdict.theirs_label):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, (point, low, high) in verdict.per_task.items():
        table.add_row(task, f"{point:.3g} [{low:.3g}, {high:.3g}]", f"{verdict.theirs[task]:g}")
    return table


def _measured(claim: Judged | Argument, v: Verdict) -> Iterator[tuple[str, str]]:
    if v.estimate is None or v.low is None or v.high is None or not isinstance(claim, Judged):
        return
    yield "estimate", f"{v.estimate:.4g} {v.unit}, 95 % interval [{v.low:.4g}, {v.high:.4g}], {v.sample}"
    if v.bootstrap:
        yield (
            "bootstrap",
            f"[{v.bootstrap[0]:.4g}, {v.bootstrap[1]:.4g}], for comparison; with few seeds it is too narrow",
        )
    if v.p is not None:
        holm = f"; {v.p_holm:.2g} after Holm's correction over the gated claims" if v.p_holm is not None else ""
        yield "p", f"{v.p:.2g}, two-sided{holm}"
    if v.diverged:
        yield "diverged", f"{v.diverged} runs, counted at the stated worst value"
    if v.registered:
        yield "registered", REGISTERED[v.registered]
    if v.stale:
        yield "code", "THE RUNS WERE MADE BY OTHER CODE OR PACKAGES than this checkout's"


def power(experiment: Experiment, claim: Judged, tier: str) -> str:
    """Say what the calibration says of a gated claim."""
    row = registration.calibrated(experiment.folder).get((claim.id, tier))
    again = f"`dynarep claims --calibrate --tier {tier} --write`"
    if row is None:
        return f"not calibrated; {again} does it"
    if registration.outdated(row, experiment, claim, tier):
        return f"calibrated for another rule or number of seeds; {again} does it again"
    return f"power {row.power:.0%} at {row.effect:g}, false support {row.false_support:.1%} without an effect"


def _steps(claim: Judged | Argument, v: Verdict) -> Iterator[tuple[str, bool]]:
    """Yield the questions that the rule asks, with their answers."""
    if not isinstance(claim, Effect) or v.estimate is None or v.low is None or v.high is None:
        return
    if claim.direction == "equal":
        near, far = claim.negligible()
        yield f"does the whole interval lie inside [{near:.3g}, {far:.3g}]?", near < v.low and v.high < far
    else:
        side, least = SIDE[claim.direction]
        sign = 1 if side == "above" else -1
        worst = v.low if sign > 0 else v.high
        best = v.high if sign > 0 else v.low
        yield f"does the whole interval lie {side} {claim.no_effect:g}?", sign * (worst - claim.no_effect) > 0
        reached = sign * (v.estimate - claim.smallest) >= 0
        yield f"is the estimate {least} {claim.smallest:g}, the smallest effect that matters?", reached
        yield "does the interval leave room for an effect that matters?", sign * (best - claim.smallest) >= 0
    p = v.p_holm if v.p_holm is not None else v.p
    if p is not None and not math.isnan(p):
        yield f"is p{' after correction' if v.p_holm is not None else ''} below {ALPHA:g}?", p < ALPHA
