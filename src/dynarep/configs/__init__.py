"""Hyperparameters: one torch-free module per agent or protocol, every default with its source.

They live apart from the algorithms so that listing, planning and drawing start in a second instead of waiting for
PyTorch. Each module is the hyperparameter table of its algorithm: `Field.description` is the source of the default.
A module dropped into this package is found by its classes' `name`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any, ClassVar, TypeVar

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


class AgentConfig(PartConfig):
    """Hyperparameters of an agent."""

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return matrix-multiply operations of one update of one seed, for the cost estimate of `dynarep plan`."""
        raise NotImplementedError


class ProtocolConfig(PartConfig):
    """Hyperparameters of a protocol: how an agent meets data. `metrics` are the names of what it records."""

    metrics: ClassVar[frozenset[str]] = frozenset()

    def agent_steps(self) -> int:
        """Return the environment interactions of one run, in agent steps, evaluation included."""
        raise NotImplementedError

    def agent_updates(self) -> int:
        """Return the gradient updates of one run."""
        raise NotImplementedError


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
