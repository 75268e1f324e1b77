"""What an experiment file and a tier file may say. Frozen models; an unknown key is an error."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, Optional

from pydantic import AfterValidator, Field, create_model, model_validator

from dynarep.configs import AgentConfig, Config, ProtocolConfig, hp, registry

TIERS = ("smoke", "ci", "reduced", "paper")
Tier = Literal["smoke", "ci", "reduced", "paper"]
Role = Literal["gated", "reported", "untested"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(lambda text: " ".join(text.split()))]

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
    budget: dict[str, Any] = hp({}, "keys of the budget; an experiment's own budget overrides them")


class Settings(Config):
    """Hyperparameters that differ from the defaults, for all variants of a group or for one variant."""

    environment: dict[str, Any] = hp({}, "keys of EnvironmentConfig")
    agent: dict[str, Any] = hp({}, "keys of the agent's configuration")
    protocol: dict[str, Any] = hp({}, "keys of the protocol's configuration")


class Group(Config):
    """Runs that share agent, protocol and settings; `budget` gives one block of tasks per tier, or several."""

    agent: str
    protocol: str
    why: NonEmpty = hp("", "why the settings differ from the paper's")
    settings: Settings = Settings()
    variants: tuple[str, ...] | None = None
    budget: dict[Tier, tuple[dict[str, Any], ...]]

    def blocks(self, tier: str) -> tuple[dict[str, Any], ...]:
        """Return a tier's budget blocks; empty where the group has no runs."""
        return {str(name): blocks for name, blocks in self.budget.items()}.get(tier, ())


class Variant(Settings):
    """One arm."""

    label: NonEmpty


class Panel(Config):
    """One row of a figure, a column per task.

    curves: metrics against updates or frames. dots: last value of each seed. calibration: predicted against real.
    """

    kind: Literal["curves", "dots", "calibration"]
    metrics: dict[str, str] = Field(min_length=1)
    label: NonEmpty
    log: bool = False
    x: Literal["update", "frame", "agent_step"] = "update"
    variants: tuple[str, ...] | None = None
    reference: float | None = None
    reference_label: str = ""

    def needs(self) -> list[str]:
        """Return the names of recorded metrics that the panel reads; a calibration reads groups of them."""
        return [f"{name}/0/real" if self.kind == "calibration" else name for name in self.metrics]


class Figure(Config):
    """What is drawn."""

    panels: tuple[Panel, ...] = Field(min_length=1)


class Measured(Config):
    """A metric of one arm, at the end of the run; `worst` stands in for a value that is not finite (divergence)."""

    variant: str
    metric: str
    worst: float | None = None


class Contrast(Config):
    """What is compared, paired by seed: the ratio (log scale) or difference of two measurements, or one level."""

    kind: Literal["ratio", "difference", "level"]
    of: Measured
    to: Measured | None = None
    tasks: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> Contrast:
        if (self.kind == "level") != (self.to is None):
            raise ValueError("a level has no 'to', a ratio or difference needs one")
        return self


class Claim(Config):
    """One falsifiable sentence: contrast, direction, value without an effect, and the smallest effect that matters.

    Attributes:
        direction: greater or less than `no_effect`; or equal: within `smallest` of it (for ratios, a factor).
        smallest: the smallest effect that matters, on the contrast's scale, on the claimed side of `no_effect`.
        tiers: what each tier does with it; a tier not named cannot judge it.
    """

    id: str = Field(pattern=r"^[A-Z]\d+[a-z]?$")
    says: NonEmpty
    source: NonEmpty
    published: NonEmpty
    contrast: Contrast
    direction: Literal["greater", "less", "equal"]
    no_effect: float
    smallest: float
    why: NonEmpty
    unit: NonEmpty
    tiers: dict[Tier, Role]
    runs: str | None = hp(None, "which group judges it, where a tier has several")

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


class ExperimentFile(Config):
    """One figure or table: its runs, how it is drawn, what it is judged for."""

    id: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    paper: Literal["madtd", "ftfl", "beyond"]
    title: NonEmpty
    reproduces: NonEmpty
    caption: NonEmpty
    deviations: tuple[NonEmpty, ...] = ()
    variants: dict[Name, Variant] = Field(min_length=1)
    runs: dict[Name, Group] = Field(min_length=1)
    figure: Figure
    claims: tuple[Claim, ...] = ()
