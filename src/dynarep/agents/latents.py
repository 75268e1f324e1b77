"""Latents that are drawn: independent normal distributions, their divergence, their noise, and returns along rollouts.

Shapes: S seeds, B rows, L dimensions, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynarep.activations import constant
from dynarep.placement import here
from dynarep.replay import normal


class Gaussian(NamedTuple):
    """Independent normal distributions: mean and deviation, (S, B, L) each."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return what standard normal `noise` makes, (S, B, L)."""
        return torch.addcmul(self.mean, self.std, noise)

    def rows(self, rows: slice) -> Gaussian:
        """Return some of the rows."""
        return Gaussian(self.mean[:, rows], self.std[:, rows])


class Noise(NamedTuple):
    """The random numbers of one update of ALM: standard normals but for `invented`.

    Attributes:
        latents: (S, K + 1, B, L) and action (S, B, a): of the step of encoder and model.
        judged: (S, 3, B, L), of z, z' and the model's z' in the step of R and C; `invented` (S, B) of bool, the half of
            the rows that have the model's.
        valued: (S, 2, B, L) and next_action (S, B, a): of the critics' step.
        imagined: (S, K + 1, B, L) and chosen (S, K + 1, B, a): of the actor's.
    """

    latents: Tensor
    action: Tensor
    judged: Tensor
    invented: Tensor
    valued: Tensor
    next_action: Tensor
    imagined: Tensor
    chosen: Tensor

    @classmethod
    def draw(
        cls, generators: Sequence[np.random.Generator], horizon: int, size: int, latent: int, actions: int
    ) -> Noise:
        """Draw what an update of minibatches of `size` rows needs, each seed's from its own generator."""
        k = horizon + 1
        latents = normal(generators, (2 * k + 5, size, latent))
        chosen = normal(generators, (k + 2, size, actions))
        return cls(
            latents=latents[:, :k],
            action=chosen[:, 0],
            judged=latents[:, k : k + 3],
            invented=here(np.stack([g.permutation(size) < size // 2 for g in generators])),
            valued=latents[:, k + 3 : k + 5],
            next_action=chosen[:, 1],
            imagined=latents[:, k + 5 :],
            chosen=chosen[:, 2:],
        )


def gaussian(out: Tensor, limit: float, floor: float, ceiling: float) -> Gaussian:
    """Return the distributions that numbers (S, B, 2 L) stand for: means and deviations, see `_Head`."""
    return Gaussian(*_Head.apply(out, limit, floor, ceiling))  # type: ignore[no-untyped-call]


class _Head(torch.autograd.Function):
    """Numbers (S, B, 2 L) -> mean, limit tanh(raw / limit), and deviation, between floor and ceiling, (S, B, L) each.

    u = ceiling - softplus(ceiling - raw), std = floor + softplus(u - floor). Composed: with g = sigmoid(raw - ceiling)
    and c = exp(ceiling - floor), std = floor + log(1 + c g), and the derivative is c g (1 - g) / (1 + c g).
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, limit: float, floor: float, ceiling: float) -> tuple[Tensor, Tensor]:
        mean, raw = (part.clone(memory_format=torch.contiguous_format) for part in out.chunk(2, -1))  # views are slow
        one = constant(1.0, out.device)
        t = mean.mul_(1.0 / limit).tanh_()
        g = raw.sub_(ceiling).sigmoid_()
        large = torch.add(one, g, alpha=math.exp(ceiling - floor))  # 1 + c g
        ctx.save_for_backward(t, g, large)
        return t * limit, large.log().add_(floor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        t, g, large = ctx.saved_tensors
        one = constant(1.0, t.device)
        by_mean = torch.addcmul(one, t, t, value=-1.0).mul_(grads[0])
        by_raw = (large - 1.0).div_(large).mul_(one - g).mul_(grads[1])
        return torch.cat([by_mean, by_raw], -1), None, None, None


def kl_parts(p: Gaussian, q: Gaussian) -> tuple[Tensor, Tensor]:
    """Return the two parts of KL(p | q) in nats, (S, B) each, summed over dimensions: of the means' distance, the rest.

    (m_p - m_q)^2 / (2 s_q^2), and (r^2 - 1) / 2 - log r with r = s_p / s_q.
    """
    ratio = p.std / q.std
    far = ((p.mean - q.mean) / q.std).square().sum(-1)
    return 0.5 * far, (0.5 * (ratio.square() - 1.0) - ratio.log()).sum(-1)


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """Return KL(p | q) in nats, (S, B)."""
    means, deviations = kl_parts(p, q)
    return means + deviations


def lambda_returns(rewards: Tensor, values: Tensor, discount: float, trace: float) -> Tensor:
    """Return G_t = r_t + gamma [(1 - lambda) V_t+1 + lambda G_t+1], G_K = V_K, of t = 0 .. K - 1: (S, K, B).

    `rewards` are r_0 .. r_K-1 and `values` V_1 .. V_K, (S, K, B) each.
    """
    found, after = [], values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        after = rewards[:, t] + discount * torch.lerp(values[:, t], after, trace)
        found.append(after)
    return torch.stack(found[::-1], 1)
