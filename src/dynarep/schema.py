"""What an experiment file and a tier file may say. Frozen models; an unknown key is an error."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Optional

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, create_model, model_validator

from dynarep.configs import AgentConfig, Config, ProtocolConfig, hp, registry

TIERS = ("smoke", "ci", "reduced", "paper")
Tier = Literal["smoke", "ci", "reduced", "paper"]
Role = Literal["gated", "reported", "untested"]
ClaimId = Annotated[str, Field(pattern=r"^[A-Z]\d+[a-z]?$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(lambda text: " ".join(text.split()))]
OneOrMore = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]

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
    jobs_per_process: int = hp(
        1, "ours: tiny jobs of an experiment share the seconds that a process needs to start", ge=1
    )
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
        dose, series: its place in a dose panel.
    """

    label: NonEmpty
    algorithm: str = ""
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    dose: float | None = Field(None, allow_inf_nan=False)
    series: str = ""


class Panel(Config):
    """One band of a figure, with a place per task.

    Attributes:
        kind: what is drawn.
            curves: metrics along training. dots: last value of each seed, told apart in the legend. final: the same,
            with the variants' names below. dose: last value against the variants' `dose`, a line per `series`.
            calibration: predicted against real.
        metrics: name of a recorded metric -> its label.
        scale: of the y axis; logarithmic ones show geometric means. `linear_within`: the straight part of a symlog one.
        x: of curves. `x_label`, `x_scale`: of doses.
        published: also show numbers that others published for these tasks, at the paper tier.
    """

    kind: Literal["curves", "dots", "final", "dose", "calibration"]
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
    published: bool = False

    def needs(self) -> list[str]:
        """Return the names of recorded metrics that the panel reads; a calibration reads groups of them."""
        return [f"{name}/0/real" if self.kind == "calibration" else name for name in self.metrics]


class Figure(Config):
    """What is drawn."""

    panels: tuple[Panel, ...] = Field(min_length=1)


class ResultTable(Config):
    """A table instead of a figure.

    Attributes:
        kind: returns: a row per task, a column per variant: mean of a metric's last values over seeds, 95 % interval,
            seeds found. hyperparameters: every field of the named parts, its default and where this comes from, read
            from the code, so that it cannot drift; the file's variants, if it has some, say what they change.
        metric, label, variants, published: of returns, as in a panel.
        agents, protocols: of hyperparameters.
    """

    kind: Literal["returns", "hyperparameters"]
    metric: str = ""
    label: str = ""
    variants: tuple[str, ...] | None = None
    published: bool = False
    agents: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> ResultTable:
        returns, parts = {"metric", "label", "variants", "published"}, {"agents", "protocols"}
        needed, foreign = ({"metric", "label"}, parts) if self.kind == "returns" else ({"agents"}, returns)
        given = self.model_fields_set
        if needed - given or foreign & given:
            keys = f"needs {' and '.join(sorted(needed))}, and cannot have {', '.join(sorted(foreign))}"
            raise ValueError(f"a table of {self.kind} {keys}")
        return self


class Measured(Config):
    """A metric of one arm, at the end of the run; `worst` stands in for a value that is not finite (divergence)."""

    variant: str
    metric: str
    worst: float | None = None


class Contrast(Config):
    """What is compared, paired by seed: the ratio (log scale) or difference of two measurements, or one level.

    `tasks` are those it is about; a tier judges it on those of them that it runs. Without: all that both sides run.
    `units` divides a task's values, so that tasks whose returns differ by orders of magnitude can share a difference.
    """

    kind: Literal["ratio", "difference", "level"]
    of: Measured
    to: Measured | None = None
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    units: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _two_sides(self) -> Contrast:
        if (self.kind == "level") != (self.to is None):
            raise ValueError("a level has no 'to', a ratio or difference needs one")
        if self.kind == "ratio" and self.units:
            raise ValueError("units cancel in a ratio; leave them out")
        return self


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


class Claim(Statement):
    """One falsifiable sentence: contrast, direction, value without an effect, and the smallest effect that matters.

    Attributes:
        direction: greater or less than `no_effect`; or equal: within `smallest` of it (for ratios, a factor).
        smallest: the smallest effect that matters, on the contrast's scale, on the claimed side of `no_effect`.
        why: why this one.
        tiers: what each tier does with it; a tier not named cannot judge it.
        runs: the groups that judge it, where a tier has several; of those named, the one that has runs at the tier.
    """

    empirical: Literal[True] = True
    contrast: Contrast
    direction: Literal["greater", "less", "equal"]
    no_effect: float
    smallest: float
    unit: NonEmpty
    tiers: dict[Tier, Role]
    runs: OneOrMore = ()

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


def _kind_of_claim(data: Any) -> str:
    given = data.get("empirical", True) if isinstance(data, dict) else data.empirical
    return "~Argument" if given is False else "~Claim"


# A tag begins with "~", so that messages leave it out of the path (errors.explain).
AnyClaim = Annotated[
    Annotated[Claim, Tag("~Claim")] | Annotated[Argument, Tag("~Argument")], Discriminator(_kind_of_claim)
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
            raise ValueError("only a table of hyperparameters can do without variants and runs")
        if self.from_defaults and self.runs:
            raise ValueError("a table of hyperparameters has no runs")
        return self

    @property
    def from_defaults(self) -> bool:
        """Whether it is made from the code alone, at every tier."""
        return self.table is not None and self.table.kind == "hyperparameters"

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Return the figure's panels; a table has none."""
        return self.figure.panels if self.figure else ()

    @property
    def published(self) -> bool:
        """Whether it shows numbers that others published."""
        return any(part.published for part in (*self.panels, self.table) if part)

    def judged(self) -> tuple[Claim, ...]:
        """Return the claims that runs can judge."""
        return tuple(claim for claim in self.claims if isinstance(claim, Claim))
