"""The critic's temporal-difference error on given transitions, and true outcomes of the policy's own actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep.envs import Env, Snapshot


@torch.no_grad()
def td_error(agent: Any, z: Tensor, action: Tensor, reward: Tensor, next_z: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Critic error on given transitions against the agent's own targets (`mad-td` 4.2), each (S,).

    Args:
        agent: a MadTD.
        z, action, reward, next_z, mask: (S, B, L), (S, B, a), (S, B), (S, B, L), (S, B); real rows only.

    Returns:
        l2: the reference's `l2_q_loss`, mean m (Q1 - y)^2 + mean m (Q2 - y)^2; rms: its square root per critic and
        unmasked row, in reward units, comparable between batches; ce: the cross-entropy that is trained; q: mean value
        of the smaller critic, in reward units.
    """
    y = agent.td_target(reward, next_z)
    log_q = agent.q_log(agent.critic, z, action)
    q = agent.values.decode(log_q)
    square = mask.unsqueeze(1) * (q - y.unsqueeze(1)).square()
    rows = mask.sum(-1).clamp(min=1.0)
    return {
        "l2": square.mean(-1).sum(-1),
        "rms": (square.sum((1, 2)) / (2 * rows)).sqrt(),
        "ce": agent.cross_entropy(y, log_q, mask),
        "q": (mask * q.amin(1)).sum(-1) / rows,
    }


def on_policy_step(env: Env, snapshots: list[Snapshot], actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take each action in its restored simulator state: true reward and next observation (`mad-td` 4.2).

    Args:
        env: the task whose states these are.
        snapshots: n full simulator states.
        actions: (n, a) in [-1, 1].

    Returns:
        rewards (n,) and next observations (n, o), float32.
    """
    rewards = np.empty(len(snapshots), np.float32)
    following = np.empty((len(snapshots), env.obs_size), np.float32)
    for i, (snapshot, action) in enumerate(zip(snapshots, actions, strict=True)):
        env.restore(snapshot)
        step = env.step(action)
        rewards[i], following[i] = step.reward, step.obs
    return rewards, following
