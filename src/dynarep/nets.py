"""Seed-batched layers: S seeds and E members of one network are trained as one program.

Every parameter has a leading seed axis S and a member axis E (twin critics, ensembles). All parameters of a
network lie in one matrix of S*E rows; the layers read views of it, gradients are accumulated into views of a
second one, and Adam walks over both once. A seed's numbers must not depend on the block it runs in. Four things
see to that, and `tests/test_nets.py` holds them down:

* `torch.baddbmm` gives each batch entry the same bytes whatever the batch size, unless the output has width 1;
  scalar heads are therefore a multiply and a sum (`Spec.sizes` ending in 1).
* Vectorised element-wise kernels treat the last numel % 32 elements with other instructions. Rows of the parameter
  matrix are padded to 64 floats, and batch sizes are multiples of 32 wherever this matters.
* Matrix products round differently where an entry of the batch is not aligned: widths are multiples of 8.
* Sums run over whole contiguous rows of a seed, never across seeds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from dynarep.streams import stream

# PyTorch calls it a possible slowdown when leaves and their gradients are rows of larger matrices. It is the plan here.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

PAD = 64  # floats: four AVX-512 vectors, the widest unrolling in PyTorch's CPU kernels
Activation = Callable[[Tensor], Tensor]
Initialiser = Callable[[np.random.Generator, int, int], np.ndarray]


class _Mish(torch.autograd.Function):
    """x tanh(softplus x), through one exponential instead of three transcendental functions (1/2 to 1/3 the time).

    With e = exp(x) and n = e (e + 2): tanh(log(1 + e)) = n / (n + 2), and the derivative is
    n / (n + 2) + 4 x e (1 + e) / (n + 2)^2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.clamp(max=20.0).exp_()  # beyond 20 both fractions are 1 and 0 in float32
        n = torch.addcmul(2.0 * e, e, e)
        inverse = (n + 2.0).reciprocal_()
        slope = n.mul_(inverse)
        if ctx.needs_input_grad[0]:
            tail = torch.addcmul(e, e, e).mul_(x).mul_(inverse).mul_(inverse)
            ctx.save_for_backward(torch.add(slope, tail, alpha=4.0))
        return x * slope

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        derivative: Tensor = ctx.saved_tensors[0]
        return grads[0] * derivative


def mish(x: Tensor) -> Tensor:
    """Mish activation, x tanh(log(1 + exp x)), same shape as `x`."""
    return _Mish.apply(x)  # type: ignore[no-untyped-call, no-any-return]


def simnorm(x: Tensor, group: int = 8) -> Tensor:
    """Softmax inside consecutive groups of the last axis, temperature 1 (MAD-TD, `mad-td` 3.2: SimNorm)."""
    return log_simnorm(x, group).exp()


def log_simnorm(x: Tensor, group: int = 8) -> Tensor:
    """Logarithm of `simnorm`, the "logit mode" of the model."""
    return F.log_softmax(torch.unflatten(x, -1, (-1, group)), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Spec:
    """Shape of one multi-layer perceptron.

    sizes: input, hidden..., output widths. layer_norm: LayerNorm epsilon after every hidden layer, None for no norm.
    norm_output: LayerNorm after the last layer too. activation: after every hidden layer (after its norm).
    """

    sizes: tuple[int, ...]
    activation: Activation
    layer_norm: float | None = None
    norm_output: bool = False

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return parameter name -> shape, kernels as (in, out)."""
        shapes: dict[str, tuple[int, ...]] = {}
        last = len(self.sizes) - 2
        for i, (fan_in, fan_out) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            shapes[f"{i}.kernel"] = (fan_in, fan_out)
            shapes[f"{i}.bias"] = (fan_out,)
            if self.layer_norm is not None and (i < last or self.norm_output):
                shapes[f"{i}.scale"] = (fan_out,)
                shapes[f"{i}.shift"] = (fan_out,)
        return shapes

    def flops(self, rows: int) -> float:
        """Return the multiply-adds of one forward pass, counted as two operations each."""
        return 2.0 * rows * sum(a * b for a, b in zip(self.sizes[:-1], self.sizes[1:], strict=True))


class Net:
    """S seeds x E members of a network with one or more branches, and the gradient that belongs to them.

    Args:
        name: names the initialisation streams, so networks of the same name start equal in every variant.
        branches: branch name -> Spec. Branches share optimiser and clipping norm, never weights.
        seeds: the block of run seeds, S of them.
        init: kernel initialiser (rng, fan_in, fan_out) -> (fan_in, fan_out); biases start at 0, scales at 1.
        members: E, each with its own initialisation stream.
        head: kernel initialiser of the branches' last layers, if not `init`.
    """

    def __init__(
        self,
        name: str,
        branches: Mapping[str, Spec],
        seeds: Sequence[int],
        init: Initialiser,
        members: int = 1,
        head: Initialiser | None = None,
    ) -> None:
        self.name, self.branches, self.seeds, self.members = name, dict(branches), len(seeds), members
        self._slots: dict[str, tuple[int, tuple[int, ...]]] = {}
        width = 0
        for branch, spec in self.branches.items():
            for parameter, shape in spec.parameters().items():
                self._slots[f"{branch}/{parameter}"] = (width, shape)
                width += math.prod(shape)
        rows, width = self.seeds * members, -(-width // PAD) * PAD
        self.flat = torch.zeros(rows, width)
        self.flat.grad = torch.zeros(rows, width)
        self._bind()
        heads = {f"{branch}/{len(spec.sizes) - 2}.kernel" for branch, spec in self.branches.items()}
        with torch.no_grad():
            for slot, (_, shape) in self._slots.items():
                if slot.endswith("kernel"):
                    make = head if head and slot in heads else init
                    draws = [make(stream(s, "init", name, slot, e), *shape) for s in seeds for e in range(members)]
                    self._views[slot].copy_(torch.from_numpy(np.stack(draws).astype(np.float32)))
                elif slot.endswith("scale"):
                    self._views[slot].fill_(1.0)

    def _bind(self) -> None:
        """Make the leaf views that the layers read, each with its slice of the gradient matrix as `.grad`."""
        assert self.flat.grad is not None
        self._views, self._frozen = {}, {}
        for slot, (start, shape) in self._slots.items():
            columns = slice(start, start + math.prod(shape))
            self._frozen[slot] = torch.unflatten(self.flat[:, columns], 1, shape)
            view = self._frozen[slot].detach().requires_grad_()
            view.grad = torch.unflatten(self.flat.grad[:, columns], 1, shape)
            self._views[slot] = view

    def __call__(self, x: Tensor, branch: str = "", frozen: bool = False) -> Tensor:
        """Apply one branch.

        Args:
            x: (S, B, in), the same rows for every member, or (S, E, B, in), rows of their own.
            branch: which branch.
            frozen: let gradients flow to the input, not to the parameters.

        Returns:
            (S, B, out) for one member, (S, E, B, out) for more.
        """
        spec, views = self.branches[branch], self._frozen if frozen else self._views
        if x.dim() == 3 and self.members > 1:
            x = x.unsqueeze(1).expand(-1, self.members, -1, -1)
        h = x.reshape(self.seeds * self.members, *x.shape[-2:])
        last = len(spec.sizes) - 2
        for i in range(last + 1):
            prefix = f"{branch}/{i}."
            kernel, bias = views[prefix + "kernel"], views[prefix + "bias"].unsqueeze(1)
            if spec.sizes[i + 1] == 1:  # a matrix product of width 1 is not block-invariant
                h = (h * kernel.mT).sum(-1, keepdim=True) + bias
            else:
                h = torch.baddbmm(bias, h, kernel)
            if prefix + "scale" in views:
                h = F.layer_norm(h, h.shape[-1:], eps=spec.layer_norm or 0.0)
                h = torch.addcmul(views[prefix + "shift"].unsqueeze(1), h, views[prefix + "scale"].unsqueeze(1))
            if i < last:
                h = spec.activation(h)
        return h if self.members == 1 else torch.unflatten(h, 0, (self.seeds, self.members))

    def parameter(self, slot: str) -> Tensor:
        """Return one parameter, (S, E, *shape), sharing memory; `slot` is "branch/layer.kind"."""
        return torch.unflatten(self._frozen[slot], 0, (self.seeds, self.members))

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Return slot -> shape for every parameter."""
        return {slot: shape for slot, (_, shape) in self._slots.items()}

    def target(self) -> Net:
        """Return a copy that is never trained: the start of a target network."""
        other = object.__new__(Net)
        other.name, other.branches, other.seeds, other.members = self.name, self.branches, self.seeds, self.members
        other._slots = self._slots
        other.flat = self.flat.clone()
        other._frozen = {
            slot: torch.unflatten(other.flat[:, start : start + math.prod(shape)], 1, shape)
            for slot, (start, shape) in self._slots.items()
        }
        other._views = other._frozen
        return other

    def follow(self, online: Net, rate: float) -> None:
        """Exponential moving average, in place: self <- (1 - rate) self + rate online."""
        self.flat.lerp_(online.flat, rate)


def uniform_fan_in(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
    """Kernel with uniform entries of variance 0.3333 / fan_in (`mad-td` 3.3), shape (fan_in, fan_out)."""
    limit = math.sqrt(0.9999 / fan_in)
    return rng.uniform(-limit, limit, size=(fan_in, fan_out))


def orthogonal(gain: float) -> Initialiser:
    """Return the initialiser of kernels whose shorter side is orthonormal, times `gain`, uniformly distributed.

    The QR decomposition of a Gaussian matrix is uniform (Haar) once R's diagonal is made positive (Mezzadri 2007).
    """

    def init(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
        q, r = np.linalg.qr(rng.standard_normal((max(fan_in, fan_out), min(fan_in, fan_out))))
        q *= gain * np.sign(np.diag(r))
        return q if fan_in >= fan_out else q.T

    return init


def halves(first: Initialiser, second: Initialiser) -> Initialiser:
    """Return the initialiser of two heads in one kernel: `first` draws the first half of the outputs."""

    def init(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
        return np.hstack([draw(rng, fan_in, fan_out // 2) for draw in (first, second)])

    return init


class Scalar:
    """One trained number per seed, with a gradient; each fills a row of its own, padded like a network's."""

    def __init__(self, value: float, seeds: int) -> None:
        self.seeds, self.flat = seeds, torch.full((seeds, PAD), value)
        self.flat.grad = torch.zeros(seeds, PAD)


class Adam:
    """Adam over one network, preceded by clipping of each seed's gradient norm.

    Args:
        net: the network (or numbers); its gradient matrix is consumed and cleared.
        lr: learning rate.
        clip: largest gradient norm of a seed, over all its members and branches; None for no clipping. The gradient
            is scaled by clip / norm only where the norm reaches `clip` (`mad-td` 3.4).
    """

    def __init__(self, net: Net | Scalar, lr: float, clip: float | None = None) -> None:
        self.net, self.lr, self.clip = net, lr, clip
        self._first, self._second = torch.zeros_like(net.flat), torch.zeros_like(net.flat)
        self._steps = torch.zeros(())

    def step(self) -> Tensor:
        """Take one step and return the gradient norm of each seed before clipping, (S,)."""
        grad = self.net.flat.grad
        assert grad is not None
        per_seed = grad.view(self.net.seeds, -1)
        norm: Tensor = torch.linalg.vector_norm(per_seed, dim=1)
        if self.clip is not None:
            per_seed.mul_(torch.where(norm < self.clip, 1.0, self.clip / norm).unsqueeze(1))
        # The functional form: the class costs 1.5 s of imports at its first use and more time per step than the kernel.
        adam(
            [self.net.flat], [grad], [self._first], [self._second], [], [self._steps], fused=True, amsgrad=False,
            beta1=0.9, beta2=0.999, lr=self.lr, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
        grad.zero_()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs: first and second moments and the step count."""
        return {"first": self._first.clone(), "second": self._second.clone(), "steps": self._steps.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        for name, tensor in (("first", self._first), ("second", self._second), ("steps", self._steps)):
            tensor.copy_(state[name])


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
        self.centres = torch.linspace(low, high, bins, dtype=torch.float64).float()
        self._edges = (
            torch.linspace(low - width / 2, high + width / 2, bins + 1, dtype=torch.float64) / self.scale
        ).float()
        self._prior = prior * self.encode(torch.zeros(1))[0]

    def encode(self, y: Tensor) -> Tensor:
        """Return the probabilities of scalars `y`, shape (*y.shape, bins); values beyond the range are clipped."""
        y = y.clamp(self.low, self.high).unsqueeze(-1) / self.scale
        cdf = torch.erf(self._edges - y)
        return cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Return log-probabilities of a network output (..., bins), prior included."""
        return F.log_softmax(output + self._prior, dim=-1)

    def expect(self, output: Tensor) -> Tensor:
        """Return the expected value of a network output (..., bins), prior included, shape (...)."""
        return (F.softmax(output + self._prior, dim=-1) * self.centres).sum(-1)

    def decode(self, log_probabilities: Tensor) -> Tensor:
        """Return the expected value, shape (...)."""
        return (log_probabilities.exp() * self.centres).sum(-1)
