"""The Gaussian policy squashed by tanh that SAC and BRO share: samples, densities, and the derivatives written out.

a = tanh(u), u = mean + std * noise, log std = -10 + 6 (1 + tanh(raw)), which lies in [-10, 2].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dynarep.activations import constant

LOG_STD_MIDDLE, LOG_STD_SLOPE = -4.0, 6.0  # [code] of SAC and BRO: between -10 and 2


class Choice(NamedTuple):
    """Sampled actions (S, B, a), log pi(a|s) (S, B), and what the actor's backward pass needs beside."""

    action: Tensor
    log_prob: Tensor
    deviation: Tensor  # std * noise
    gate: Tensor  # tanh(raw)


def log_std(gate: Tensor) -> Tensor:
    """Return the log std, of tanh(raw)."""
    return torch.add(constant(LOG_STD_MIDDLE, gate.device), gate, alpha=LOG_STD_SLOPE)


def choose(out: Tensor, noise: Tensor) -> Choice:
    """Return what the policy's `out`, (S, B, 2 a), and standard normal `noise`, (S, B, a), choose.

    With c = log(e^u + e^-u), which is finite where tanh rounds to 1: log(1 - tanh(u)^2) = 2 (log 2 - c). So log pi
    is the sum over actions of  2 (c - log std / 2 - noise^2 / 4)  and of the constant -(log(2 pi) / 2 + 2 log 2).
    """
    mean, raw = out.chunk(2, -1)
    gate = raw.contiguous().tanh()  # of a view it would cost six times as much
    log_deviation = log_std(gate)
    deviation = log_deviation.exp() * noise
    u = mean + deviation
    half = torch.logaddexp(u, -u).sub(log_deviation, alpha=0.5).addcmul(noise, noise, value=-0.25).sum(-1)
    shared = -noise.shape[-1] * (0.5 * math.log(2.0 * math.pi) + 2.0 * math.log(2.0))
    return Choice(u.tanh(), half.mul(2.0).add_(shared), deviation, gate)


def policy_slope(chosen: Choice, by_action: Tensor, alpha: Tensor) -> Tensor:
    """Return the derivative of  mean_b alpha log pi(a|s) + L(a)  by the policy's output, (S, B, 2 a).

    `by_action` is that of L by a, (S, B, a), overwritten; alpha (S,). log pi grows by 2 a with u, and by -1 with log
    std.
    """
    weight = (alpha / by_action.shape[1]).view(-1, 1, 1)
    by_u = by_action.mul_(one_less_square(chosen.action)).addcmul_(weight, chosen.action, value=2.0)
    by_log_std = torch.addcmul(-weight, by_u, chosen.deviation)
    return torch.cat([by_u, by_log_std.mul_(one_less_square(chosen.gate)).mul_(LOG_STD_SLOPE)], -1)


def one_less_square(x: Tensor) -> Tensor:
    """Return 1 - x^2."""
    return torch.addcmul(constant(1.0, x.device), x, x, value=-1.0)
