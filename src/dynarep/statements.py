"""What a claim may say: which measurements it compares, in which direction, and the smallest effect that matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from dynarep.configs import Config

TIERS = ("smoke", "ci", "reduced", "paper")
Tier = Literal["smoke", "ci", "reduced", "paper"]
Role = Literal["gated", "reported", "untested"]
ClaimId = Annotated[str, Field(pattern=r"^[A-Z]\d+[a-z]?$")]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(lambda text: " ".join(text.split()))]
OneOrMore = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Average = Literal["mean", "geometric", "median"]  # of a predictor over seeds
FEWEST_RANKED = 5  # settings; the two-sided p-value of a perfect order of four is 2/4!


class Measured(Config):
    """A metric of one arm; `worst` stands in for a value that is not finite (divergence).

    Its last value, or with `at_frame` the last one at or before that frame of a run that came so far. On all tasks of
    the contrast, or on one `task` alone: then both sides have one, for a comparison between tasks.
    """

    variant: str
    metric: str
    worst: float | None = None
    at_frame: int | None = Field(None, ge=0)
    task: str | None = None


class PublishedNumber(Config):
    """The mean that others published of an algorithm at a simulator step, per task: exact, the same for all seeds."""

    published: NonEmpty
    env_step: int = Field(gt=0)


def _kind_of_side(data: Any) -> str:
    theirs = "published" in data if isinstance(data, dict) else isinstance(data, PublishedNumber)
    return "~PublishedNumber" if theirs else "~Measured"


# A tag begins with "~", so that messages leave it out of the path (errors.explain).
Side = Annotated[
    Annotated[Measured, Tag("~Measured")] | Annotated[PublishedNumber, Tag("~PublishedNumber")],
    Discriminator(_kind_of_side),
]


def _known_kind(kind: Any) -> Any:
    if kind not in ("ratio", "difference", "level"):
        raise ValueError("input should be 'agreement', 'difference', 'level', 'rank' or 'ratio'")
    return kind


class Contrast(Config):
    """What is compared, paired by seed: the ratio (log scale) or difference of two measurements, or one level.

    `to` may be a published number; tasks without one are left out. `tasks` are those it is about; a tier judges it on
    those of them that it runs. Without: all that both sides run. `units` divide a task's values, so that tasks whose
    returns differ by orders of magnitude can share a difference. Sides with a `task` each are compared across tasks:
    `tasks` are these two, and a seed's runs on both are a pair.
    """

    kind: Annotated[Literal["ratio", "difference", "level"], BeforeValidator(_known_kind)]
    of: Measured
    to: Side | None = None
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    units: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _two_sides(self) -> Contrast:
        if (self.kind == "level") != (self.to is None):
            raise ValueError("a level has no 'to', a ratio or difference needs one")
        if self.kind == "ratio" and self.units:
            raise ValueError("units cancel in a ratio; leave them out")
        return self

    @model_validator(mode="after")
    def _across_tasks(self) -> Contrast:
        own = [side.task for side in (self.of, self.to) if isinstance(side, Measured)]
        if any(own) and (len(own) < 2 or set(own) != set(self.tasks or ()) or len(set(own)) < 2 or self.units):
            raise ValueError(
                "a comparison between tasks has a 'task' on either side, another one each, and both of them in 'tasks'"
            )
        return self

    @property
    def across(self) -> str:
        """Return what a comparison between tasks is called in place of a task; empty for any other."""
        both = [side.task for side in (self.of, self.to) if isinstance(side, Measured) and side.task]
        return " against ".join(both)


class Agreement(Config):
    """On how many tasks our 95 % interval overlaps a published number, give or take its reading error.

    Attributes:
        margin: the reading error, added on both sides of their number.
        widest: half-width of our interval beyond which an overlap says nothing: otherwise noise would always agree.
        needed: tasks that have to agree.
        tasks: as in a `Contrast`.
    """

    kind: Literal["agreement"]
    of: Measured
    to: PublishedNumber
    margin: float = Field(ge=0, allow_inf_nan=False)
    widest: float = Field(gt=0, allow_inf_nan=False)
    needed: int = Field(ge=1)
    tasks: tuple[str, ...] | None = Field(None, min_length=1)


class Rank(Config):
    """Spearman's rank correlation over the experiment's `pairs`: does a cheap measurement foretell the outcome?

    Attributes:
        predictor: metric of each pair's `predictor`, averaged over seeds.
        outcome: metric whose difference between `of` and `to`, averaged over their common seeds, is foretold.
        average: of the predictor: mean; geometric, of positive values; median, where the values have heavy tails.
        predictor_worst, outcome_worst: stand in for a value that is not finite (divergence).
        tasks: none; a pair says its own.
    """

    kind: Literal["rank"]
    predictor: str
    outcome: str
    average: Average = "mean"
    predictor_worst: float | None = Field(None, allow_inf_nan=False)
    outcome_worst: float | None = Field(None, allow_inf_nan=False)


class Statement(Config):
    """What a paper says, where, and the numbers that it gives."""

    id: ClaimId
    says: NonEmpty
    source: NonEmpty
    published: NonEmpty
    why: NonEmpty


class Argument(Statement):
    """A claim that no experiment can judge; `why` says why not."""

    empirical: Literal[False]
    tiers: ClassVar[Mapping[Tier, Role]] = {}


class Judged(Statement):
    """A claim that runs can judge.

    Attributes:
        why: why this smallest effect, or this margin.
        tiers: what each tier does with it; a tier not named cannot judge it.
        runs: the groups that judge it, where a tier has several; of those named, the one that has runs at the
            tier. Without: those that run its arms, if each arm runs in one of them alone.
    """

    empirical: Literal[True] = True
    contrast: Contrast | Agreement | Rank
    unit: NonEmpty
    tiers: Mapping[Tier, Role]
    runs: OneOrMore = ()

    @property
    def sides(self) -> tuple[Measured, ...]:
        """Return what is measured of our runs; a rank correlation measures the arms of the experiment's pairs."""
        if isinstance(self.contrast, Rank):
            return ()
        return tuple(side for side in (self.contrast.of, self.contrast.to) if isinstance(side, Measured))

    @property
    def theirs(self) -> PublishedNumber | None:
        """Return the published number that it compares with."""
        if isinstance(self.contrast, Rank):
            return None
        return self.contrast.to if isinstance(self.contrast.to, PublishedNumber) else None

    def role(self, tier: str) -> Role:
        """Return what a tier does with it."""
        return {str(name): role for name, role in self.tiers.items()}.get(tier, "untested")


class Effect(Judged):
    """One falsifiable sentence: contrast, direction, value without an effect, and the smallest effect that matters.

    Attributes:
        direction: greater or less than `no_effect`; or equal: within `smallest` of it (for ratios, a factor).
        smallest: the smallest effect that matters, on the contrast's scale, on the claimed side of `no_effect`.
        expects: the effect that the claim was planned for, beyond `smallest`; power is calculated at it. Say in `why`
            where it comes from; never from the runs that judge the claim.
    """

    contrast: Contrast | Rank
    direction: Literal["greater", "less", "equal"]
    no_effect: float
    smallest: float
    expects: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _smallest_on_the_claimed_side(self) -> Effect:
        wrong = self.smallest < self.no_effect if self.direction == "greater" else self.smallest > self.no_effect
        if self.direction != "equal" and wrong:
            raise ValueError(f"smallest {self.smallest} lies on the other side of no_effect {self.no_effect}")
        if self.contrast.kind == "ratio" and min(self.no_effect, self.smallest) <= 0:
            raise ValueError("no_effect and smallest of a ratio must be positive")
        if self.expects is not None and self.direction != "equal":
            short = self.expects < self.smallest if self.direction == "greater" else self.expects > self.smallest
            if short or (self.contrast.kind == "ratio" and self.expects <= 0):
                raise ValueError(f"expects {self.expects} falls short of smallest {self.smallest}")
        if self.expects is not None and self.direction == "equal":
            raise ValueError("an equality expects no effect; leave 'expects' out")
        return self

    @property
    def claimed(self) -> float:
        """Return the effect at which power is calculated: what is expected, or else twice the smallest that matters.

        Twice as far from `no_effect`, of a ratio on the log scale; at the smallest one itself half of all estimates
        fall short of it. Of an equality, no effect.
        """
        if self.expects is not None:
            return self.expects
        if self.direction == "equal":
            return self.no_effect
        ratio = self.contrast.kind == "ratio"
        return self.smallest**2 / self.no_effect if ratio else 2 * self.smallest - self.no_effect

    def negligible(self) -> tuple[float, float]:
        """Return the bounds of the region of effects too small to matter, around `no_effect`."""
        if self.contrast.kind == "ratio":
            factor = max(self.smallest / self.no_effect, self.no_effect / self.smallest)
            return self.no_effect / factor, self.no_effect * factor
        return self.no_effect - abs(self.smallest - self.no_effect), self.no_effect + abs(
            self.smallest - self.no_effect
        )


class Claim(Effect):
    """An effect that two arms, or one and a number, show."""

    contrast: Contrast


class RankClaim(Effect):
    """An effect over settings: a rank correlation. It is judged on all groups that its pairs' variants run in."""

    contrast: Rank

    @model_validator(mode="after")
    def _of_ranks(self) -> RankClaim:
        if self.direction == "equal":
            raise ValueError("a rank correlation is tested against 0 alone; direction must be 'greater' or 'less'")
        if self.no_effect != 0 or abs(self.smallest) > 1:
            raise ValueError("no_effect of a rank correlation must be 0, and smallest lie between -1 and 1")
        if self.runs:
            raise ValueError("leave 'runs' out: a rank correlation is judged wherever the pairs' variants run")
        return self


def _not_gated(role: Any) -> Any:
    if role == "gated":
        raise ValueError(
            "an agreement has no p-value to correct for multiplicity, so it cannot be gated; write 'reported'"
        )
    return role


class AgreementClaim(Judged):
    """Our numbers are those that others published, on enough tasks."""

    contrast: Agreement
    tiers: dict[Tier, Annotated[Literal["reported", "untested"], BeforeValidator(_not_gated)]]


def _kind_of_claim(data: Any) -> str:
    if not isinstance(data, dict):
        return f"~{type(data).__name__}"
    contrast = data.get("contrast")
    if data.get("empirical", True) is False:
        return "~Argument"
    kind = contrast.get("kind") if isinstance(contrast, dict) else None
    return {"agreement": "~AgreementClaim", "rank": "~RankClaim"}.get(str(kind), "~Claim")


AnyClaim = Annotated[
    Annotated[Claim, Tag("~Claim")]
    | Annotated[AgreementClaim, Tag("~AgreementClaim")]
    | Annotated[RankClaim, Tag("~RankClaim")]
    | Annotated[Argument, Tag("~Argument")],
    Discriminator(_kind_of_claim),
]
