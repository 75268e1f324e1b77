"""Probes: tasks so small that the optimal value and action are known in closed form (after Jones, "Debugging RL").

Each isolates one thing that a learner must do; the first one that fails says where to look:

    constant     one reward, always                            can the critic fit a number?
    observation  the reward is the observation's sign          ... a function of the observation?
    delayed      the reward comes one step later               does it bootstrap and discount?
    action       the reward has its peak at one action         ... a function of the action; does the actor climb?
    both         where the peak is depends on the observation  does the actor look at the observation?
    steering     the action decides where the reward is paid   does the value of an action arrive through s'?

Observations are (phase, position): the phase is -1 or 1, the position 0 but in `steering`. Actions have one dimension.
In the version that ends an episode ends after its last reward (mask 0); the continuing version, for learners that never
terminate their own data, goes on for ever. Values are soft: `bonus` is temperature x entropy of the policy, paid at
every later step. They are exact where the policy that collects the bonus also acts best: for bonus 0, and for any
bonus where actions do not matter.

All probes have the same shapes, so that one block of seeds learns all of them at once: seed i learns probe i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynarep.replay import Replay
from dynarep.streams import stream

OBS, ACTION = 2, 1
PEAK = 0.5
FIELDS: dict[str, tuple[int, ...]] = {"obs": (OBS,), "action": (ACTION,), "reward": (), "next_obs": (OBS,), "mask": ()}


@dataclass(frozen=True)
class Probe:
    """One task.

    Attributes:
        reward: phase, position, action (each of any one shape) -> reward.
        steps: 1: every step is the last of its episode, or the phase never changes; 2: phase -1, then phase 1.
        best: phase -> best action; None where actions do not matter.
        steers: whether the action in phase -1 is the position in phase 1; there alone it matters.
        continuing: whether episodes go on for ever.
    """

    name: str
    reward: Callable[[Tensor, Tensor, Tensor], Tensor]
    steps: int = 1
    best: Callable[[Tensor], Tensor] | None = None
    steers: bool = False
    continuing: bool = False

    def next_obs(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return s', (..., 2), for observations (..., 2) and actions (..., 1)."""
        phase, position = obs[..., 0], torch.zeros_like(obs[..., 0])
        if self.steers:
            position = torch.where(phase < 0, action[..., 0], 0.0)
        return torch.stack([-phase if self.steps == 2 else phase, position], -1)

    def mask(self, obs: Tensor) -> Tensor:
        """Return 0 where the episode ends after this step, (...)."""
        last = obs[..., 0] > 0 if self.steps == 2 else torch.ones(obs.shape[:-1], dtype=torch.bool)
        return torch.ones(obs.shape[:-1]) if self.continuing else (~last).float()

    def state_value(self, obs: Tensor, discount: float, bonus: float = 0.0) -> Tensor:
        """Return V, the return of acting best, (...), without the bonus of the present step."""
        phase, position = obs.unbind(-1)
        best = self.reward(phase, position, self.best(phase) if self.best else torch.zeros_like(phase))
        if self.steps == 1:
            return (best + discount * bonus) / (1 - discount) if self.continuing else best
        # Phase -1 pays nothing, and leads to a reward of 1 if the action is right.
        first = discount * (1.0 + bonus)
        if self.continuing:
            first = (first + discount**2 * bonus) / (1 - discount**2)
        then = discount * (first + bonus) if self.continuing else 0.0
        return torch.where(phase < 0, first, best + then)

    def value(self, obs: Tensor, action: Tensor, discount: float, bonus: float = 0.0) -> Tensor:
        """Return Q, (...), for observations (..., 2) and actions (..., 1)."""
        later = self.state_value(self.next_obs(obs, action), discount, bonus) + bonus
        return self.reward(obs[..., 0], obs[..., 1], action[..., 0]) + discount * self.mask(obs) * later

    def cares(self, obs: Tensor) -> Tensor:
        """Return where the action matters, (...) of bool."""
        if self.best is None:
            return torch.zeros(obs.shape[:-1], dtype=torch.bool)
        return obs[..., 0] < 0 if self.steers else torch.ones(obs.shape[:-1], dtype=torch.bool)


def _peak(x: Tensor, at: Tensor | float) -> Tensor:
    return 1.0 - (x - at).square()


def _at_peak(phase: Tensor) -> Tensor:
    return torch.full_like(phase, PEAK)


ENDING = (
    Probe("constant", lambda phase, position, action: torch.ones_like(phase)),
    Probe("observation", lambda phase, position, action: phase),
    Probe("delayed", lambda phase, position, action: (phase > 0).float(), steps=2),
    Probe(
        "action", lambda phase, position, action: _peak(action, PEAK), best=lambda phase: torch.full_like(phase, PEAK)
    ),
    Probe("both", lambda phase, position, action: _peak(action, PEAK * phase), best=lambda phase: PEAK * phase),
    Probe(
        "steering",
        lambda phase, position, action: torch.where(phase > 0, _peak(position, PEAK), 0.0),
        steps=2,
        best=_at_peak,
        steers=True,
    ),
)
CONTINUING = tuple(Probe(**{**vars(probe), "continuing": True}) for probe in ENDING)


def states(probe: Probe, size: int, rng: np.random.Generator) -> Tensor:
    """Draw observations (size, 2): both phases alike, positions where the probe can be."""
    phase = torch.from_numpy(rng.choice([-1.0, 1.0], size)).float()
    position = torch.from_numpy(rng.uniform(-1, 1, size)).float() if probe.steers else torch.zeros(size)
    return torch.stack([phase, torch.where(phase > 0, position, 0.0)], -1)


def transitions(probes: Sequence[Probe], size: int, seed: int = 0) -> dict[str, Tensor]:
    """Return rows of uniformly random actions, each field (len(probes), size, ...)."""
    parts = []
    for i, probe in enumerate(probes):
        rng = stream(seed, "probe", i)
        obs, action = states(probe, size, rng), torch.from_numpy(rng.uniform(-1, 1, (size, ACTION))).float()
        reward = probe.reward(obs[:, 0], obs[:, 1], action[:, 0])
        rows = {"obs": obs, "action": action, "reward": reward, "next_obs": probe.next_obs(obs, action)}
        parts.append(rows | {"mask": probe.mask(obs)})
    return {name: torch.stack([part[name] for part in parts]) for name in FIELDS}


def replay(probes: Sequence[Probe], size: int = 1000, seed: int = 0) -> Replay:
    """Return a full buffer of `transitions`, one probe per seed of the block."""
    buffer = Replay(FIELDS, len(probes), size)
    buffer.add(transitions(probes, size, seed))
    return buffer
