"""The critic against what really came: values along episodes beside discounted returns (`ftfl` 4.4).

    G_t      = sum_{k >= 0} gamma^k r_{t+k}                                                       `returns_to_go`
    G_t soft = G_t + sum_{k >= 1} gamma^k alpha H_{t+k},   H_t = -log pi(a|s_t) of one sampled a
    bias     = mean_t (Q(s_t, a_t) - G_t), over the states from which nearly all of G_t was seen  `against_return`

SAC's Q includes the entropy of later steps, not the one of its own action: the second sum starts at k = 1. An episode
that the time limit ends goes on for ever in Q's eyes; so only states with enough agent steps left count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = 512  # rows evaluated at a time, always as many: a row's last bits may depend on how many there are


@dataclass(frozen=True)
class Episode:
    """T agent steps: obs (T, o), action (T, a), reward (T,); `terminated` by a true end, not by a limit."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: bool

    def __len__(self) -> int:
        return len(self.reward)

    def counts(self, margin: int) -> np.ndarray:
        """Return which steps have `margin` agent steps left, themselves included, (T,); all if it truly ended."""
        return (np.arange(len(self), 0, -1) >= margin) | self.terminated


def returns_to_go(reward: np.ndarray, discount: float) -> np.ndarray:
    """Return sum_{k >= 0} discount^k reward_{t+k} for every t, (T,) float64, of rewards (T,)."""
    out = np.empty(len(reward))
    ahead = 0.0
    for t in range(len(reward) - 1, -1, -1):
        out[t] = ahead = float(reward[t]) + discount * ahead
    return out


def against_return(
    episodes: Sequence[Episode],
    q: np.ndarray,
    entropy: np.ndarray,
    discount: float,
    temperature: float,
    margin: int,
) -> dict[str, float]:
    """Compare one seed's values with the returns that followed (`ftfl` 4.4).

    Args:
        episodes: episodes of the policy that is valued.
        q, entropy: (N,), values and H of all their steps, one episode after the other.
        discount: per agent step.
        temperature: alpha.
        margin: states with so many agent steps left are compared; all of an episode that truly ended.

    Returns:
        Means over these states: `q`; `mc`, the discounted return; `mc_soft`, with the entropy of later steps;
        `bias` = q - mc; `bias_soft` = q - mc_soft. NaN if there is no such state.
    """
    plain, soft, chosen = [np.empty(0)], [np.empty(0)], [np.empty(0, bool)]
    start = 0
    for episode in episodes:
        bonus = temperature * entropy[start : start + len(episode)].astype(np.float64)
        start += len(episode)
        plain.append(returns_to_go(episode.reward, discount))
        soft.append(plain[-1] + returns_to_go(bonus, discount) - bonus)
        chosen.append(episode.counts(margin))
    rows = np.concatenate(chosen)
    if not rows.any():
        return dict.fromkeys(("q", "mc", "mc_soft", "bias", "bias_soft"), math.nan)
    value = float(q[rows].astype(np.float64).mean())
    mc, mc_soft = float(np.concatenate(plain)[rows].mean()), float(np.concatenate(soft)[rows].mean())
    return {"q": value, "mc": mc, "mc_soft": mc_soft, "bias": value - mc, "bias_soft": value - mc_soft}


def values(agent: Any, obs: Sequence[np.ndarray], action: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return min_j Q_j of each seed's own number of rows: (n_s, o) and (n_s, a) -> (n_s,), for S seeds."""
    parts = [agent.q(*pair) for pair in zip(_pieces(obs), _pieces(action), strict=True)]
    return _own(parts, obs)


def entropies(agent: Any, obs: Sequence[np.ndarray], generators: Sequence[np.random.Generator]) -> list[np.ndarray]:
    """Return -log pi(a|s) of one action sampled in each of a seed's states: (n_s, o) -> (n_s,), for S seeds."""
    parts = [-agent.log_prob_sample(rows, generators)[1] for rows in _pieces(obs)]
    return _own(parts, obs)


def _pieces(rows: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Yield (S, ROWS, d), filled up with zeros, as long as any seed has rows."""
    for start in range(0, max(1, *map(len, rows)), ROWS):
        piece = np.zeros((len(rows), ROWS, *rows[0].shape[1:]), np.float32)
        for out, own in zip(piece, rows, strict=True):
            part = own[start : start + ROWS]
            out[: len(part)] = part
        yield torch.from_numpy(piece)


def _own(parts: Sequence[Tensor], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Cut what was computed for (S, ROWS) pieces back to each seed's own rows."""
    whole = torch.cat(list(parts), 1).numpy()
    return [line[: len(own)] for line, own in zip(whole, rows, strict=True)]
