"""Dial tasks: bring coordinates to zero, among properties that can be turned up and down (ours, experiments/beyond).

Of n coordinates x with an action a each, m channels xi of noise, and T steps:

    v+  = v + dt (F a - v) + p eps          dial-reach: second order; v+ = 0 where x+ is cut
    x+  = cut(x + dt v+, -1.5, 1.5)
    x+  = cut(x + dt F a / 2 + p eps, ...)  dial-glide: first order
    xi+ = phi xi + sqrt(1 - phi^2) eps      nothing depends on them
    r   = exp(-|x+|^2 / (2 w^2 n))          in [0, 1]
    reported are  kappa (x, v, xi)  or  kappa (x, xi),  and  rho r;  eps are standard normal, independent

It begins at x uniform in [-1, 1], v = 0, xi normal, and ends at the time limit alone, so values are those of going on
for ever. The state is in the observation, and the true next state and reward of any state and action cost a few
multiplications: model and simulator can take each other's place one quantity at a time.

The dials are `dynarep.configs.Dials`: n `actuators`, m `nuisance`, phi `correlation`, dt `time_step`, p
`process_noise`, F `force`, w `reward_width`, T `episode_steps`, kappa `obs_unit`; rho is the `reward_scale` that every
environment has. All of an episode's noise is drawn from its seed at its start, positions first: tasks that differ in
nuisance begin at the same places and are disturbed alike.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dynarep.configs import Dials, Units
from dynarep.envs.base import Env, EnvError, FloatArray, Observation, Snapshot

WALL = 1.5


def sizes(task: str, dials: Dials) -> tuple[int, int]:
    """Return the lengths of observation and action."""
    return (2 if task == "dial-reach" else 1) * dials.actuators + dials.nuisance, dials.actuators


class Dynamics:
    """A dial task as functions of states and actions of any leading shape, in float64 and the task's own units.

    A state is (x, v, xi) or (x, xi); noise is (eps of the coordinates, eps of the nuisance), (..., n + m).
    """

    def __init__(self, task: str, dials: Dials) -> None:
        self.dials, self.second_order = dials, task == "dial-reach"
        self.obs_size, self.action_size = sizes(task, dials)
        self.noise_size = dials.actuators + dials.nuisance

    def episode(self, seed: int) -> tuple[FloatArray, FloatArray]:
        """Return an episode's first state, (state size,), and its noise, (T, noise size)."""
        d = self.dials
        places, moves, nuisance = (np.random.default_rng((seed, part)) for part in range(3))
        x = places.uniform(-1.0, 1.0, d.actuators)
        v = np.zeros(d.actuators * self.second_order)
        xi = nuisance.standard_normal((d.episode_steps + 1, d.nuisance))
        eps = moves.standard_normal((d.episode_steps, d.actuators))
        return np.concatenate([x, v, xi[0]]), np.concatenate([eps, xi[1:]], 1)

    def step(
        self, state: FloatArray, action: npt.NDArray[np.floating], noise: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return what follows: next states (..., state size), rewards (...)."""
        d, n = self.dials, self.dials.actuators
        x, eps = state[..., :n], d.process_noise * noise[..., :n]
        following = np.empty_like(state)
        if self.second_order:
            v = state[..., n : 2 * n]
            v = v + d.time_step * (d.force * action - v) + eps
            moved = x + d.time_step * v
        else:
            moved = x + d.time_step * d.force * action / 2.0 + eps
        following[..., :n] = cut = np.clip(moved, -WALL, WALL)
        if self.second_order:
            following[..., n : 2 * n] = np.where(cut == moved, v, 0.0)
        own = state.shape[-1] - d.nuisance
        fresh = np.sqrt(1.0 - d.correlation**2) * noise[..., n:]
        following[..., own:] = d.correlation * state[..., own:] + fresh
        return following, np.exp(np.square(cut).sum(-1) / (-2.0 * d.reward_width**2 * n))


class Dial(Env):
    """A dial task.

    Attributes:
        dynamics: it as functions; states are observations divided by `units.obs`, rewards here in the task's own units.
    """

    def __init__(self, task: str, action_repeat: int, reward_scale: float, dials: Dials) -> None:
        super().__init__(task, action_repeat, reward_scale)
        if action_repeat != 1:
            raise EnvError(f"{task}: action_repeat is 1 here, got {action_repeat}: turn dials.time_step instead")
        self.dynamics = Dynamics(task, dials)
        self.units = Units(dials.obs_unit, reward_scale)
        self.obs_size, self.action_size = self.dynamics.obs_size, self.dynamics.action_size
        self.episode_frames = dials.episode_steps
        self._low, self._high = -np.ones(self.action_size), np.ones(self.action_size)
        self._noise_of = -1  # the seed whose noise is at hand

    def _begin(self, seed: int) -> None:
        self._now, self._noise = self.dynamics.episode(seed)
        self._noise_of = seed

    def _advance(self, control: FloatArray) -> tuple[float, bool, bool]:
        self._now, reward = self.dynamics.step(self._now, control, self._noise[self._frame])
        return float(reward), False, self._frame + 1 >= self.episode_frames

    def _observe(self) -> Observation:
        return (self.units.obs * self._now).astype(np.float32)

    def _state(self) -> FloatArray:
        return self._now.copy()

    def _recover(self, snapshot: Snapshot) -> None:
        if snapshot.seed != self._noise_of:
            self._begin(snapshot.seed)
        self._now = snapshot.physics.copy()


class Fleet:
    """One episode each of many seeds, stepped together from first to last: the same numbers as one by one.

    Args:
        env: the task.
        seeds: of the episodes, N of them.

    Attributes:
        obs: of every episode, (N, obs size).
        over: whether the time limit has come, which it does for all at once.
    """

    def __init__(self, env: Dial, seeds: Sequence[int]) -> None:
        self._env, self._frame, self.over = env, 0, False
        states, noise = zip(*[env.dynamics.episode(seed) for seed in seeds], strict=True)
        self._now, self._noise = np.stack(states), np.stack(noise, 1)
        self.obs = self._observe()

    def _observe(self) -> Observation:
        return (self._env.units.obs * self._now).astype(np.float32)

    def step(self, action: npt.NDArray[np.floating]) -> FloatArray:
        """Take finite actions (N, action size) in [-1, 1]; returns rewards as reported, (N,).

        Raises EnvError at the end of the episodes.
        """
        if self.over:
            raise EnvError(f"{self._env.task}: these episodes are over: make a new fleet")
        control = np.clip(action.astype(np.float64), -1.0, 1.0)
        self._now, reward = self._env.dynamics.step(self._now, control, self._noise[self._frame])
        self._frame += 1
        self.over = self._frame >= self._env.episode_frames
        self.obs = self._observe()
        return reward * self._env.units.reward
