"""Activations: for autograd, and written out as a value and a derivative for networks that do without its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
_constants: dict[tuple[float, torch.device], Tensor] = {}
_threshold_backward = torch.ops.aten.threshold_backward.grad_input


def constant(value: float, device: torch.device) -> Tensor:
    """Return a number as a tensor without dimensions on a device; a plain number would be converted at every use."""
    if torch.compiler.is_compiling():
        return torch.full((), value, device=device)
    key = value, device
    if key not in _constants:
        _constants[key] = torch.full((), value, device=device)
    return _constants[key]


def mish(x: Tensor) -> Tensor:
    """Mish activation, x tanh(log(1 + exp x)), same shape as `x`; differentiable as often as one likes."""
    s = x.sigmoid()
    q = s * (2.0 - s)
    return x * (q / (2.0 - q))


def simnorm(x: Tensor, group: int = 8) -> Tensor:
    """Softmax inside consecutive groups of the last axis, temperature 1 (MAD-TD, `mad-td` 3.2: SimNorm)."""
    return F.softmax(torch.unflatten(x, -1, (-1, group)), dim=-1).flatten(-2)


def log_simnorm(x: Tensor, group: int = 8) -> Tensor:
    """Logarithm of `simnorm`, the "logit mode" of the model."""
    return F.log_softmax(torch.unflatten(x, -1, (-1, group)), dim=-1).flatten(-2)


def _mish_(x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return Mish of `x`, which is overwritten, and its derivative if that is to be kept.

    One transcendental function instead of three. With s = sigmoid(x) and q = s (2 - s):
    t = tanh(log(1 + exp x)) = q / (2 - q), y = x t, and the derivative is t + s (x - t y).
    """
    one, two = constant(1.0, x.device), constant(2.0, x.device)
    s = x.sigmoid()
    q = torch.lerp(s, one, s)  # s + s (1 - s)
    if not keep:
        return q.div_(torch.sub(two, q, out=s)).mul_(x), None
    t = q.div_(two - q)
    y = x * t
    return y, t.addcmul_(s, x.addcmul_(t, y, value=-1.0))


def _relu_(x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return ReLU of `x`, which is overwritten, once more if something is to be kept: it is 0 where the slope is."""
    y = x.relu_()
    return y, y if keep else None


def _silu_(x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return SiLU of `x`, which is overwritten, and its derivative if that is to be kept.

    With s = sigmoid(x): y = x s, and the derivative is s + x s (1 - s) = y + s (1 - y). Rounded otherwise than
    PyTorch's own, which is one pass and is taken where the derivative is not wanted.
    """
    if not keep:
        return F.silu(x, inplace=True), None
    s = x.sigmoid()
    y = x.mul_(s)
    return y, torch.lerp(y, constant(1.0, x.device), s, out=s)


def _elu_(x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return ELU of `x`, which is overwritten, and its derivative if that is to be kept.

    The derivative is s = exp(min(x, 0)), and y = max(x, s - 1). PyTorch's own takes exp(x) - 1 in one step, which is
    exact near 0 to the last bit instead of to 1e-7, and costs twice as much.
    """
    s, one = x.clamp(max=0.0).exp_(), constant(1.0, x.device)
    return torch.maximum(x, torch.sub(s, one, out=None if keep else s), out=x), s if keep else None


def _tanh_(x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return tanh of `x`, which is overwritten, and its derivative 1 - tanh(x)^2 if that is to be kept."""
    y = x.tanh_()
    return y, torch.addcmul(constant(1.0, x.device), y, y, value=-1.0) if keep else None


def _times_slope_(grad: Tensor, slope: Tensor) -> Tensor:
    return grad.mul_(slope)


def _where_positive_(grad: Tensor, y: Tensor) -> Tensor:
    _threshold_backward(grad, y, 0.0, grad_input=grad)
    return grad


class Active(NamedTuple):
    """An activation written out: `forward` (x, keep) -> its value and what to keep; `back` (derivative by the value,
    what was kept) -> derivative by x. Both overwrite their first argument.
    """

    forward: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
    back: Callable[[Tensor, Tensor], Tensor]


ACTIVE: dict[Activation, Active] = {
    mish: Active(_mish_, _times_slope_),
    F.silu: Active(_silu_, _times_slope_),
    torch.relu: Active(_relu_, _where_positive_),
    F.elu: Active(_elu_, _times_slope_),
    torch.tanh: Active(_tanh_, _times_slope_),
}
