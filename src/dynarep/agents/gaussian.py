"""The ensemble's Gaussian head: log-variance between bounds, the loss with its gradient, bounds that can be learned.

A network's output u stands for the log-variance l, which two softplus hold in (min, max) (`ftfl` 3.2):
l' = max - softplus(max - u), l = min + softplus(l' - min). Composed, they are a scaled sigmoid, which is what is
computed:  exp(l) = exp(min) + exp(max) g,  g = sigmoid(u - max).

Shapes: S seeds, E members, B rows, D outputs; `out` (S, E, B, 2 D) holds means and then u. All in network units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynarep import process
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.nets import Net, Spec
from dynarep.optimisers import Adam

Limits = tuple[float | Tensor, float | Tensor, float | Tensor]


class GaussianHead:
    """Means and variances of D outputs from 2 D numbers.

    Args:
        config: hyperparameters.
        outputs: D.
        seeds: the run seeds, S of them.
    """

    def __init__(self, config: EnsembleConfig, outputs: int, seeds: Sequence[int]) -> None:
        self.outputs = outputs
        high, low = config.log_variance_max, config.log_variance_min
        self._fixed = high, math.exp(high), math.exp(low)
        self._learned = _Bounds(config, outputs, seeds) if config.learnable_bounds else None
        self._weights: Tensor | None = None  # of an output's terms in the loss, (D,), relative to 1 / D
        if config.separate_reward:  # each network's loss is a mean over its own outputs
            weights = [outputs / (outputs - 1)] * (outputs - 1) + [float(outputs)]
            self._weights = torch.tensor(weights, device=process.device())

    def _limits(self) -> Limits:
        """Return max, exp(max), exp(min): numbers, or (S, 1, 1, D) where they are learned."""
        return self._fixed if self._learned is None else self._learned.limits()

    def mean(self, out: Tensor) -> Tensor:
        """Return the means, (S, E, B, D)."""
        return out[..., : self.outputs]

    def variance(self, out: Tensor) -> Tensor:
        """Return the variances, (S, E, B, D)."""
        high, exp_high, exp_low = self._limits()
        return (out[..., self.outputs :] - high).sigmoid() * exp_high + exp_low

    def terms(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms of the loss, mean (m - y)^2 / v and mean log v, each (S,).

        Means over rows and outputs, sums over members. `y` is (S, 1, B, D) or (S, E, B, D).
        """
        variance, count = self.variance(out), y[0, 0].numel()
        return self._sum((self.mean(out) - y).square_() / variance) / count, self._sum(variance.log()) / count

    def slope(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the derivative of the sum of both `terms` by `out`; learned bounds get their gradient.

        The derivatives of an element are 2 (m - y) / v by m and (1 - (m - y)^2 / v) / v * exp(max) g (1 - g) by u.
        Autograd makes twice as many passes over the arrays.
        """
        (high, exp_high, exp_low), count = self._limits(), y[0, 0].numel()
        gate = out[..., self.outputs :].sub(high).sigmoid_()
        precision = gate.mul(exp_high).add_(exp_low).reciprocal_()
        error = out[..., : self.outputs] - y
        weighted = error * precision
        slope = torch.empty_like(out)
        _product_into(slope[..., : self.outputs], weighted, 2.0 / count)
        by_variance = torch.addcmul(precision, precision, weighted.mul_(error), value=-1.0)
        if self._learned is not None:
            self._learned.learn(by_variance if self._weights is None else by_variance * self._weights, gate, count)
        chain = torch.addcmul(gate, gate, gate, value=-1.0).mul_(exp_high / count)
        _product_into(slope[..., self.outputs :], by_variance, chain)
        return slope if self._weights is None else slope.mul_(self._weights.repeat(2))

    def _sum(self, terms: Tensor) -> Tensor:
        return (terms if self._weights is None else terms * self._weights).sum((1, 2, 3))

    def step(self) -> dict[str, Tensor]:
        """Let learned bounds take one step along the gradient that `slope` left; their own term of the loss, (S,)."""
        return {} if self._learned is None else {"bounds_loss": self._learned.step()}

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs: nothing if bounds are fixed."""
        return {} if self._learned is None else self._learned.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        if self._learned is not None:
            self._learned.load(state)


def _product_into(part: Tensor, a: Tensor, b: Tensor | float) -> None:
    """Write a b into a part of a tensor, in one pass; PyTorch's compiler takes no parts as `out`, and needs none."""
    if torch.compiler.is_compiling():
        part.copy_(a * b)
    else:
        torch.mul(a, b, out=part)


class _Bounds:
    """Learned limits of the log-variance, one pair per output, shared by the members, as in original MBPO (quirk Q2).

    The loss gains  penalty (sum max - sum min).  They are the kernel of a network that is never called: row 0 the
    maxima, row 1 the minima.
    """

    def __init__(self, config: EnsembleConfig, outputs: int, seeds: Sequence[int]) -> None:
        self.penalty, self.outputs = config.bounds_penalty, outputs
        start = np.array([[config.log_variance_max], [config.log_variance_min]])
        spec = Spec((2, outputs), F.silu)
        self.net = Net("bounds", {"": spec}, seeds, lambda rng, *shape: np.broadcast_to(start, shape))
        self._adam = Adam(self.net, config.model_lr)

    def limits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return max, exp(max), exp(min), each (S, 1, 1, D)."""
        d, values = self.outputs, self.net.flat[:, None, None]
        powers = values.exp()  # of padded rows: the last elements of an odd number of them would depend on the block
        return values[..., :d], powers[..., :d], powers[..., d : 2 * d]

    def learn(self, by_variance: Tensor, gate: Tensor, count: int) -> None:
        """Set the gradient, from the loss's derivative by v, times `count`, and from g, both (S, E, B, D).

        v changes by exp(max) g^2 with max and by exp(min) with min.
        """
        d, grad, (_, exp_high, exp_low) = self.outputs, self.net.flat.grad, self.limits()
        assert grad is not None
        for s in range(len(grad)):  # one seed at a time: sums that cannot know the block
            grad[s, :d] = (by_variance[s] * gate[s].square()).sum((0, 1)) * exp_high[s, 0, 0] / count + self.penalty
            grad[s, d : 2 * d] = by_variance[s].sum((0, 1)) * exp_low[s, 0, 0] / count - self.penalty

    def step(self) -> Tensor:
        """Take one Adam step and return penalty (sum max - sum min) before it, (S,)."""
        d = self.outputs
        loss = torch.stack([self.penalty * (row[:d].sum() - row[d : 2 * d].sum()) for row in self.net.flat])
        self._adam.step()
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs."""
        return {"bounds": self.net.flat.clone()} | {f"adam/{k}": v for k, v in self._adam.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        self.net.flat.copy_(state["bounds"])
        self._adam.load({k.removeprefix("adam/"): v for k, v in state.items() if k.startswith("adam/")})
