"""What is measured about an agent. Nothing here changes one: no gradients, no draws."""

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


def reward_fit(predicted: np.ndarray, real: np.ndarray, deciles: int = 10) -> dict[str, float]:
    """How well a model's mean rewards fit real ones, in raw reward units (`ftfl` 4.1).

    Args:
        predicted, real: (n,) mean prediction and real reward of transitions the model never saw.
        deciles: groups of equal size by real reward; the mean of both is returned for each.

    Returns:
        mse; variance of the real rewards; nmse, their ratio (1 - R^2; 1 is "predicts the mean"); mean_ratio, mean
        prediction over mean reward; slope of the regression of prediction on reward (1 is right, 0 is "collapsed");
        negative, the share of predictions below zero; top_ratio, mean prediction over mean reward in the highest
        tenth; decile/k/real and decile/k/predicted.
    """
    predicted, real = predicted.astype(np.float64), real.astype(np.float64)
    variance = float(np.var(real))
    mse = float(np.mean((predicted - real) ** 2))
    fit = {
        "mse": mse,
        "variance": variance,
        "nmse": mse / variance if variance > 0 else float("nan"),
        "mean_real": float(np.mean(real)),
        "mean_predicted": float(np.mean(predicted)),
        "slope": float(np.mean((predicted - predicted.mean()) * (real - real.mean()))) / variance
        if variance > 0
        else float("nan"),
        "negative": float(np.mean(predicted < 0)),
    }
    fit["mean_ratio"] = fit["mean_predicted"] / fit["mean_real"] if fit["mean_real"] else float("nan")
    order = np.argsort(real, kind="stable")
    for k, group in enumerate(np.array_split(order, deciles)):
        fit[f"decile/{k}/real"] = float(np.mean(real[group]))
        fit[f"decile/{k}/predicted"] = float(np.mean(predicted[group]))
    top = fit[f"decile/{deciles - 1}/real"]
    fit["top_ratio"] = fit[f"decile/{deciles - 1}/predicted"] / top if top else float("nan")
    return fit
