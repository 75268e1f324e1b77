"""What an experiment file and a tier file may say. Frozen models; an unknown key is an error."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, Optional

from pydantic import BeforeValidator, Field, create_model, model_validator

from dynarep.configs import AgentConfig, Config, ProtocolConfig, hp, registry
from dynarep.statements import TIERS as TIERS
from dynarep.statements import AnyClaim, Average, Judged, Tier
from dynarep.statements import NonEmpty as NonEmpty

LINE_STYLES = 4  # that can be told apart in a figure
FEWEST_PAIRS = 3
SUITE = ("aggregate", "profile", "improvement", "efficiency")  # kinds of panel over all tasks together
Size = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


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
    compiled: bool = hp(False, "ours: a job of a minute is over before a compiler has paid")
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


class Pair(Config):
    """One setting: a cheap measurement, and the difference between two arms that it should foretell.

    Attributes:
        label: a few words, beside the figure.
        predictor: the variant whose metric is the cheap measurement, of whatever group of runs.
        of, to: the outcome is the mean over their common seeds of a metric of `of` less that of `to`.
        series: settings of one series share colour and marker.
        tasks: averaged; without: those that all three variants run.
    """

    label: NonEmpty
    predictor: str
    of: str
    to: str
    series: str = ""
    tasks: tuple[str, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _two_arms(self) -> Pair:
        if self.of == self.to:
            raise ValueError(f"'of' and 'to' are both '{self.of}': the outcome would be 0")
        return self

    @property
    def variants(self) -> tuple[str, ...]:
        """Return the names of its variants, each once."""
        return tuple(dict.fromkeys((self.predictor, self.of, self.to)))


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
            calibration: predicted against real. spectrum: eigenvalues in the complex plane. scatter: a point per pair
            of the experiment, the difference in `outcome` against the predictor's metric, over all tasks.
            Over the suite of tasks (`SUITE`), of one metric as a score: aggregate: interquartile mean, median, mean and
            optimality gap. profile: share of runs above each score. improvement: chance that a run of the variant `of`
            beats one of each other. efficiency: interquartile mean along training.
        metrics: name of a recorded metric -> its label.
        scale: of the y axis, of a spectrum of both; logarithmic ones show geometric means. `linear_within`: the
            straight part of a symlog one.
        x: of curves and of an efficiency. `x_label`, `x_scale`, `x_linear_within`: of doses; of a scatter, whose label
            is its metric's unless `x_label` says another.
        outcome, average: of a scatter, as in a claim of ranks (`Rank`).
        full_score, worst: over the suite: what counts as a score of 1, and what a diverged run counts as.
        colour_by: of curves of one metric: every variant has a colour, or variants of one `series` share theirs and
            differ in line style, in the order of the file.
        published: in curves over frames, points at their simulator step; elsewhere a line across.
    """

    kind: Literal[
        "curves", "dots", "final", "dose", "calibration", "spectrum", "scatter",
        "aggregate", "profile", "improvement", "efficiency",
    ]  # fmt: skip
    metrics: dict[str, str] = Field(min_length=1)
    label: NonEmpty
    scale: Literal["linear", "log", "symlog"] = "linear"
    linear_within: float = hp(1.0, "ours", gt=0)
    x: Literal["update", "frame", "agent_step"] = "update"
    x_label: str = "dose"
    x_scale: Literal["linear", "log", "symlog"] = "linear"
    x_linear_within: float = hp(1.0, "ours", gt=0)
    outcome: str = ""
    average: Average = "mean"
    full_score: float = Field(1.0, gt=0, allow_inf_nan=False)
    worst: float | None = Field(None, allow_inf_nan=False)
    of: str = ""
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

    @model_validator(mode="after")
    def _scatters(self) -> Panel:
        if self.kind != "scatter" and self.model_fields_set & {"outcome", "average"}:
            raise ValueError("'outcome' and 'average' are of a scatter")
        if self.kind == "scatter" and (not self.outcome or len(self.metrics) > 1):
            raise ValueError("a scatter needs one metric, of the predictors, and an 'outcome'")
        if self.kind == "scatter" and (self.published or self.variants):
            raise ValueError("a scatter shows the experiment's pairs; leave 'published' and 'variants' out")
        return self

    @model_validator(mode="after")
    def _suites(self) -> Panel:
        own = {"full_score", "worst"} | ({"of"} if self.kind == "improvement" else set())
        if foreign := self.model_fields_set & ({"full_score", "worst", "of"} - (own if self.kind in SUITE else set())):
            raise ValueError(f"a panel of {self.kind} cannot have {' and '.join(sorted(foreign))}")
        if self.kind not in SUITE:
            return self
        if len(self.metrics) > 1 or self.worst is None or (self.kind == "improvement" and not self.of):
            needed = ["one metric", "'worst', what a diverged run counts as", "'of', a variant"]
            raise ValueError(f"a panel of {self.kind} needs {', '.join(needed[: 2 + (self.kind == 'improvement')])}")
        if self.published or self.scale != "linear" or self.reference is not None:
            raise ValueError(
                f"a panel of {self.kind} has a scale of its own; leave 'published', 'scale', 'reference' out"
            )
        return self

    @property
    def floor(self) -> float:
        """Return what a diverged run counts as."""
        assert self.worst is not None
        return self.worst

    def needs(self) -> list[str]:
        """Return the names of recorded metrics that the panel reads; a calibration or spectrum reads groups of them."""
        names = [f"{name}/0/real" if self.kind in ("calibration", "spectrum") else name for name in self.metrics]
        return names + [self.outcome] * (self.kind == "scatter")


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


class Explains(Config):
    """A cause that is turned up and down, shown beside the diagnostics that it should explain.

    Attributes:
        turned, happened, says: what was turned, what happened, what this says about the paper and what it does not.
        beside: ids of the experiments on real benchmarks whose figures stand beside this one.
    """

    turned: NonEmpty
    happened: NonEmpty
    says: NonEmpty
    beside: tuple[str, ...] = ()


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
    pairs: tuple[Pair, ...] = ()
    explains: Explains | None = None

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
