"""Numbers that others published for the papers' tasks: experiments/published.csv, read and checked."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from dynarep import envs
from dynarep.configs import Config
from dynarep.errors import UserError, explain, invalid
from dynarep.schema import NonEmpty, Shows

FILE = "published.csv"
SEVEN = "dmc-hard"  # stands for dog-{stand, walk, trot, run} and humanoid-{stand, walk, run} together
PER_TASK = "mean over seeds"


class Published(Config):
    """One number.

    Attributes:
        algorithm: ours in form, e.g. "SAC, UTD 1". label: the same with its source, for a legend.
        task: the task that it stands for here, or `SEVEN`; `published_task` is what the source ran.
        env_step: simulator steps (control steps) at which it was read off, as the source counts them.
        action_repeat: simulator steps per agent step. utd: updates per agent step, as the source says.
        mean, low, high: over seeds, with a 95 % interval; no bounds (nor number) where the source gives no single runs.
        source: repository and commit. licence: of the numbers there. caveat: what makes it differ from a run of ours.
        statistic: of one task, the mean over seeds; of `SEVEN`, one over its tasks and seeds, of returns / 1000.
        reading_error: of a number that was read off a figure, in its own units: so much on both sides.
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
    statistic: Literal["mean over seeds", "iqm", "median", "mean", "optimality gap"]
    reading_error: float | None = Field(gt=0)

    @field_validator("n_seeds", "low", "high", "reading_error", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task != SEVEN and envs.split_task(task)[1] != task:
            raise ValueError("unknown task")
        return task

    @model_validator(mode="after")
    def _interval_around_mean(self) -> Published:
        if (self.low is None) != (self.high is None):
            raise ValueError("write both bounds or none")
        if self.low is not None and self.high is not None and not self.low <= self.mean <= self.high:
            raise ValueError(f"mean {self.mean} lies outside its interval")
        return self

    @model_validator(mode="after")
    def _statistic_of_its_tasks(self) -> Published:
        if (self.task == SEVEN) == (self.statistic == PER_TASK):
            raise ValueError(f"statistic '{self.statistic}' does not go with task '{self.task}'")
        return self

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Return what it can be: the interval that was published, else the reading error around it, else nothing."""
        if self.low is None and self.reading_error is not None:
            return self.mean - self.reading_error, self.mean + self.reading_error
        return self.low, self.high


def read(folder: Path, tasks: Iterable[str] | None = None) -> list[Published]:
    """Return the published numbers of some tasks, or of all, in the order of the file; UserError lists its faults."""
    path, wanted = folder / FILE, None if tasks is None else set(tasks)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return [row for row in _rows(path, text) if wanted is None or row.task in wanted]


@cache
def _rows(path: Path, text: str) -> tuple[Published, ...]:
    rows, faults = [], []
    for number, line in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        try:
            rows.append(Published.model_validate(line))
        except ValidationError as error:
            faults += explain(error, Published, f"line {number}: ")
    if faults:
        raise invalid(path, faults)
    return tuple(rows)


def shown(folder: Path, part: Shows, tasks: Iterable[str]) -> list[Published]:
    """Return the numbers that a panel or table shows for some tasks."""
    if part.published is False:
        return []
    rows = [row for row in read(folder, tasks) if part.published_step in (None, row.env_step)]
    return [row for row in rows if part.published is True or row.algorithm in part.published]


def means(folder: Path, algorithm: str, env_step: int, tasks: Iterable[str]) -> dict[str, Published]:
    """Return task -> the number of an algorithm at a step; tasks without one are left out.

    Raises:
        UserError: two sources give it for the same task.
    """
    rows = [row for row in read(folder, tasks) if (row.algorithm, row.env_step) == (algorithm, env_step)]
    if twice := several(rows, "algorithm"):
        raise UserError(f"{folder / FILE}: {twice}")
    return {row.task: row for row in rows}


def several(rows: Sequence[Published], by: Literal["algorithm", "label"]) -> str:
    """Name the first algorithm, or line of a legend, that has several numbers for one task; "" if none has."""
    seen: dict[tuple[str, str], Published] = {}
    for row in rows:
        first = seen.setdefault((getattr(row, by), row.task), row)
        if first is not row:
            places = " and ".join(f"{x.label} at step {x.env_step}" for x in (first, row))
            return f"'{row.algorithm}' has several numbers for {row.task}: {places}."
    return ""
