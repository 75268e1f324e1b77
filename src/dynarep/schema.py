"""What an experiment file and a tier file may say. Frozen models; an unknown key is an error."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Optional

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, create_model, model_validator

from dynarep.configs import AgentConfig, Config, ProtocolConfig, hp, registry

LINE_STYLES = 4  # that can be told apart in a figure
TIERS = ("smoke", "ci", "reduced", "paper")
Tier = Literal["smoke", "ci", "reduced", "paper"]
Role = Literal["gated", "reported", "untested"]
Size = Annotated[int, Field(ge=1)]
ClaimId = Annotated[str, Field(pattern=r"^[A-Z]\d+[a-z]?$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(lambda text: " ".join(text.split()))]
OneOrMore = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


def _sources(value: Any) -> Any:
    if isinstance(value, bool) or (
        isinstance(value, list | tuple) and value and all(isinstance(x, str) for x in value)
    ):
        return value
    raise ValueError("input should be true, false or a list of algorithms")


Sources = Annotated[bool | tuple[str, ...], BeforeValidator(_sources)]  # whose published numbers are shown

_RUN_LEVEL: dict[str, Any] = {
    "tasks": (Optional[tuple[str, ...]], Field(None, min_length=1)),  # noqa: UP045  (create_model wants an object)
    "seeds": (Optional[int], Field(None, ge=1)),  # noqa: UP045
    "first_seed": (Optional[int], Field(None, ge=0)),  # noqa: UP045
    "seeds_per_job": (Optional[int], Field(None, ge=1)),  # noqa: UP045
}


@cache
def budget_model() -> type[Config]:
    """Return the model of a budget: the run-level keys and every field that an agent or protocol lets a tier change."""
    fields = dict(_RUN_LEVEL)
    for part in (*registry(AgentConfig).values(), *registry(ProtocolConfig).values()):
        for key in sorted(part.budget):
            fields[key] = (Optional[part.model_fields[key].annotation], None)  # noqa: UP045
    return create_model("Budget", __base__=Config, **fields)


class TierFile(Config):
    """experiments/tiers/<tier>.yaml: budgets and nothing else."""

    tier: Tier
    purpose: NonEmpty
    jobs_per_process: int = hp(1, "ours: tiny jobs share the seconds that a process needs to start", ge=1)
    figures_per_process: int = hp(1, "ours: so do small figures", ge=1)
    budget: dict[str, Any] = hp({}, "keys of the budget; an experiment's own budget overrides them")


class Settings(Config):
    """Hyperparameters that differ from the defaults, for all variants of a group or for one variant."""

    environment: dict[str, Any] = hp({}, "keys of EnvironmentConfig")
    agent: dict[str, Any] = hp({}, "keys of the agent's configuration")
    protocol: dict[str, Any] = hp({}, "keys of the protocol's configuration")


class Group(Config):
    """Runs that share agent (but see `Variant.algorithm`), protocol and settings.

    Attributes:
        why: why the settings differ from the paper's.
        budget: one block of tasks per tier, or several.
    """

    agent: str
    protocol: str
    why: NonEmpty
    settings: Settings = Settings()
    variants: tuple[str, ...] | None = None
    jobs_per_process: int | None = hp(None, "ours: as in a tier file, for a group of tiny jobs at any tier", ge=1)
    budget: dict[Tier, tuple[dict[str, Any], ...]]

    def blocks(self, tier: str) -> tuple[dict[str, Any], ...]:
        """Return a tier's budget blocks; empty where the group has no runs."""
        return {str(name): blocks for name, blocks in self.budget.items()}.get(tier, ())


class Variant(Settings):
    """One arm.

    Attributes:
        algorithm: an agent of its own, instead of the group's; of the group's agent settings it takes those it knows.
        tasks: it runs only on these of the budget's tasks.
        dose, series: its place in a dose panel; `series` also where curves are coloured by it.
    """

    label: NonEmpty
    algorithm: str = ""
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    dose: float | None = Field(None, allow_inf_nan=False)
    series: str = ""


class Shows(Config):
    """What may stand beside our numbers in a panel or table.

    Attributes:
        published: numbers that others published for these tasks: all of them, or those of some algorithms.
        published_tiers: where; at a smaller budget the comparison would be false.
        published_step: their simulator step, where an algorithm has numbers at several and one is to be shown.
    """

    published: Sources = False
    published_tiers: tuple[Tier, ...] = Field(("paper",), min_length=1)
    published_step: int | None = Field(None, gt=0)


class Panel(Shows):
    """One band of a figure, with a place per task.

    Attributes:
        kind: what is drawn.
            curves: metrics along training. dots: last value of each seed, told apart in the legend. final: the same,
            with the variants' names below. dose: last value against the variants' `dose`, a line per `series`.
            calibration: predicted against real. spectrum: eigenvalues in the complex plane.
        metrics: name of a recorded metric -> its label.
        scale: of the y axis, of a spectrum of both; logarithmic ones show geometric means. `linear_within`: the
            straight part of a symlog one.
        x: of curves. `x_label`, `x_scale`: of doses.
        colour_by: of curves of one metric: every variant has a colour, or variants of one `series` share theirs and
            differ in line style, in the order of the file.
        published: in curves over frames, points at their simulator step; elsewhere a line across.
    """

    kind: Literal["curves", "dots", "final", "dose", "calibration", "spectrum"]
    metrics: dict[str, str] = Field(min_length=1)
    label: NonEmpty
    scale: Literal["linear", "log", "symlog"] = "linear"
    linear_within: float = hp(1.0, "ours", gt=0)
    x: Literal["update", "frame", "agent_step"] = "update"
    x_label: str = "dose"
    x_scale: Literal["linear", "log"] = "linear"
    variants: tuple[str, ...] | None = None
    reference: float | None = None
    reference_label: str = ""
    colour_by: Literal["variant", "series"] = "variant"

    @model_validator(mode="after")
    def _curves_only(self) -> Panel:
        if self.published and self.kind == "curves" and self.x != "frame":
            raise ValueError("published numbers stand at simulator steps; curves that show them need 'x: frame'")
        if self.colour_by == "series" and (self.kind != "curves" or len(self.metrics) > 1):
            raise ValueError("'colour_by: series' is for curves of one metric")
        return self

    def needs(self) -> list[str]:
        """Return the names of recorded metrics that the panel reads; a calibration or spectrum reads groups of them."""
        return [f"{name}/0/real" if self.kind in ("calibration", "spectrum") else name for name in self.metrics]


class Figure(Config):
    """What is drawn."""

    panels: tuple[Panel, ...] = Field(min_length=1)


class ResultTable(Shows):
    """A table instead of a figure.

    Attributes:
        kind: returns: a row per task, a column per variant: mean of a metric's last values over seeds, 95 % interval,
            seeds found. hyperparameters: every field of the named parts, its default and where this comes from, read
            from the code, so that it cannot drift; the file's variants, if it has some, say what they change.
            architecture: every layer of the named agents' networks at the default width, with its parameters.
        metric, label, variants, published: of returns, as in a panel.
        agents, protocols: of hyperparameters. agents: of an architecture too.
        sizes: of an architecture: name -> length of an observation and of an action.
    """

    kind: Literal["returns", "hyperparameters", "architecture"]
    metric: str = ""
    label: str = ""
    variants: tuple[str, ...] | None = None
    agents: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    sizes: dict[str, tuple[Size, Size]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> ResultTable:
        needed = {"returns": {"metric", "label"}, "hyperparameters": {"agents"}, "architecture": {"agents", "sizes"}}
        optional = {
            "returns": {"variants", *Shows.model_fields},
            "hyperparameters": {"protocols"},
            "architecture": set(),
        }
        given, own = self.model_fields_set, needed[self.kind] | optional[self.kind]
        foreign = set(type(self).model_fields) - own - {"kind"}
        if needed[self.kind] - given or foreign & given:
            keys = f"needs {' and '.join(sorted(needed[self.kind]))}, and cannot have {', '.join(sorted(foreign))}"
            raise ValueError(f"a table of {self.kind} {keys}")
        return self


class Measured(Config):
    """A metric of one arm; `worst` stands in for a value that is not finite (divergence).

    Its last value, or with `at_frame` the last one at or before that frame of a run that came so far.
    """

    variant: str
    metric: str
    worst: float | None = None
    at_frame: int | None = Field(None, ge=0)


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
        raise ValueError("input should be 'agreement', 'difference', 'level' or 'ratio'")
    return kind


class Contrast(Config):
    """What is compared, paired by seed: the ratio (log scale) or difference of two measurements, or one level.

    `to` may be a published number; tasks without one are left out. `tasks` are those it is about; a tier judges it on
    those of them that it runs. Without: all that both sides run. `units` divide a task's values, so that tasks whose
    returns differ by orders of magnitude can share a difference.
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
        runs: the groups that judge it, where a tier has several; of those named, the one that has runs at the tier.
    """

    empirical: Literal[True] = True
    contrast: Contrast | Agreement
    unit: NonEmpty
    tiers: Mapping[Tier, Role]
    runs: OneOrMore = ()

    @property
    def sides(self) -> tuple[Measured, ...]:
        """Return what is measured of our runs."""
        return tuple(side for side in (self.contrast.of, self.contrast.to) if isinstance(side, Measured))

    @property
    def theirs(self) -> PublishedNumber | None:
        """Return the published number that it compares with."""
        return self.contrast.to if isinstance(self.contrast.to, PublishedNumber) else None

    def role(self, tier: str) -> Role:
        """Return what a tier does with it."""
        return {str(name): role for name, role in self.tiers.items()}.get(tier, "untested")


class Claim(Judged):
    """One falsifiable sentence: contrast, direction, value without an effect, and the smallest effect that matters.

    Attributes:
        direction: greater or less than `no_effect`; or equal: within `smallest` of it (for ratios, a factor).
        smallest: the smallest effect that matters, on the contrast's scale, on the claimed side of `no_effect`.
    """

    contrast: Contrast
    direction: Literal["greater", "less", "equal"]
    no_effect: float
    smallest: float

    @model_validator(mode="after")
    def _smallest_on_the_claimed_side(self) -> Claim:
        wrong = self.smallest < self.no_effect if self.direction == "greater" else self.smallest > self.no_effect
        if self.direction != "equal" and wrong:
            raise ValueError(f"smallest {self.smallest} lies on the other side of no_effect {self.no_effect}")
        if self.contrast.kind == "ratio" and min(self.no_effect, self.smallest) <= 0:
            raise ValueError("no_effect and smallest of a ratio must be positive")
        return self

    def negligible(self) -> tuple[float, float]:
        """Return the bounds of the region of effects too small to matter, around `no_effect`."""
        if self.contrast.kind == "ratio":
            factor = max(self.smallest / self.no_effect, self.no_effect / self.smallest)
            return self.no_effect / factor, self.no_effect * factor
        return self.no_effect - abs(self.smallest - self.no_effect), self.no_effect + abs(
            self.smallest - self.no_effect
        )


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
    return "~AgreementClaim" if isinstance(contrast, dict) and contrast.get("kind") == "agreement" else "~Claim"


AnyClaim = Annotated[
    Annotated[Claim, Tag("~Claim")]
    | Annotated[AgreementClaim, Tag("~AgreementClaim")]
    | Annotated[Argument, Tag("~Argument")],
    Discriminator(_kind_of_claim),
]


class ExperimentFile(Config):
    """One figure or table: its runs, how it is drawn, what it is judged for."""

    id: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    paper: Literal["madtd", "ftfl", "beyond"]
    title: NonEmpty
    reproduces: NonEmpty
    caption: NonEmpty
    deviations: tuple[NonEmpty, ...] = ()
    variants: dict[Name, Variant]
    runs: dict[Name, Group]
    figure: Figure | None = None
    table: ResultTable | None = None
    claims: tuple[AnyClaim, ...] = ()

    @model_validator(mode="after")
    def _something_to_show(self) -> ExperimentFile:
        if (self.figure is None) == (self.table is None):
            raise ValueError("write either 'figure' or 'table'")
        if not self.from_defaults and not (self.variants and self.runs):
            raise ValueError("only a table that is made from the code can do without variants and runs")
        if self.table and self.from_defaults and self.runs:
            raise ValueError(f"a table of {self.table.kind} has no runs")
        return self

    @property
    def from_defaults(self) -> bool:
        """Whether it is made from the code alone, at every tier."""
        return self.table is not None and self.table.kind != "returns"

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Return the figure's panels; a table has none."""
        return self.figure.panels if self.figure else ()

    @property
    def published(self) -> bool:
        """Whether it shows numbers that others published, or compares with them."""
        shown = any(part.published for part in (*self.panels, self.table) if part)
        return shown or any(claim.theirs for claim in self.judged())

    def judged(self) -> tuple[Judged, ...]:
        """Return the claims that runs can judge."""
        return tuple(claim for claim in self.claims if isinstance(claim, Judged))
