"""How an agent meets data: each protocol is a resumable piece of work for a block of seeds.

A protocol knows nothing of files, tiers or Snakemake. `dynarep.run` builds it, calls `advance` until `done == total`,
and may save `state()` between any two calls: what follows a `load()` of it is the same to the byte.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig


class Row(NamedTuple):
    """One number of one seed: when it was measured, and what it is. A frame is one simulator control step."""

    agent_step: int
    frame: int
    update: int
    metric: str
    value: float


@dataclass
class Metrics:
    """The rows of a block of seeds, in the order they were measured."""

    seeds: Sequence[int]
    rows: list[list[Row]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self.rows or [[] for _ in self.seeds]

    def add(self, agent_step: int, frame: int, update: int, values: Mapping[str, Tensor | Sequence[float]]) -> None:
        """Append one row per seed for each metric; `values` holds one number per seed."""
        for metric, per_seed in values.items():
            for rows, value in zip(self.rows, per_seed, strict=True):
                rows.append(Row(agent_step, frame, update, metric, float(value)))

    def csv(self, index: int) -> str:
        """Return one seed's rows as metrics.csv: nine digits tell every float32 apart."""
        lines = [",".join(Row._fields)]
        lines += [f"{r.agent_step},{r.frame},{r.update},{r.metric},{r.value:.9g}" for r in self.rows[index]]
        return "\n".join(lines) + "\n"

    def latest(self, metric: str) -> list[float]:
        """Return the newest value of each seed that has one."""
        return [next(r.value for r in reversed(rows) if r.metric == metric) for rows in self.rows if rows]


def usable(action: np.ndarray, k: int, diverged: np.ndarray) -> np.ndarray:
    """Return seed k's action (a,) if it is finite, else zeros, and note in `diverged`, (S,), that it was not."""
    if np.isfinite(action).all():
        return action
    diverged[k] = True
    return np.zeros_like(action)


class Protocol(abc.ABC):
    """A block of seeds under way.

    Args:
        environment, agent, protocol: resolved hyperparameters.
        seeds: the run seeds trained together.
    """

    done: int = 0
    total: int
    unit: str = "updates"
    metrics: Metrics

    @abc.abstractmethod
    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None: ...

    @abc.abstractmethod
    def advance(self) -> dict[str, float]:
        """Do the next piece of work (well under a minute); return a few current numbers worth showing."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside `done` and `metrics`: tensors, numbers and strings."""

    @abc.abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`; `done` and `metrics` are restored by the caller."""
