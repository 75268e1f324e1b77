"""The critic against what really came: values along episodes beside discounted returns (`ftfl` 4.4, `mad-td` 4.1).

    G_t      = sum_{k >= 0} gamma^k r_{t+k}                                                       `returns_to_go`
    G_t soft = G_t + sum_{k >= 1} gamma^k alpha H_{t+k},   H_t = -log pi(a|s_t) of one sampled a
    bias     = mean_t (Q(s_t, a_t) - G_t), over the states from which nearly all of G_t was seen  `against_return`
    G_t tail = G_t + gamma^{T-t} r_bar / (1 - gamma),   r_bar the mean of the last 50 rewards     `tail_corrected`
    over     = mean_t (Q(s_t, a_t) - G_t tail), over the first half of every episode              `overestimation`

SAC's Q includes the entropy of later steps, not the one of its own action: the second sum starts at k = 1. An episode
that the time limit ends goes on for ever in Q's eyes. So either only states with enough agent steps left count, or the
return gets the tail that it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep.placement import here, host

LAST_REWARDS = 50  # agent steps whose mean reward stands for all that would have come (`mad-td` 4.1)
ROWS = 512  # rows evaluated at a time, always as many: a row's last bits may depend on how many there are


@dataclass(frozen=True)
class Episode:
    """T agent steps: obs (T, o), action (T, a), reward (T,); `terminated` by a true end, not by a limit.

    success (T,) of bool: whether the task's goal was met in each agent step, None where a task has none to meet.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    success: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.reward)

    def counts(self, margin: int) -> np.ndarray:
        """Return which steps have `margin` agent steps left, themselves included, (T,); all if it truly ended."""
        return (np.arange(len(self), 0, -1) >= margin) | self.terminated


def returns_to_go(reward: np.ndarray, discount: float, after: float = 0.0) -> np.ndarray:
    """Return sum_{k >= 0} discount^k reward_{t+k} for every t, (T,) float64, of rewards (T,).

    `after` is what comes after the last reward: a discounted sum itself.
    """
    out = np.empty(len(reward))
    ahead = after
    for t in range(len(reward) - 1, -1, -1):
        out[t] = ahead = float(reward[t]) + discount * ahead
    return out


def tail_corrected(reward: np.ndarray, discount: float) -> np.ndarray:
    """Return what an episode cut by its time limit would have brought, (T,) float64 (`mad-td` 4.1).

    For ever after, the reward counts as r_bar, the mean of the last 50 (of all, if they are fewer):
    sum_{k < T-t} discount^k reward_{t+k} + discount^{T-t} r_bar / (1 - discount), for rewards (T,).
    """
    if not len(reward):
        return np.empty(0)
    lasting = float(reward[-LAST_REWARDS:].mean(dtype=np.float64))
    return returns_to_go(reward, discount, after=lasting / (1.0 - discount))


def overestimation(episodes: Sequence[Episode], q: np.ndarray, discount: float, ceiling: float) -> dict[str, float]:
    """Compare one seed's values with tail-corrected returns (`mad-td` 4.1).

    Args:
        episodes: episodes of the policy that is valued.
        q: (N,), values of all their steps, one episode after the other.
        discount: per agent step.
        ceiling: the largest value that the task's rewards allow; infinity if they have no bound.

    Returns:
        Over the first half of each episode, t < T / 2 with t counted from 0, and over all of one that truly ended,
        whose return is complete without a tail: `mc_tail`, the mean return; `over`, the mean of q - return; `over_abs`,
        the mean of |q - return|; `q_over_mc`, mean q over mean return (NaN where that is not above 0);
        `q_over_ceiling`, mean q over the ceiling (NaN if there is none). All NaN if there is no such state.
    """
    returns, chosen = [np.empty(0)], [np.empty(0, bool)]
    for episode in episodes:
        whole = episode.terminated
        returns.append((returns_to_go if whole else tail_corrected)(episode.reward, discount))
        chosen.append((2 * np.arange(len(episode)) < len(episode)) | whole)
    rows = np.concatenate(chosen)
    if not rows.any():
        return dict.fromkeys(("mc_tail", "over", "over_abs", "q_over_mc", "q_over_ceiling"), math.nan)
    with np.errstate(invalid="ignore"):  # a critic that diverged is a result
        value, real = q[rows].astype(np.float64), np.concatenate(returns)[rows]
        mean, mc = float(value.mean()), float(real.mean())
        gap = value - real
        over, over_abs = float(gap.mean()), float(np.abs(gap).mean())
    return {
        "mc_tail": mc,
        "over": over,
        "over_abs": over_abs,
        "q_over_mc": mean / mc if mc > 0 else math.nan,
        "q_over_ceiling": mean / ceiling if math.isfinite(ceiling) else math.nan,
    }


def against_return(
    episodes: Sequence[Episode],
    q: np.ndarray,
    entropy: np.ndarray | None,
    discount: float,
    temperature: float,
    margin: int,
) -> dict[str, float]:
    """Compare one seed's values with the returns that followed (`ftfl` 4.4).

    Args:
        episodes: episodes of the policy that is valued.
        q, entropy: (N,), values and H of all their steps, one episode after the other; entropy is None for a policy
            that is not regularised by it.
        discount: per agent step.
        temperature: alpha; without a meaning, and without an effect, where there is no entropy.
        margin: states with so many agent steps left are compared; all of an episode that truly ended.

    Returns:
        Means over these states: `q`; `mc`, the discounted return; `bias` = q - mc. With entropy also `mc_soft`, the
        return with the entropy of later steps, and `bias_soft` = q - mc_soft. NaN if there is no such state.
    """
    returns: dict[str, list[np.ndarray]] = {"": [np.empty(0)]} | ({} if entropy is None else {"_soft": [np.empty(0)]})
    chosen, start = [np.empty(0, bool)], 0
    for episode in episodes:
        plain = returns_to_go(episode.reward, discount)
        returns[""].append(plain)
        if entropy is not None:
            bonus = temperature * entropy[start : start + len(episode)].astype(np.float64)
            returns["_soft"].append(plain + returns_to_go(bonus, discount) - bonus)
        start += len(episode)
        chosen.append(episode.counts(margin))
    rows = np.concatenate(chosen)
    value = float(q[rows].astype(np.float64).mean()) if rows.any() else math.nan
    mc = {
        f"mc{kind}": float(np.concatenate(parts)[rows].mean()) if rows.any() else math.nan
        for kind, parts in returns.items()
    }
    return {"q": value} | mc | {name.replace("mc", "bias"): value - number for name, number in mc.items()}


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
        yield here(piece)


def _own(parts: Sequence[Tensor], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Cut what was computed for (S, ROWS) pieces back to each seed's own rows."""
    whole = host(torch.cat(list(parts), 1))
    return [line[: len(own)] for line, own in zip(whole, rows, strict=True)]
