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


class Dials(Config):
    """The properties of a dial task, ours: `dynarep.envs.dial`. The defaults make an easy one."""

    actuators: int = hp(2, "ours: coordinates to bring to 0, each with an action of its own", ge=1)
    nuisance: int = hp(0, "ours: channels of noise that nothing depends on; ftfl's second cause", ge=0)
    correlation: float = hp(0.0, "ours: of a nuisance channel with itself one step before", ge=0, le=1)
    obs_unit: float = hp(
        1.0, "ours: what one unit of the state is called; ftfl's first cause, from the other side", gt=0
    )
    time_step: float = hp(0.1, "ours: smoothness; a small one is where residual targets are right", gt=0)
    process_noise: float = hp(0.0, "ours: deviation of the noise on a velocity, of a position for dial-glide", ge=0)
    force: float = hp(4.0, "ours: acceleration by an action of 1", gt=0)
    reward_width: float = hp(0.5, "ours: distance per coordinate at which the reward is exp(-1/2)", gt=0)
    episode_steps: int = hp(50, "ours: the time limit", ge=1)


class EnvironmentConfig(Config):
    """What task is solved, and how it is wrapped. `suite` and `task` are filled in from the budget."""

    suite: str = hp("dmc", "from the task's name")
    task: str = hp("walker-walk", "from the budget")
    action_repeat: int = hp(1, "STFL code; MAD-TD uses 2", ge=1)
    reward_scale: float = hp(1.0, "ours: dose-response of the reward unit", gt=0)
    drop_observations: tuple[str, ...] = hp((), "entries nobody sees; ftfl 6.1: touch, for hopper without its contacts")
    zero_contact_forces: bool = hp(False, "Gymnasium shows live forces; on: 0, as STFL most likely had (ftfl 6.2)")
    dials: Dials = hp(Dials(), "of the dial tasks alone")


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


class Units(NamedTuple):
    """What one of the task's own units of observation and of reward is called in what an environment reports (ours)."""

    obs: float = 1.0
    reward: float = 1.0


class Work(NamedTuple):
    """Equal pieces of work: the rate they are priced at (plan.py), the GFLOP of one per seed, how many.

    Rates are an agent's name (its updates), or what is no update: "act", "rollout", "plan", "simulator".
    """

    rate: str
    gflop: float
    units: int

    @property
    def updates(self) -> int:
        """Return the gradient updates among it."""
        return 0 if self.rate in ("act", "rollout", "plan", "simulator") else self.units


class AgentConfig(PartConfig):
    """Hyperparameters of an agent. What it costs is for the estimates of `dynarep plan` alone.

    Class attributes: `latent_critic` says that its critic reads latents and can be looked at from inside
    (`protocols.evaluation.critic_on`); `in_episodes` that it wants to know how long episodes are and where they begin.
    """

    latent_critic: ClassVar[bool] = False
    in_episodes: ClassVar[bool] = False

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
        """Return the environment interactions of one run, in agent steps, without evaluation episodes."""
        raise NotImplementedError

    def evaluations(self) -> tuple[int, int]:
        """Return how often a run is evaluated, and with how many episodes each time."""
        return 0, 0

    def kept_steps(self) -> int:
        """Return how many of the agent steps are collected once and then read from disk by other runs (cache.py)."""
        return 0

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return what one run computes, besides stepping through its environment and acting in evaluations."""
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
