"""What would have followed: other actions at the states of stored transitions, taken in the simulator itself.

The simulator's state is kept, in memory, before every transition that somebody may ask about. A checkpoint holds no
simulator; an episode is its seed and its actions. So after a resume a state that is asked for and not there is made
again: its episode is played once more from the stored actions, and all its wanted states are kept on the way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from dynarep.envs import Env, Snapshot, Step
from dynarep.envs.dial import Dial
from dynarep.envs.workers import Call, raised, together
from dynarep.placement import here, host
from dynarep.protocols import usable
from dynarep.replay import Replay
from dynarep.streams import integer, stream

OUTCOME = ("next_obs", "reward", "mask")


class Simulator:
    """Environments that are put into the states of a block's stored transitions.

    Args:
        envs: environments of the run's task, its own from now on: one for all seeds, or one for each.
        seeds: the run seeds, S of them.
        replay: the transitions; it never overwrites a row that is wanted.
        starts: of each seed, the row of every episode's first transition; grows as the run goes on.
        wanted: (S, T) of bool, the rows of the whole run whose states are kept.
        diverged: (S,) of bool, set where an action is not finite or the simulation blows up.

    Attributes:
        envs: those environments, one for each seed.
        states: of each seed, row -> the simulator before that transition.
    """

    def __init__(
        self,
        envs: Sequence[Env],
        seeds: Sequence[int],
        replay: Replay,
        starts: Sequence[list[int]],
        wanted: np.ndarray,
        diverged: np.ndarray,
    ) -> None:
        self.envs = list(envs) if len(envs) == len(seeds) else [envs[0]] * len(seeds)
        self.seeds, self.replay = list(seeds), replay
        self.starts, self.wanted, self.diverged = starts, wanted, diverged
        self.states: list[dict[int, Snapshot]] = [{} for _ in seeds]

    def keep(self, seeds: Iterable[int], row: int, envs: Sequence[Env] | Mapping[int, Env]) -> None:
        """Keep the states of each such seed's environment, which its transition `row` begins in, if they are wanted."""
        chosen = [k for k in seeds if self.wanted[k, row]]
        for k, state in zip(chosen, raised(together([Call(envs[k], "snapshot") for k in chosen])), strict=True):
            self.states[k][row] = state

    def before(self, k: int, row: int) -> Snapshot:
        """Return the state before seed k's stored transition `row`, a wanted one."""
        if row not in self.states[k]:
            episode = bisect_right(self.starts[k], row) - 1
            first, end = [*self.starts[k], int(self.replay.sizes[k])][episode : episode + 2]
            actions = host(self.replay.data["action"][k, first:end])
            env = self.envs[k]
            play_again(env, self.seeds[k], episode, actions, lambda i: self.keep([k], first + i, {k: env}))
        return self.states[k][row]

    def simulate(self, indices: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take actions at the states of stored transitions (`mad-td` 4.2, `ftfl` 4.7).

        Args:
            indices: (S, n), rows of the replay, wanted ones.
            actions: (S, n, a); those that are not finite count as zeros.

        Returns:
            Next observations (S, n, o), rewards and masks (S, n), 0 where the task truly ends. Where the simulation
            blows up, nothing moves, nothing is gained and the episode ends.
        """
        fields = self.replay.data
        out = {name: np.empty((*indices.shape, *fields[name].shape[2:]), np.float32) for name in OUTCOME}
        calls = []
        for k, (rows, wanted) in enumerate(zip(indices.tolist(), host(actions), strict=True)):
            taken = [usable(action, k, self.diverged) for action in wanted]
            cases = [(self.before(k, row), action) for row, action in zip(rows, taken, strict=True)]
            calls.append(Call(self.envs[k], "outcomes", (cases,)))
        for k, (rows, steps) in enumerate(zip(indices.tolist(), raised(together(calls)), strict=True)):
            for j, (row, found) in enumerate(zip(rows, steps, strict=True)):
                step = found
                if step is None:
                    self.diverged[k] = True
                    step = Step(host(fields["obs"][k, row]), 0.0, terminated=True, truncated=False)
                for name, value in zip(OUTCOME, (step.obs, step.reward, not step.terminated), strict=True):
                    out[name][k, j] = value
        next_obs, reward, mask = (here(out[name]) for name in OUTCOME)
        return next_obs, reward, mask


class ClosedForm:
    """The same of a dial task: its observation holds the state, and what follows is a formula. Noise is drawn anew.

    Args:
        env: the run's task.
        seeds: the run seeds, S of them.
        replay: the transitions.
    """

    def __init__(self, env: Dial, seeds: Sequence[int], replay: Replay) -> None:
        self.env, self.seeds, self.replay = env, list(seeds), replay
        self._asked = 0, 0  # rows stored when it was last asked, and how often at that time

    def keep(self, seeds: Iterable[int], row: int, envs: Sequence[Env] | Mapping[int, Env]) -> None:
        """Nothing needs to be kept."""

    def simulate(self, indices: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Simulator.simulate`; the mask is 1, no episode of these tasks truly ends."""
        dynamics, units = self.env.dynamics, self.env.units
        stored = int(self.replay.sizes[0])
        again = self._asked[1] + 1 if self._asked[0] == stored else 0
        self._asked = stored, again
        shape = (indices.shape[1], dynamics.noise_size)
        noise = np.stack([stream(s, "true outcome", stored, again).standard_normal(shape) for s in self.seeds])
        state = host(self.replay.rows(indices)["obs"]).astype(np.float64) / units.obs
        wanted = host(actions).astype(np.float64)
        following, gained = dynamics.step(state, np.clip(np.nan_to_num(wanted), -1.0, 1.0), noise)
        out = (units.obs * following, units.reward * gained, np.ones_like(gained))
        next_obs, reward, mask = (here(values.astype(np.float32)) for values in out)
        return next_obs, reward, mask


def play_again(
    env: Env, seed: int, episode: int, actions: np.ndarray, before: Callable[[int], None] = lambda i: None
) -> np.ndarray:
    """Play the first agent steps of a run's episode again and return the observation after them.

    Args:
        env: any environment of the run's task.
        seed: the run's seed.
        episode: its number, from 0.
        actions: (n, a), as they were stored.
        before: called with i before step i.
    """
    obs = env.reset(integer(seed, "environment", episode))
    for i, action in enumerate(actions):
        before(i)
        obs = env.step(action).obs
    return obs
