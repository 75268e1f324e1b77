"""Adam, for networks and numbers trained for a block of seeds; what a checkpoint keeps of both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dynarep import process
from dynarep.nets import PAD, Net

BETA2 = 0.999  # everywhere


class Scalar:
    """One trained number per seed, with a gradient; each fills a row of its own, padded like a network's."""

    def __init__(self, value: float, seeds: int) -> None:
        self.seeds, self.flat = seeds, torch.full((seeds, PAD), value, device=process.device())
        self.flat.grad = torch.zeros_like(self.flat)


class Adam:
    """Adam over one network, preceded by clipping of each seed's gradient norm.

    Args:
        net: the network (or numbers); its gradient matrix is consumed and cleared.
        lr: learning rate.
        clip: largest gradient norm of a seed, over all its members and branches; None for no clipping. The gradient
            is scaled by clip / norm only where the norm reaches `clip` (`mad-td` 3.4).
        beta1, eps: Adam's.
        decay: decoupled weight decay, of every parameter.
    """

    def __init__(
        self,
        net: Net | Scalar,
        lr: float,
        clip: float | None = None,
        beta1: float = 0.9,
        eps: float = 1e-8,
        decay: float = 0.0,
    ) -> None:
        self.net, self.lr, self.clip, self.beta1, self.eps, self.decay = net, lr, clip, beta1, eps, decay
        self._first, self._second = torch.zeros_like(net.flat), torch.zeros_like(net.flat)
        self._steps = torch.zeros((), device=net.flat.device)

    def norm(self) -> Tensor:
        """Return the norm of each seed's gradient, (S,)."""
        grad = self.net.flat.grad
        assert grad is not None
        norm: Tensor = torch.linalg.vector_norm(grad.view(self.net.seeds, -1), dim=1)
        return norm

    def step(self) -> None:
        """Take one step, clip the gradient before it, clear it after it."""
        flat, grad = self.net.flat, self.net.flat.grad
        assert grad is not None
        if self.clip is not None:
            norm = self.norm()
            # A processor is asked first: mostly all factors are 1. Another device would have to be waited for.
            if not flat.is_cpu or not bool((norm < self.clip).all()):
                factors = torch.where(norm < self.clip, 1.0, self.clip / norm).unsqueeze(1)
                grad.view(self.net.seeds, -1).mul_(factors)
        self._steps += 1
        if self.decay:
            self._step_with_decay(flat, grad)
            return
        # The bare kernel: the class costs 1.5 s of imports at its first use, and per step more time than the kernel.
        torch._fused_adam_(
            [flat], [grad], [self._first], [self._second], [], [self._steps], amsgrad=False,
            beta1=self.beta1, beta2=BETA2, lr=self.lr, weight_decay=0.0, eps=self.eps, maximize=False,
        )  # fmt: skip
        increment_version(flat)  # the kernel leaves that out; see `Net.backward`
        grad.zero_()

    def _step_with_decay(self, weights: Tensor, grad: Tensor) -> None:
        """Take a step with decoupled weight decay, which joins Adam's direction before that is subtracted.

        Multiplying the weights by 1 - lr decay, as usual, is three times too strong in float32 for small rates.
        """
        steps = self._steps.double()  # of powers near 1, in float32, little would be left
        self._first.lerp_(grad, 1.0 - self.beta1)
        self._second.mul_(BETA2).addcmul_(grad, grad, value=1.0 - BETA2)
        scale = torch.sqrt(self._second, out=grad).div_((1.0 - BETA2**steps).sqrt()).add_(self.eps)
        direction = torch.div(self._first, scale, out=grad).div_(1.0 - self.beta1**steps)
        weights.sub_(direction.add_(weights, alpha=self.decay), alpha=self.lr)
        grad.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs: first and second moments and the step count."""
        return {"first": self._first.clone(), "second": self._second.clone(), "steps": self._steps.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        for name, tensor in (("first", self._first), ("second", self._second), ("steps", self._steps)):
            tensor.copy_(state[name])


def saved(parts: Mapping[str, Net | Scalar], optimisers: Mapping[str, Adam]) -> dict[str, Tensor]:
    """Return everything that learning changes in these networks and numbers and in their optimisers, copied."""
    state = {name: part.flat.detach().clone() for name, part in parts.items()}
    for name, optimiser in optimisers.items():
        state |= {f"adam/{name}/{key}": value for key, value in optimiser.state().items()}
    return state


@torch.no_grad()
def restore(state: Mapping[str, Tensor], parts: Mapping[str, Net | Scalar], optimisers: Mapping[str, Adam]) -> None:
    """Undo what has happened since `saved`, in place."""
    for name, part in parts.items():
        part.flat.copy_(state[name])
    for name, optimiser in optimisers.items():
        prefix = f"adam/{name}/"
        optimiser.load({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
