"""Hyperparameters: one torch-free module per agent or protocol, every default with its source.

They live apart from the algorithms so that listing, planning and drawing start in a second instead of waiting for
PyTorch. Each module is the hyperparameter table of its algorithm: `Field.description` is the source of the default.
A module dropped into this package is found by its classes' `name`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field


def hp(default: Any, source: str, **constraints: Any) -> Any:
    """Return a pydantic field: a hyperparameter's default, where it comes from, and its bounds (ge, le, ...)."""
    return Field(default, description=source, **constraints)


class Config(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class EnvironmentConfig(Config):
    """What task is solved, and how it is wrapped. `suite` and `task` are filled in from the budget."""

    suite: str = hp("dmc", "from the task's name")
    task: str = hp("walker-walk", "from the budget")
    action_repeat: int = hp(1, "STFL code; MAD-TD uses 2", ge=1)
    reward_scale: float = hp(1.0, "ours: dose-response of the reward unit", gt=0)
    drop_observations: tuple[str, ...] = hp((), "entries nobody sees; ftfl 6.1: touch, for hopper without its contacts")
    zero_contact_forces: bool = hp(False, "Gymnasium shows live forces; on: 0, as STFL most likely had (ftfl 6.2)")


class PartConfig(Config):
    """Hyperparameters of an agent or a protocol.

    Class attributes: `name` is what YAML says; `implementation` is "module:Class"; `budget` are the fields that a
    tier may change.
    """

    name: ClassVar[str]
    implementation: ClassVar[str]
    budget: ClassVar[frozenset[str]] = frozenset()

    def label(self) -> str:
        """Return the few words that tell this configuration from its relatives in a path."""
        return self.name


class Work(NamedTuple):
    """Equal pieces of work: the rate they are priced at (plan.py), the GFLOP of one per seed, how many.

    Rates are an agent's name (its updates), or what is no update: "act", "rollout", "simulator".
    """

    rate: str
    gflop: float
    units: int

    @property
    def updates(self) -> int:
        """Return the gradient updates among it."""
        return 0 if self.rate in ("act", "rollout", "simulator") else self.units


class AgentConfig(PartConfig):
    """Hyperparameters of an agent. What it costs is for the estimates of `dynarep plan` alone."""

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return matrix-multiply operations of one update of one seed."""
        raise NotImplementedError

    def update_work(self, updates: int, obs_size: int, action_size: int) -> Work:
        """Return what a number of updates of one seed cost."""
        return Work(self.name, self.update_flops(obs_size, action_size) / 1e9, updates)

    def learning_work(self, steps: int, obs_size: int, action_size: int) -> list[Work]:
        """Return what an agent does of itself in `steps` agent steps of learning, of one seed."""
        return [self.update_work(steps, obs_size, action_size)]

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the numbers in the networks of one seed, roughly; target networks count."""
        raise NotImplementedError

    def own_rows(self, steps: int) -> int:
        """Return the transitions that an agent has made and kept itself after `steps` agent steps of learning."""
        return 0


class ProtocolConfig(PartConfig):
    """Hyperparameters of a protocol: how an agent meets data.

    Class attributes: `agents` are the names of those that it can run; `metrics` are the names of what it records.
    """

    agents: ClassVar[frozenset[str]]
    metrics: ClassVar[frozenset[str]] = frozenset()

    def agent_steps(self) -> int:
        """Return the environment interactions of one run, in agent steps, evaluation included."""
        raise NotImplementedError

    def kept_steps(self) -> int:
        """Return how many of the agent steps are collected once and then read from disk by other runs (cache.py)."""
        return 0

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return what one run computes, besides stepping through its environment."""
        raise NotImplementedError

    def rows(self, agent: AgentConfig) -> int:
        """Return the transitions that one run holds at its end, real and made by the agent."""
        return self.agent_steps()

    def memory_mib(self, agent: AgentConfig, obs_size: int, action_size: int, seeds: int) -> float:
        """Return what networks and buffers of a block of seeds take at most: MiB.

        Of every parameter its value, gradient and Adam's two moments; of every transition, state twice, action, reward
        and mask; and all of it once more while a checkpoint is written.
        """
        numbers = 4 * agent.parameters(obs_size, action_size) + self.rows(agent) * (2 * obs_size + action_size + 2)
        return 2 * seeds * numbers * 4 / 2**20


Part = TypeVar("Part", bound=PartConfig)


@cache
def registry(kind: type[Part]) -> dict[str, type[Part]]:
    """Return name -> class of every agent (`AgentConfig`) or protocol (`ProtocolConfig`) in this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found: dict[str, type[Part]] = {}
    todo = list(kind.__subclasses__())
    while todo:
        part = todo.pop()
        todo += part.__subclasses__()
        if "name" in vars(part):
            found[part.name] = part
    return dict(sorted(found.items()))
