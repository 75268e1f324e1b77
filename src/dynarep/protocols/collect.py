"""Real transitions of a random policy, seeded and counted."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dynarep.envs import Env, Snapshot
from dynarep.streams import integer, stream


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


def random_transitions(env: Env, seed: int, steps: int, snapshots: bool = False) -> Transitions:
    """Act uniformly at random for a number of agent steps.

    Args:
        env: the task; reset here, an episode at a time, each with a seed of its own.
        seed: the run's seed: two variants with the same seed meet the same data.
        steps: agent steps.
        snapshots: keep the full simulator state before every step.
    """
    actions = stream(seed, "random actions").uniform(-1, 1, size=(steps, env.action_size)).astype(np.float32)
    obs = np.empty((steps, env.obs_size), np.float32)
    following, reward = np.empty_like(obs), np.empty(steps, np.float32)
    terminated, ended = np.zeros(steps, bool), np.zeros(steps, bool)
    states: list[Snapshot] = []
    episode = 0
    current = env.reset(integer(seed, "environment", episode))
    for t, action in enumerate(actions):
        if snapshots:
            states.append(env.snapshot())
        step = env.step(action)
        obs[t], following[t], reward[t] = current, step.obs, step.reward
        terminated[t], ended[t] = step.terminated, step.terminated or step.truncated
        current = step.obs
        if ended[t]:
            episode += 1
            current = env.reset(integer(seed, "environment", episode))
    return Transitions(obs, actions, reward, following, terminated, ended, states)
