"""Scalar values as histograms: HL-Gauss with a zero prior, as MAD-TD's critics use it (`mad-td` 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dynarep import process


class HLGauss:
    """Scalar values as histograms: the two-sided cut Gaussian of `mad-td` 3.2, with the zero prior.

    Args:
        bins: number of bins; their centres span [low, high].
        sigma: standard deviation of the Gaussian in bin widths.
        prior: factor of the constant logits `prior * p(0)`, always added to the network's output.
    """

    def __init__(self, bins: int, low: float, high: float, sigma: float, prior: float) -> None:
        width = (high - low) / (bins - 1)
        self.low, self.high, self.scale = low, high, sigma * width * math.sqrt(2.0)
        edges = torch.linspace(low - width / 2, high + width / 2, bins + 1, dtype=torch.float64) / self.scale
        self.centres = torch.linspace(low, high, bins, dtype=torch.float64).float().to(process.device())
        self._edges = edges.float().to(process.device())
        self._prior = prior * self.encode(torch.zeros(1, device=process.device()))[0]

    def encode(self, y: Tensor) -> Tensor:
        """Return the probabilities of scalars `y`, shape (*y.shape, bins); values beyond the range are clipped."""
        y = y.clamp(self.low, self.high).unsqueeze(-1) / self.scale
        cdf = torch.erf(self._edges - y)
        return cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Return log-probabilities of a network output (..., bins), prior included."""
        return F.log_softmax(output + self._prior, dim=-1)

    def cross_entropy_slope(self, y: Tensor, output: Tensor) -> Tensor:
        """Return the derivative of the cross-entropy to HL-Gauss(y), its mean over bins, by a network output.

        Args:
            y: scalars (S, B).
            output: (S, E, B, bins), prior not included.

        Returns:
            (S, E, B, bins).
        """
        p = self.encode(y).unsqueeze(1)
        return F.softmax(output + self._prior, dim=-1).sub_(p).div_(output.shape[-1])

    def expect_slope(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return `expect(output)`, (...), and its derivative by the output, (..., bins)."""
        p = F.softmax(output + self._prior, dim=-1)
        value = (p * self.centres).sum(-1)
        return value, (self.centres - value.unsqueeze(-1)).mul_(p)

    def expect(self, output: Tensor) -> Tensor:
        """Return the expected value of a network output (..., bins), prior included, shape (...)."""
        return (F.softmax(output + self._prior, dim=-1) * self.centres).sum(-1)

    def decode(self, log_probabilities: Tensor) -> Tensor:
        """Return the expected value, shape (...)."""
        return (log_probabilities.exp() * self.centres).sum(-1)
