"""Numbers that others published for the papers' tasks: experiments/published.csv, read and checked."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from dynarep import envs
from dynarep.configs import Config
from dynarep.errors import UserError, explain, invalid
from dynarep.schema import NonEmpty

FILE = "published.csv"


class Published(Config):
    """One number.

    Attributes:
        algorithm: ours in form, e.g. "SAC, UTD 1". label: the same with its source, for a legend.
        task: the task that it stands for here; `published_task` is what the source ran.
        env_step: simulator steps (control steps) at which it was read off, as the source counts them.
        action_repeat: simulator steps per agent step. utd: updates per agent step, as the source says.
        mean, low, high: over seeds, with a 95 % interval; no bounds (nor number) where the source gives no single runs.
        source: repository and commit. licence: of the numbers there. caveat: what makes it differ from a run of ours.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    algorithm: NonEmpty
    label: NonEmpty
    task: str
    published_task: NonEmpty
    env_step: int = Field(gt=0)
    action_repeat: int = Field(ge=1)
    utd: NonEmpty
    n_seeds: int | None = Field(ge=1)
    mean: float
    low: float | None
    high: float | None
    source: NonEmpty
    licence: NonEmpty
    caveat: NonEmpty

    @field_validator("n_seeds", "low", "high", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if envs.split_task(task)[1] != task:
            raise ValueError("unknown task")
        return task

    @model_validator(mode="after")
    def _interval_around_mean(self) -> Published:
        if (self.low is None) != (self.high is None):
            raise ValueError("write both bounds or none")
        if self.low is not None and self.high is not None and not self.low <= self.mean <= self.high:
            raise ValueError(f"mean {self.mean} lies outside its interval")
        return self


def read(folder: Path, tasks: Iterable[str] | None = None) -> list[Published]:
    """Return the published numbers of some tasks, or of all, in the order of the file; UserError lists its faults."""
    path, wanted = folder / FILE, None if tasks is None else set(tasks)
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    rows, faults = [], []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append(Published.model_validate(line))
        except ValidationError as error:
            faults += explain(error, Published, f"line {number}: ")
    if faults:
        raise invalid(path, faults)
    return [row for row in rows if wanted is None or row.task in wanted]
