"""Scalar values as two-hot vectors in symlog space, as TD-MPC2's reward and Q-functions use them (`baselines` B.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynarep import process


def symlog(x: Tensor) -> Tensor:
    """Return sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Undo `symlog`."""
    return x.sign() * x.abs().expm1()


class TwoHot:
    """Histograms over `bins` positions from -limit to limit, in symlog of the value."""

    def __init__(self, bins: int, limit: float) -> None:
        self.limit, self.width = limit, 2.0 * limit / (bins - 1)
        self.centres = torch.linspace(-limit, limit, bins, device=process.device())
        self._numbers = torch.arange(bins, device=process.device())

    def encode(self, x: Tensor) -> Tensor:
        """Return the two-hot vectors (*x.shape, bins) of scalars: linear in the distance of symlog(x)."""
        place = (symlog(x).clamp(-self.limit, self.limit) + self.limit) / self.width
        return (1.0 - (place.unsqueeze(-1) - self._numbers).abs()).clamp(min=0.0)

    def decode(self, logits: Tensor) -> Tensor:
        """Return the scalars (...) that logits (..., bins) mean: symexp of the expected position."""
        return symexp((logits.softmax(-1) * self.centres).sum(-1))

    def cross_entropy(self, logits: Tensor, x: Tensor) -> Tensor:
        """Return - sum p log softmax(logits), (...), of logits (..., bins) and scalars that broadcast to (...)."""
        return -(self.encode(x) * F.log_softmax(logits, -1)).sum(-1)
