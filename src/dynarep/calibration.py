"""How often a gate is wrong: claims simulated without an effect and with the one claimed, with the spread seen.

A data set is drawn for every gated claim of a tier at once: per task the stated effect, the same in all tasks, plus the
run-to-run spread of the real runs, on the scale of the analysis (logarithms of ratios). It is judged by the very rule
of `claims`, Holm's correction over the gated claims included.

    no effect       the claim's effect is its `no_effect` (of an equality, the edge of what is negligible), that of all
                    others as claimed: Holm's correction then protects this one least. How often it is "supported" is
                    the false-support rate, at most 5 % by design.
    as claimed      every effect is `Effect.claimed`: what the claim expects, or else twice the smallest effect that
                    matters (of an equality, none). How often it is "supported" is the power.
    nothing at all  no claim has an effect: how often any of them is supported.

The spread is drawn in two ways, normal and by resampling the real residuals; the worse one counts. Resampled residuals
are smoothed (normal kernel of width 1.06 s n^-1/5, variance kept), because few values repeat, and repeats look like
little spread: of truly normal data, where t errs on one side in 2.5 %, plain resampling says 4.3 % on average with 5
seeds and 3.1 % with 10, and for a third of all data sets more than 5 %; smoothed it says 2.8 and 2.7 % (300 sets of
residuals each). Claims are drawn independently, although they share runs: Holm's correction holds under any
dependence. Source: ours (design section 6).

experiments/calibration.csv keeps the outcome. A claim may be gated at a tier only where its power there is at least
`LEAST_POWER`: `checks` refuses the file otherwise.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from dynarep import arms, claims, registration, stats
from dynarep.errors import UserError
from dynarep.experiment import Experiment
from dynarep.registration import LEAST_POWER
from dynarep.statements import Claim

DRAWS = 10_000  # data sets per scenario: the Monte-Carlo error of a rate of 5 % is 0.2 %
MOST_FALSE = claims.ALPHA
WAYS = ("normal", "resampled")
Array = np.ndarray


@dataclass(frozen=True)
class Row:
    """One gated claim at one tier; rates are shares of the draws, the worse of the two ways to draw the spread."""

    claim: str
    tier: str
    rule: str  # hash of the rule that was simulated
    seeds: int  # per task
    tasks: int
    spread: float  # pooled within-task standard deviation of the real runs, on the scale of the analysis
    effect: float  # as claimed, on the claim's own scale
    false_support: float
    false_support_error: float  # Monte-Carlo standard error
    power: float
    power_error: float
    power_at_seen: float  # at the effect that the runs show: after the fact, so no reason for anything

    def data(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return asdict(self) | {"faults": self.faults}

    @property
    def faults(self) -> list[str]:
        """Return why this claim should not be gated; empty if it may."""
        found = []
        if self.false_support - 2 * self.false_support_error > MOST_FALSE:
            found.append(f"false support {self.false_support:.1%}, above {MOST_FALSE:.0%}")
        if self.power < LEAST_POWER:
            found.append(f"power {self.power:.0%}, below {LEAST_POWER:.0%}")
        return found


@dataclass(frozen=True)
class Study:
    """What is simulated of a claim, on the scale of the analysis."""

    claim: Claim
    experiment: Experiment
    residuals: list[Array]  # per task: differences of paired runs, less their mean
    seen: float

    @property
    def scale(self) -> Callable[[float], float]:
        """Return what brings the claim's numbers to the scale of the analysis."""
        return math.log if self.claim.contrast.kind == "ratio" else float

    def draw(self, effect: float, way: str, draws: int, generator: np.random.Generator) -> list[Array]:
        """Return data sets of a true effect: an array (draws, seeds) per task."""
        found = []
        for residuals in self.residuals:
            n = residuals.size
            normal, spread = generator.standard_normal((draws, n)), residuals.std(ddof=1)
            if way == "normal":
                noise = normal * spread
            else:
                width = 1.06 * spread * n**-0.2
                noise = generator.choice(residuals, (draws, n)) + width * normal
                noise *= spread / math.hypot(residuals.std(), width) if spread else 0.0
            found.append(effect + noise)
        return found

    def judge(self, data: Sequence[Array]) -> tuple[Array, Array]:
        """Return which data sets would be called supported were it not for Holm's correction, and their p: (draws,)."""
        claim, scale = self.claim, self.scale
        null, smallest = scale(claim.no_effect), scale(claim.smallest)
        if claim.direction == "equal":
            near, far = map(scale, claim.negligible())
            point, _, below, _ = stats.t_interval(data, near)
            above = stats.t_interval(data, far)[2]
            p = np.where((near < point) & (point < far), np.maximum(below, above), 1.0)
            return p < claims.ALPHA, p
        point, half, p, _ = stats.t_interval(data, null)
        sign = 1 if claim.direction == "greater" else -1
        worst = point - sign * half
        beyond = (sign * (point - null) > 0) & (sign * (worst - null) > 0) & (p < claims.ALPHA)
        return beyond & (sign * (point - smallest) >= 0), p


def studies(experiments: Sequence[Experiment], tier: str, results: Path) -> list[Study]:
    """Return what is to be simulated of each gated claim.

    Raises:
        UserError: runs that a claim needs are not there, or diverged and have no worst value.
    """
    found, missing = [], []
    for experiment in experiments:
        for claim in experiment.spec.judged():
            if claim.role(tier) != "gated":
                continue
            if not isinstance(claim, Claim):
                missing.append(f"{claim.id}: a {claim.contrast.kind} cannot be calibrated, so it cannot be gated.")
                continue
            try:
                differences = claims.differences(experiment, claim, tier, results)
                if min(values.size for values in differences) < 2:
                    raise ValueError("a single run has no spread")
            except (ValueError, arms.MissingRunsError) as error:
                missing.append(f"{claim.id}: {error}")
                continue
            residuals = [values - values.mean() for values in differences]
            found.append(Study(claim, experiment, residuals, float(np.mean([v.mean() for v in differences]))))
    if missing:
        what = "\n".join(f"  {line}" for line in missing)
        raise UserError(f"the spread of these gated claims is not known at tier '{tier}':\n{what}")
    return found


def _holm(p: Array) -> Array:
    """Return Holm's adjusted p-values of many data sets: (claims, draws) -> the same; as `stats.holm` of each."""
    order = np.argsort(p, axis=0, kind="stable")
    factor = np.arange(len(p), 0, -1)[:, None]
    adjusted = np.maximum.accumulate(np.minimum(1.0, np.take_along_axis(p, order, 0) * factor), axis=0)
    result = np.empty_like(adjusted)
    np.put_along_axis(result, order, adjusted, 0)
    return result


def _supported(judged: Sequence[tuple[Array, Array]]) -> Array:
    """Return which claims are supported in which data sets: (claims, draws)."""
    alone, p = (np.array(part) for part in zip(*judged, strict=True))
    kept: Array = alone & (_holm(p) < claims.ALPHA)
    return kept


def run(
    experiments: Sequence[Experiment],
    tier: str,
    results: Path,
    draws: int = DRAWS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Row], float]:
    """Calibrate every gated claim of a tier; return their rows, and how often any is supported without any effect."""
    everything = studies(experiments, tier, results)
    rows: dict[str, dict[str, tuple[float, float, float]]] = {study.claim.id: {} for study in everything}
    anything, step = 0.0, 0
    for way in WAYS if everything else ():
        judged = {}
        for study in everything:
            claim, scale = study.claim, study.scale
            nothing = claim.smallest if claim.direction == "equal" else claim.no_effect
            for name, effect in (("null", scale(nothing)), ("claimed", scale(claim.claimed)), ("seen", study.seen)):
                generator = stats.rng("calibrate", claim.id, tier, way, name)
                judged[claim.id, name] = study.judge(study.draw(effect, way, draws, generator))
            step += 1
            report(step, 2 * len(everything))
        names = list(rows)
        power = _supported([judged[name, "claimed"] for name in names]).mean(axis=1)
        seen = _supported([judged[name, "seen"] for name in names]).mean(axis=1)
        anything = max(anything, float(_supported([judged[name, "null"] for name in names]).any(axis=0).mean()))
        for index, name in enumerate(names):
            others = [judged[other, "null" if other == name else "claimed"] for other in names]
            rows[name][way] = float(_supported(others)[index].mean()), float(power[index]), float(seen[index])
    return [_row(study, tier, list(rows[study.claim.id].values()), draws) for study in everything], anything


def _row(study: Study, tier: str, rates: Sequence[tuple[float, float, float]], draws: int) -> Row:
    false, power, seen = max(r[0] for r in rates), min(r[1] for r in rates), min(r[2] for r in rates)
    dof = sum(values.size - 1 for values in study.residuals)
    return Row(
        claim=study.claim.id,
        tier=tier,
        rule=registration.rule(study.experiment, study.claim),
        seeds=min(values.size for values in study.residuals),
        tasks=len(study.residuals),
        spread=_short(math.sqrt(sum(float(values @ values) for values in study.residuals) / dof)),
        effect=_short(study.claim.claimed),
        false_support=false,
        false_support_error=_error(false, draws),
        power=power,
        power_error=_error(power, draws),
        power_at_seen=seen,
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _error(rate: float, draws: int) -> float:
    """Return the Monte-Carlo standard error of a rate; of 0 or 1, as if one more draw had come out otherwise."""
    inner = (rate * draws + 0.5) / (draws + 1)
    return _short(math.sqrt(inner * (1 - inner) / draws))


# -- the file -----------------------------------------------------------------------------------------------------


def to_csv(rows: Sequence[Row], kept: str, tier: str) -> str:
    """Return the file's text: other tiers' rows as they were, this tier's replaced."""
    others = [row for row in csv.DictReader(io.StringIO(kept)) if row.get("tier") != tier]
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(others + [asdict(row) for row in rows])
    return out.getvalue()
