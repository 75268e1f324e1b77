"""Which synthetic transitions are worth keeping: the rules of MBPO's uncertainty-aware descendants (`ftfl` 3.7).

Each is given every member's prediction in raw units at a step h of a rollout, and returns the transition that is
stored, which rows to store and which to go on with:

    M2AC      u = KL(chosen member || moments of the others); the rows with the smallest u are stored, with reward
              r - 0.001 u; all go on
    MACURA    u = mean over member pairs of the geometric Jensen-Shannon divergence; a row is stored and goes on while
              u < threshold, which follows the u of first steps
    Infoprop  the members are fused into one Gaussian, and a random member's sample is filtered through it; a row is
              stored and goes on while little information is lost, per step and in sum

The rules are the papers' own, from the public code of MACURA (which has M2AC too) and of Infoprop. The backbone is not:
ensemble, schedule, start states and SAC are those of `agents/mbpo.py`.

Shapes: S seeds, E members, B rows, D outputs [s', r]. KL and the divergence do not feel the units of an output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynarep import process
from dynarep.agents.ensemble import Ensemble, Generators, Prediction
from dynarep.configs.mbpo import MBPOConfig
from dynarep.nets import EVEN
from dynarep.placement import here, moved
from dynarep.replay import Replay, draw


class Choice(NamedTuple):
    """One model step: next_obs (S, B, o), reward (S, B), and which rows to store and to go on with, (S, B) of bool."""

    next_obs: Tensor
    reward: Tensor
    store: Tensor
    go_on: Tensor


# -- measures of uncertainty -------------------------------------------------------------------------------------


def kl_to_the_rest(mean: Tensor, variance: Tensor, chosen: Tensor) -> Tensor:
    """Return KL(N(chosen) || N(moments of the other members)), summed over outputs, (S, B).

    Args:
        mean: (S, E, B, D).
        variance: (S, E, B, D).
        chosen: a member per row, (S, B).
    """
    members = mean.shape[1]
    every = torch.arange(members, device=chosen.device).view(-1, 1)
    others = (every != chosen.unsqueeze(1)).unsqueeze(-1) / (members - 1)  # (S, E, B, 1)
    rest = (others * mean).sum(1)
    spread = (others * (variance + (mean - rest.unsqueeze(1)).square())).sum(1)
    own_mean, own_variance = member(mean, chosen), member(variance, chosen)
    ratio = own_variance / spread
    return 0.5 * (ratio + (own_mean - rest).square() / spread - 1.0 - ratio.log()).sum(-1)


def kept_share(step: int, horizon: int) -> float:
    """Return w_h, the share of rows that M2AC stores at model step h of H: (H - h) / (2 (H + 1)), 1/2 if H = 1."""
    return 0.5 if horizon == 1 else (horizon - step) / (2.0 * (horizon + 1))


def mean_divergence(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the geometric Jensen-Shannon divergence (weight 1/2), mean over member pairs, sum over outputs, (S, B).

    With the geometric mean's 1 / var_g = (1 / var_1 + 1 / var_2) / 2 its sum of quadratic forms is
    (mu_1 - mu_2)^2 / 2 (var_1 + var_2), and -log var_g = log (var_1 + var_2) / 2 - log var_1 - log var_2.
    """
    log_variance, pairs = variance.log(), list(combinations(range(mean.shape[1]), 2))
    total = torch.zeros(mean.shape[0], mean.shape[2], device=mean.device)
    for i, j in pairs:
        both = variance[:, i] + variance[:, j]
        apart = (mean[:, i] - mean[:, j]).square() / (2.0 * both)
        wider = (0.5 * both).log() - 0.5 * (log_variance[:, i] + log_variance[:, j])
        total += 0.5 * (apart + wider).sum(-1)
    return total / len(pairs)


def fuse(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Infoprop's fused mean, fused variance and epistemic variance, each (S, B, D).

    The fused variance is the members' harmonic mean, the fused mean weighs members by precision, and the epistemic
    variance is their mean squared distance from it.
    """
    precision = variance.reciprocal()
    total = precision.sum(1)
    fused = (precision * mean).sum(1) / total
    return fused, mean.shape[1] / total, (mean - fused.unsqueeze(1)).square().mean(1)


def information_loss(variance: Tensor, resolution: float) -> Tensor:
    """Return max(0, 1/2 log2(2 pi e variance) - log2(resolution)): bits lost per output, of any shape."""
    return (0.5 * (2.0 * math.pi * math.e * variance).log2() - math.log2(resolution)).clamp(min=0.0)


def member(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the values of one member per row: (S, E, B, D) and (S, B) -> (S, B, D)."""
    return values.gather(1, chosen[:, None, :, None].expand(-1, -1, -1, values.shape[-1])).squeeze(1)


# -- rules -------------------------------------------------------------------------------------------------------


class Rule:
    """What the rules share: whole rows of `D` numbers, in multiples of 32.

    Args:
        config: hyperparameters.
        outputs: D.
        seeds: S.
    """

    def __init__(self, config: MBPOConfig, outputs: int, seeds: int) -> None:
        self.config, self.outputs, self.seeds = config, outputs, seeds

    def fit(self, ensemble: Ensemble, replay: Replay, generators: Generators) -> None:
        """Learn from the ensemble's predictions on real transitions, after every retraining."""

    def choose(
        self, step: int, prediction: Prediction, elites: Tensor, generators: Generators, alive: Tensor
    ) -> Choice:
        """Sample one model step and decide about its rows.

        Args:
            step: model step h of the rollout, from 0.
            prediction: of B rows.
            elites: (S, elites).
            generators: one per seed; each draws members, then noise.
            alive: rows that are still going on, (S, B); no other is stored or goes on.
        """
        size = alive.shape[1]
        mean, variance = _moments(prediction)
        y, store, go_on = self._choose(
            step, mean, variance, elites, generators, F.pad(alive, (0, mean.shape[2] - size))
        )
        y = y[:, :size]
        return Choice(y[..., :-1], y[..., -1], store[:, :size] & alive, go_on[:, :size] & alive)

    def _choose(
        self, step: int, mean: Tensor, variance: Tensor, elites: Tensor, generators: Generators, alive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return [s', r] (S, B, D), rows to store and to go on with, (S, B)."""
        raise NotImplementedError

    def _noise(self, generators: Generators, size: int) -> Tensor:
        shape = (size, self.outputs)
        return here(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""


class M2AC(Rule):
    """Mask and penalise. Members are drawn from all, elite or not."""

    def _choose(
        self, step: int, mean: Tensor, variance: Tensor, elites: Tensor, generators: Generators, alive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, size = self.config, mean.shape[2]
        chosen = moved(draw(generators, c.members, (size,)), mean.device)
        y = member(mean, chosen) + member(variance, chosen).sqrt() * self._noise(generators, size)
        u = kl_to_the_rest(mean, variance, chosen)
        y[..., -1] -= c.m2ac_penalty * u
        rank = u.where(alive, math.inf).argsort(dim=1, stable=True).argsort(dim=1)
        wanted = (alive.sum(1).double() * kept_share(step, c.m2ac_horizon) + 1e-9).floor()
        return y, alive & (rank < wanted.unsqueeze(1)), alive


class MACURA(Rule):
    """Reject. Members are drawn from the elites, and compared with all."""

    def __init__(self, config: MBPOConfig, outputs: int, seeds: int) -> None:
        super().__init__(config, outputs, seeds)
        # xi times a percentile, one of each rollout round
        self.history = torch.zeros(seeds, config.macura_history, device=process.device())
        self.rounds = 0

    def _choose(
        self, step: int, mean: Tensor, variance: Tensor, elites: Tensor, generators: Generators, alive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, size = self.config, mean.shape[2]
        chosen = elites.gather(1, moved(draw(generators, c.elites, (size,)), elites.device))
        y = member(mean, chosen) + member(variance, chosen).sqrt() * self._noise(generators, size)
        u = mean_divergence(mean, variance)
        if step == 0:
            base = [torch.quantile(own[rows], c.macura_percentile / 100) for own, rows in zip(u, alive, strict=True)]
            self.history[:, self.rounds % c.macura_history] = c.macura_scale * torch.stack(base)
            self.rounds += 1
        trusted = alive & (u < self.threshold().unsqueeze(1))
        return y, trusted, trusted

    def threshold(self) -> Tensor:
        """Return the mean over the rounds remembered, (S,)."""
        return self.history.sum(1) / min(self.rounds, self.config.macura_history)

    def state(self) -> dict[str, Tensor]:
        """Return the thresholds of past rounds."""
        return {"history": self.history.clone(), "rounds": torch.tensor(self.rounds)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        self.history.copy_(state["history"])
        self.rounds = int(state["rounds"])


class Infoprop(Rule):
    """Fuse and reject. Members are drawn from all, elite or not; bits are counted in raw units."""

    def __init__(self, config: MBPOConfig, outputs: int, seeds: int) -> None:
        super().__init__(config, outputs, seeds)
        self.most = torch.full((seeds, outputs), math.inf, device=process.device())  # bits lost per step
        self.most_in_sum = self.most.clone()  # over the steps of a rollout
        self._sum = torch.zeros(())

    def fit(self, ensemble: Ensemble, replay: Replay, generators: Generators) -> None:
        """Take the limits from the bits lost in one step from real transitions."""
        c = self.config
        rows = replay.rows(draw(generators, replay.size, (c.infoprop_rows,)))
        _, fused, epistemic = fuse(*_moments(ensemble.predict(rows["obs"], rows["action"])))
        loss = information_loss(_conditional(fused, epistemic), c.infoprop_resolution)[:, : c.infoprop_rows]
        for s, own in enumerate(loss):  # one seed at a time: interpolation that cannot know the block
            self.most[s] = torch.quantile(own, c.infoprop_step_quantile, dim=0)
            self.most_in_sum[s] = c.infoprop_horizon * torch.quantile(own, c.infoprop_sum_quantile, dim=0)

    def _choose(
        self, step: int, mean: Tensor, variance: Tensor, elites: Tensor, generators: Generators, alive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, size = self.config, mean.shape[2]
        chosen = moved(draw(generators, c.members, (size,)), mean.device)
        x = member(mean, chosen) + member(variance, chosen).sqrt() * self._noise(generators, size)
        middle, fused, epistemic = fuse(mean, variance)
        rest = _conditional(fused, epistemic)
        gain = fused / (fused + epistemic)
        y = middle + gain * (x - middle) + rest.sqrt() * self._noise(generators, size)
        loss = information_loss(rest, c.infoprop_resolution)
        self._sum = loss if step == 0 else self._sum + loss
        little = (loss <= self.most.unsqueeze(1)) & (self._sum <= self.most_in_sum.unsqueeze(1))
        trusted = alive & little.all(-1)
        return y, trusted, trusted

    def state(self) -> dict[str, Tensor]:
        """Return the limits."""
        return {"most": self.most.clone(), "most_in_sum": self.most_in_sum.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        self.most.copy_(state["most"])
        self.most_in_sum.copy_(state["most_in_sum"])


RULES: Mapping[str, type[Rule]] = {"m2ac": M2AC, "macura": MACURA, "infoprop": Infoprop}


def _moments(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Return mean and variance of [s', r], (S, E, B, D), B padded to a multiple of 32 (with variance 1)."""
    extra = -prediction.reward.shape[2] % EVEN
    mean = torch.cat([prediction.next_obs, prediction.reward.unsqueeze(-1)], -1)
    return F.pad(mean, (0, 0, 0, extra)), F.pad(prediction.variance, (0, 0, 0, extra), value=1.0)


def _conditional(fused: Tensor, epistemic: Tensor) -> Tensor:
    """Return (1 - K) fused with the gain K = fused / (fused + epistemic), without its cancellation."""
    return fused * epistemic / (fused + epistemic)


def make(config: MBPOConfig, outputs: int, seeds: Sequence[int]) -> Rule | None:
    """Return the rule that the configuration names, None if everything is kept."""
    return None if config.selection == "none" else RULES[config.selection](config, outputs, len(seeds))
