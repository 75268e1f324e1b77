"""How sharp the critic is around an action: gradient, curvature, perturbations with and against it (`mad-td` 4.3).

All of Q = Q1, decoded, with the online encoder, at a = pi(E(s)) (`policy`) and at the stored action (`buffer`); n is
standard normal; every number is a mean over states.

    gradient   || grad_a Q(s, a + 0.01 n) ||, mean over 10 draws of n (the reference: 100 draws, of one state)
    curvature  largest |eigenvalue| of the Hessian of Q in a, on the first 128 states
    ascent     (Q(s, a') - Q(s, a))^2,  a' = a after 100 steps a' <- a' + 0.01 sign grad Q, as released: nothing holds
               a' near a or inside the action box, so each coordinate travels up to 1
    ascent_e   Q(s, a') - Q(s, a) after 10 such steps of e / 4, each put back into [a - e, a + e] and [-1, 1]
    descent    Q(s, a) - Q(s, a') after 10 steps of 0.02 against the gradient, inside the box: how steeply Q falls
    random     |Q(s, a + 0.3 n) - Q(s, a)|, the perturbed action cut to the box; `random_relative`: over mean |Q(s, a)|

The actor climbs Q. Where it has arrived there is little left to ascend to, however sharp the peak: descent and random
perturbations still tell. Ours are `descent`, `random`, the number of draws and the projected steps (2.5 e over the
number of steps is customary, Madry et al. 2018; steps of 0.01 would do nothing but cross the smallest ball).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep.placement import here

DRAWS, JITTER = 10, 0.01
ROWS = 256  # states at a time: what bounds the memory
CURVED = 128  # states whose Hessian is taken: its cost is two gradients per state and action dimension
OFFSET = 0.005  # of the action, for central differences of the gradient; see `curvature`
BALLS = (0.01, 0.05, 0.1)
NOISE = 0.3


def sharpness(agent: Any, obs: Tensor, action: Tensor, generators: Sequence[np.random.Generator]) -> dict[str, Tensor]:
    """Measure how sharp the first online critic is, around the policy's actions and around stored ones.

    Args:
        agent: a MadTD, left as it is.
        obs, action: (S, B, o) and (S, B, a), stored states and actions; B a multiple of 32.
        generators: one per seed, for all draws. Both kinds of action meet the same ones.

    Returns:
        METRIC/policy and METRIC/buffer, each (S,), for the metrics above: gradient, curvature, ascent, ascent_0.01,
        ascent_0.05, ascent_0.1, descent, random, random_relative. In units of Q, per unit of action where they are
        derivatives. NaN where the critic is not finite, and random_relative where Q is 0 everywhere.
    """
    with torch.no_grad():
        z = agent.encode(obs)
        jitter = _normals(generators, (DRAWS, *action.shape[1:]))
        noise = _normals(generators, action.shape[1:])
        found: dict[str, Tensor] = {}
        for place, a in {"policy": agent.policy(z), "buffer": action}.items():
            pieces = [
                _at(agent, z[:, rows], a[:, rows], jitter[:, :, rows], noise[:, rows])
                for rows in (slice(start, start + ROWS) for start in range(0, a.shape[1], ROWS))
            ]
            measured = {metric: torch.cat([piece[metric] for piece in pieces], 1).mean(-1) for metric in pieces[0]}
            measured["random_relative"] = measured["random"] / measured.pop("size")
            measured["curvature"] = curvature(agent, z[:, :CURVED], a[:, :CURVED]).mean(-1)
            found |= {f"{metric}/{place}": value for metric, value in measured.items()}
    return found


def _at(agent: Any, z: Tensor, a: Tensor, jitter: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Measure all but the curvature at actions (S, B, a), each (S, B); jitter is (S, draws, B, a), noise (S, B, a)."""
    q = _value(agent, z, a)
    norms = [_slope(agent, z, a + JITTER * n).norm(dim=-1) for n in jitter.unbind(1)]
    found = {
        "gradient": torch.stack(norms).mean(0),
        "ascent": (_value(agent, z, _walk(agent, z, a, 100, 0.01)) - q).square(),
        "descent": q - _value(agent, z, _walk(agent, z, a, 10, -0.02, ball=math.inf)),
        "random": (_value(agent, z, (a + NOISE * noise).clamp(-1.0, 1.0)) - q).abs(),
        "size": q.abs(),
    }
    for e in BALLS:
        found[f"ascent_{e:g}"] = _value(agent, z, _walk(agent, z, a, 10, e / 4, ball=e)) - q
    return found


def curvature(agent: Any, z: Tensor, action: Tensor) -> Tensor:
    """Return the largest |eigenvalue| of the Hessian of Q1 in the action, (S, B), for latents z (S, B, L).

    Column j is (grad Q(a + h e_j) - grad Q(a - h e_j)) / 2h with h = 0.005, then the matrix is made symmetric: the
    layers' own backward passes need not be differentiable a second time. In float32 the gradient's rounding, about
    1e-6 of it over h, is what limits it.
    """
    (_, rows, size), columns = action.shape, []
    both = torch.cat([z, z], 1)
    for j in range(size):
        offset = torch.zeros(size, device=action.device)
        offset[j] = OFFSET
        slope = _slope(agent, both, torch.cat([action + offset, action - offset], 1)).double()
        columns.append((slope[:, :rows] - slope[:, rows:]) / (2.0 * OFFSET))
    hessian = torch.stack(columns, -1)
    known = hessian.isfinite().all(-1).all(-1)
    hessian = torch.where(known[..., None, None], hessian + hessian.mT, 0.0) / 2.0
    largest = torch.linalg.eigvalsh(hessian).abs().amax(-1)
    return torch.where(known, largest, torch.nan).float()


def _walk(agent: Any, z: Tensor, start: Tensor, steps: int, length: float, ball: float | None = None) -> Tensor:
    """Follow the sign of the gradient from actions (S, B, a); with a ball, stay inside it and inside the box."""
    action = start
    for _ in range(steps):
        action = action + length * _slope(agent, z, action).sign()
        if ball is not None:
            action = action.clamp(start - ball, start + ball).clamp(-1.0, 1.0)
    return action


def _value(agent: Any, z: Tensor, action: Tensor) -> Tensor:
    """Q1, (S, B)."""
    q: Tensor = agent.values(agent.critic, z, action, frozen=True)[:, 0]
    return q


def _slope(agent: Any, z: Tensor, action: Tensor) -> Tensor:
    """Gradient of Q1 in the action, (S, B, a)."""
    with torch.enable_grad():
        leaf = action.detach().requires_grad_()
        (slope,) = torch.autograd.grad(_value(agent, z, leaf).sum(), leaf)
    return slope


def _normals(generators: Sequence[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normals, (S, *shape), each seed from its own generator."""
    return here(np.stack([g.standard_normal(tuple(shape), np.float32) for g in generators]))
