"""TD-MPC2's search (`baselines` B.4): model predictive path integral control over H actions, anew at every agent step.

    P sequences of the policy in the model;  mean = that of the step before, shifted by one (0 at first), std = 2
    I times:  C - P candidates clip(mean + std noise, -1, 1), and the policy's
              v = sum_t gamma^t R(z_t, a_t) + gamma^H mean_2 Q(z_H, a),  a ~ pi(z_H)                   `value_of`
              the K best are elites, with weights softmax(v / 2)
              mean, std = their weighted mean and standard deviation, std clipped to [.05, 2]
    act: the first action of one elite, drawn with its weight; while exploring with std noise on it

Shapes: S seeds, o, a, L lengths of observation, action, latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynarep.nets import EVEN, even
from dynarep.placement import here
from dynarep.streams import stream

if TYPE_CHECKING:
    from dynarep.agents.td_mpc2 import TDMPC2

Generators = Sequence[np.random.Generator]


class SearchNoise(NamedTuple):
    """The random numbers of one search.

    Attributes:
        prior: normals (S, H, P, a). samples: (S, I, H, C - P, a). value: (S, I, C, a), of the last action.
        pairs: Q-functions (S, I, 2). choice: exponentials (S, K). action: normals (S, a); None: no noise on what is
            found.
    """

    prior: Tensor
    samples: Tensor
    value: Tensor
    pairs: Tensor
    choice: Tensor
    action: Tensor | None


class Planner:
    """Searches with an agent's networks, as they are at the time."""

    def __init__(self, agent: TDMPC2) -> None:
        self.agent, self.config, self.action_size = agent, agent.config, agent.action_size
        self.iterations = agent.config.iterations(agent.action_size)

    def noise(self, generators: Generators, explore: bool) -> SearchNoise:
        """Draw the random numbers of one search; `explore`: with noise on what is found."""
        c, a = self.config, self.action_size

        def normals(*shape: int) -> Tensor:
            return here(np.stack([g.standard_normal((*shape, a), np.float32) for g in generators]))

        prior = normals(c.horizon, c.plan_priors)
        samples = normals(self.iterations, c.horizon, c.plan_samples - c.plan_priors)
        value = normals(self.iterations, c.plan_samples)
        chosen = here(np.stack([pairs(generators, c.critics) for _ in range(self.iterations)], 1))
        choice = here(np.stack([g.standard_exponential(c.plan_elites, np.float32) for g in generators]))
        return SearchNoise(prior, samples, value, chosen, choice, normals() if explore else None)

    @torch.no_grad()
    def search(self, obs: Tensor, before: Tensor, noise: SearchNoise) -> tuple[Tensor, Tensor]:
        """Search the next actions.

        Args:
            obs: (S, o).
            before: the means (S, H, a) that the search of the step before ended with; zeros at an episode's start.
            noise: see `SearchNoise`.

        Returns:
            The action to take, (S, a), and the means (S, H, a) to start the next search from.
        """
        c = self.config
        z = self.agent.encode(even(obs.unsqueeze(1)))[:, :1]
        prior = self._prior(z, noise.prior)
        mean = F.pad(before[:, 1:], (0, 0, 0, 1))
        std = torch.full_like(mean, c.plan_std_max)
        for i in range(self.iterations):
            drawn = mean.unsqueeze(2) + std.unsqueeze(2) * noise.samples[:, i]
            candidates = torch.cat([prior, drawn.clamp(-1.0, 1.0)], 2)
            best, index = self.value_of(z, candidates, noise.value[:, i], noise.pairs[:, i]).topk(c.plan_elites, -1)
            weights = (c.plan_temperature * best).softmax(-1)
            # (S, H, a, K): sums over whole contiguous rows, see nets.py on block invariance.
            places = index[:, None, :, None].expand(-1, c.horizon, -1, self.action_size)
            elites, share = candidates.gather(2, places).mT.contiguous(), weights[:, None, None]
            mean = (share * elites).sum(-1)
            std = (share * (elites - mean.unsqueeze(-1)).square()).sum(-1).sqrt()
            std = std.clamp(c.plan_std_min, c.plan_std_max)
        chosen = (weights / noise.choice).argmax(-1)  # one elite, by its weight: argmax log w - log e
        action = elites[:, 0].gather(-1, chosen.view(-1, 1, 1).expand(-1, self.action_size, 1)).squeeze(-1)
        if noise.action is not None:
            action = action + std[:, 0] * noise.action
        action = action.clamp(-1.0, 1.0)
        return torch.where(z.isfinite().all(-1), action, math.nan), mean  # a network that diverged has no action

    def _prior(self, z: Tensor, noise: Tensor) -> Tensor:
        """Return what the policy does in the model, (S, H, P, a), from latents (S, 1, L)."""
        count, noise = noise.shape[2], F.pad(noise, (0, 0, 0, -noise.shape[2] % EVEN))
        z, actions = z.expand(-1, noise.shape[2], -1), []
        for t in range(self.config.horizon):
            actions.append(self.agent.sample(z, noise[:, t]))
            z = self.agent.imagine(z, actions[-1])
        return torch.stack(actions, 1)[:, :, :count]

    @torch.no_grad()
    def value_of(self, z: Tensor, candidates: Tensor, noise: Tensor, pair: Tensor) -> Tensor:
        """Return the values (S, C) of action sequences (S, H, C, a) from latents (S, 1, L); 0 for one that is NaN.

        noise (S, C, a) chooses the last action, pair (S, 2) the Q-functions.
        """
        agent, weight = self.agent, 1.0
        z, value = z.expand(-1, candidates.shape[2], -1), z.new_zeros(())
        for t in range(self.config.horizon):
            action = candidates[:, t]
            value = value + weight * agent.values.decode(agent.model((z, action), "reward"))
            z, weight = agent.imagine(z, action), weight * agent.discount
        both = agent.two(agent.critic, pair, z, agent.sample(z, noise))
        return (value + weight * (0.5 * (both[:, 0] + both[:, 1]))).nan_to_num(nan=0.0)


class Player:
    """The planner in noise-free episodes: every one begins without a plan, and none knows of training's.

    Noise is keyed by seed, evaluation, episode and step, so that it does not depend on who plays beside.
    """

    def __init__(self, agent: TDMPC2, at: int) -> None:
        self.agent, self.at = agent, at
        shape = len(agent.seeds), agent.config.horizon, agent.action_size
        self._cold = torch.zeros(shape, device=agent.scale.device)
        self._means: dict[int, Tensor] = {}

    def act(self, obs: Tensor, episodes: np.ndarray, steps: np.ndarray) -> Tensor:
        """Return actions (S, E, a) for observations (S, E, o) of episodes (S, E), at their steps (S, E), from 0."""
        planner, found = self.agent.planner, []
        for e in range(obs.shape[1]):
            keys = zip(self.agent.seeds, episodes[:, e].tolist(), steps[:, e].tolist(), strict=True)
            generators = [stream(seed, "plan", self.at, episode, step) for seed, episode, step in keys]
            warm = here(steps[:, e] > 0).view(-1, 1, 1)
            before = torch.where(warm, self._means.get(e, self._cold), self._cold)
            action, self._means[e] = planner.search(obs[:, e], before, planner.noise(generators, explore=False))
            found.append(action)
        return torch.stack(found, 1)


def pairs(generators: Generators, members: int) -> np.ndarray:
    """Draw two different numbers below `members` with each generator, (S, 2)."""
    return np.stack([g.permutation(members)[:2] for g in generators])
