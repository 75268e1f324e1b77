"""Real transitions of a random policy, on Meta-World of a scripted expert too, seeded and counted.

The arms of an experiment that differ in the agent alone meet the same data, each in a process of its own. So `collect`
asks a store first, if `kept_in` names one: the simulator runs for the first arm, and the others read what it left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from dynarep import envs
from dynarep.configs import EnvironmentConfig
from dynarep.envs import Env, Snapshot
from dynarep.streams import integer, stream

FIELDS = ("obs", "action", "reward", "next_obs", "terminated", "ended")
Arrays = dict[str, Any]  # of numpy arrays


@dataclass
class Transitions:
    """n transitions of one seed, in the order they were made.

    obs, next_obs (n, o); action (n, a) in [-1, 1]; reward (n,), summed over the action repeat; terminated (n,), a true
    end; ended (n,), an end of either kind, time limits included; snapshots, the simulator before each, if asked for.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminated: np.ndarray
    ended: np.ndarray
    snapshots: list[Snapshot] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.reward)


class Store(Protocol):
    """Arrays by what they are; `dynarep.cache` has one that keeps files."""

    def find(self, what: Mapping[str, Any]) -> Arrays | None:
        """Return the arrays, byte for byte what `keep` was given, or None."""

    def keep(self, what: Mapping[str, Any], arrays: Arrays) -> None:
        """Remember them."""


_store: ContextVar[Store | None] = ContextVar("store", default=None)


@contextmanager
def kept_in(store: Store | None) -> Iterator[None]:
    """Let `collect` use a store within this context; None for none."""
    token = _store.set(store)
    try:
        yield
    finally:
        _store.reset(token)


def collect(
    environment: EnvironmentConfig,
    seeds: Sequence[int],
    steps: int,
    limit: int | None = None,
    expert_noise: float | None = None,
) -> list[Transitions]:
    """Return each seed's random transitions; the environment is made only if one of them is not in the store.

    Args:
        environment: the task.
        seeds: the run seeds.
        steps: agent steps of each.
        limit: agent steps after which an episode is ended, if it has not ended before; None for the task's own limit.
        expert_noise: see `random_transitions`; None for random actions alone.
    """
    store, env, collected = _store.get(), None, []
    for seed in seeds:
        what = {"environment": environment.model_dump(mode="json"), "seed": seed, "steps": steps}
        what |= {"limit": limit} if limit else {}
        what |= {"expert_noise": expert_noise} if expert_noise is not None else {}
        arrays = store.find(what) if store else None
        if arrays is None or set(arrays) != {*FIELDS} or any(a.shape[:1] != (steps,) for a in arrays.values()):
            env = env or envs.from_config(environment)
            data = random_transitions(env, seed, steps, limit=limit, expert_noise=expert_noise)
            arrays = {name: getattr(data, name) for name in FIELDS}
            if store:
                store.keep(what, arrays)
        collected.append(Transitions(**arrays))
    return collected


@lru_cache(maxsize=2)
def with_states(environment: EnvironmentConfig, seeds: tuple[int, ...], steps: int) -> list[Transitions]:
    """Return each seed's random transitions with the simulator's states, which no file keeps.

    The arms that one process trains one after the other meet the same data: they are collected for the first. Nobody
    may write to them.
    """
    env = envs.from_config(environment)
    return [random_transitions(env, seed, steps, snapshots=True) for seed in seeds]


def random_transitions(
    env: Env,
    seed: int,
    steps: int,
    snapshots: bool = False,
    limit: int | None = None,
    expert_noise: float | None = None,
) -> Transitions:
    """Act uniformly at random for a number of agent steps, or in turns with the suite's scripted expert.

    Args:
        env: the task; reset here, an episode at a time, each with a seed of its own.
        seed: the run's seed: two variants with the same seed meet the same data.
        steps: agent steps.
        snapshots: keep the full simulator state before every step.
        limit: agent steps after which an episode is ended, if it has not ended before; None for the task's own limit.
        expert_noise: in the second episode, the fourth and so on, the expert acts, with Gaussian noise of this
            deviation; actions are clipped to [-1, 1]. The others stay as they are without it.
    """
    actions = stream(seed, "random actions").uniform(-1, 1, size=(steps, env.action_size)).astype(np.float32)
    noise = (expert_noise or 0.0) * stream(seed, "expert noise").standard_normal(actions.shape)
    expert = None
    obs = np.empty((steps, env.obs_size), np.float32)
    following, reward = np.empty_like(obs), np.empty(steps, np.float32)
    terminated, ended = np.zeros(steps, bool), np.zeros(steps, bool)
    states: list[Snapshot] = []
    episode = start = 0
    current = env.reset(integer(seed, "environment", episode))
    for t, action in enumerate(actions):
        if snapshots:
            states.append(env.snapshot())
        if expert is not None:
            action[:] = np.clip(expert(current) + noise[t], -1, 1)
        step = env.step(action)
        obs[t], following[t], reward[t] = current, step.obs, step.reward
        terminated[t], ended[t] = step.terminated, step.terminated or step.truncated or t + 1 - start == limit
        current = step.obs
        if ended[t]:
            episode, start = episode + 1, t + 1
            current = env.reset(integer(seed, "environment", episode))
            expert = env.expert() if expert_noise is not None and episode % 2 else None
    return Transitions(obs, actions, reward, following, terminated, ended, states)
