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

Small networks cost passes over small arrays and calls, not matrix products. The backward pass is written out
(`Net.forward`, `Net.backward`), so that agents can do without autograd's graph. Where a call is to be differentiated by
autograd nevertheless, a network of Mish or ELU is one node of the graph, others are as many as PyTorch makes of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynarep import process
from dynarep.activations import ACTIVE, Activation, Active, mish
from dynarep.initialisers import Initialiser
from dynarep.streams import stream

# PyTorch calls it a possible slowdown when leaves and their gradients are rows of larger matrices. It is the plan here.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

ONE_NODE = (mish, F.elu)  # activations of networks that are one node of autograd's graph
KINDS = ("kernel", "bias", "scale", "shift")
EVEN = 32  # rows evaluated at a time are a multiple of this, see above
PAD = 64  # floats: four AVX-512 vectors, the widest unrolling in PyTorch's CPU kernels
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


@dataclass(frozen=True)
class Spec:
    """Shape of one multi-layer perceptron.

    sizes: input, hidden..., output widths. layer_norm: LayerNorm epsilon after every hidden layer, None for no norm.
    norm_output: LayerNorm after the last layer too. activation: after every hidden layer (after its norm).
    trunk: only the first hidden layer has the norm, and tanh after it in place of the activation, as DrQ-v2's.
    residual: hidden layers after the first come in pairs, x + norm(W norm-and-activation(W x)), as BRO's.
    output_bias: whether the last layer has one.
    """

    sizes: tuple[int, ...]
    activation: Activation
    layer_norm: float | None = None
    norm_output: bool = False
    trunk: bool = False
    residual: bool = False
    output_bias: bool = True

    def opens(self, layer: int) -> bool:
        """Return whether a layer's input is added to the output of the layer after it."""
        return self.residual and layer % 2 == 1 and layer < len(self.sizes) - 2

    def closes(self, layer: int) -> bool:
        """Return whether a layer's output is added to the input of the one before it, in place of an activation."""
        return self.residual and layer > 0 and self.opens(layer - 1)

    def active(self, layer: int) -> Active:
        """Return the activation after a layer, written out."""
        return ACTIVE[torch.tanh if self.trunk and layer == 0 else self.activation]

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return parameter name -> shape, kernels as (in, out)."""
        shapes: dict[str, tuple[int, ...]] = {}
        last = len(self.sizes) - 2
        for i, (fan_in, fan_out) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            shapes[f"{i}.kernel"] = (fan_in, fan_out)
            if i < last or self.output_bias:
                shapes[f"{i}.bias"] = (fan_out,)
            if self.layer_norm is not None and (i == 0 if self.trunk else i < last or self.norm_output):
                shapes[f"{i}.scale"] = (fan_out,)
                shapes[f"{i}.shift"] = (fan_out,)
        return shapes

    def flops(self, rows: int) -> float:
        """Return the multiply-adds of one forward pass, counted as two operations each."""
        return 2.0 * rows * sum(a * b for a, b in zip(self.sizes[:-1], self.sizes[1:], strict=True))


class _Layer(NamedTuple):
    """Views of one layer's parameters, or of their gradients: kernel (S E, in, out), the rest (S E, 1, out)."""

    kernel: Tensor
    bias: Tensor | None
    affine: tuple[Tensor, Tensor] | None  # scale and shift after a norm


class _Kept(NamedTuple):
    """What a backward pass needs of one layer: its input and, if it has them, what norm and activation left."""

    below: Tensor
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None  # its input, its output, mean, 1 / deviation
    active: Tensor | None


class Tape(NamedTuple):
    """What `Net.backward` needs of a forward pass: its layers from first to last, and whose they are."""

    branch: str
    layers: list[_Kept]
    version: int
    dropped: Tensor | None = None

    def last(self, rows: int) -> Tape:
        """Return that of the last `rows` rows of every seed alone, of a network without LayerNorm."""
        kept = [_Kept(k.below[:, -rows:], None, None if k.active is None else k.active[:, -rows:]) for k in self.layers]
        return Tape(self.branch, kept, self.version)


class _Pass(torch.autograd.Function):
    """`Net.forward` as one node of the graph. The gradients of the parameters go straight where Adam finds them."""

    @staticmethod
    def forward(ctx: Any, net: Net, branch: str, dropped: Tensor | None, lead: Tensor, *parts: Tensor) -> Tensor:
        """`lead` is a parameter; it requires a gradient if the parameters are to learn, so that autograd comes back."""
        out, ctx.tape = net.forward(parts, branch, dropped=dropped)
        ctx.net, ctx.shapes = net, [part.shape for part in parts]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        net, (_, _, _, learn, *needed) = ctx.net, ctx.needs_input_grad
        ends = list(accumulate(shape[-1] for shape in ctx.shapes))
        starts = [0, *ends[:-1]]
        wanted = [i for i, need in enumerate(needed) if need]
        columns = slice(starts[wanted[0]], ends[wanted[-1]]) if wanted else None
        grad = net.backward(grads[0], ctx.tape, learn, columns)
        found: list[Tensor | None] = [None] * len(needed)
        for i in wanted:
            first = starts[wanted[0]]
            own = grad[..., starts[i] - first : ends[i] - first]
            found[i] = own.sum(1) if own.dim() > len(ctx.shapes[i]) else own
        return None, None, None, None, *found


def _version(parameters: Tensor) -> int:
    """Return what changes when parameters do; compiled code cannot ask, and runs only what has run otherwise."""
    return 0 if torch.compiler.is_compiling() else parameters._version


def _linear(h: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Return h kernel + bias; a matrix product of width 1 would not be block-invariant."""
    if bias is None:
        return torch.bmm(h, kernel)
    if kernel.shape[-1] == 1:
        return (h * kernel.mT).sum(-1, keepdim=True) + bias
    return torch.baddbmm(bias, h, kernel)


def _times(grad: Tensor, kernel: Tensor) -> Tensor:
    """Return the derivative by a layer's input: grad kernel^T."""
    return grad * kernel.mT if grad.shape[-1] == 1 else torch.bmm(grad, kernel.mT)


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
        self.flat = torch.zeros(rows, width, device=process.device())
        self.flat.grad = torch.zeros_like(self.flat)
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
        self._views, self._frozen, grads = {}, {}, {}
        for slot, (start, shape) in self._slots.items():
            columns = slice(start, start + math.prod(shape))
            self._frozen[slot] = torch.unflatten(self.flat[:, columns], 1, shape)
            view = self._frozen[slot].detach().requires_grad_()
            view.grad = grads[slot] = torch.unflatten(self.flat.grad[:, columns], 1, shape)
            self._views[slot] = view
        self._layers = {branch: self._layers_of(self._frozen, branch) for branch in self.branches}
        self._grads: dict[str, list[list[Tensor]]] = {  # of every layer, flattened to (S E, n)
            branch: [
                [grads[f"{branch}/{i}.{kind}"].flatten(1) for kind in KINDS if f"{branch}/{i}.{kind}" in grads]
                for i in range(len(spec.sizes) - 1)
            ]
            for branch, spec in self.branches.items()
        }

    def __call__(
        self, x: Tensor | Sequence[Tensor], branch: str = "", frozen: bool = False, dropped: Tensor | None = None
    ) -> Tensor:
        """Apply one branch.

        Args:
            x: (S, B, in), the same rows for every member, or (S, E, B, in), rows of their own; or several such
                tensors, whose last axes together make `in`.
            branch: which branch.
            frozen: let gradients flow to the input, not to the parameters.
            dropped: factors (S, E, B, width), or (S, B, width) for one member, on the first layer's linear output.

        Returns:
            (S, B, out) for one member, (S, E, B, out) for more.
        """
        parts = (x,) if isinstance(x, Tensor) else tuple(x)
        lead = (self._frozen if frozen else self._views)[f"{branch}/0.kernel"]
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (lead, *parts))
        activation = self.branches[branch].activation
        if differentiated and activation in ONE_NODE:
            return _Pass.apply(self, branch, dropped, lead, *parts)  # type: ignore[no-untyped-call, no-any-return]
        if differentiated or activation not in ACTIVE:
            assert dropped is None, "dropout is for networks of Mish or ELU"
            return self._by_seed(self._plain(self._rows(parts), branch, frozen))
        return self.forward(parts, branch, keep=False, dropped=dropped)[0]

    def _by_seed(self, h: Tensor) -> Tensor:
        return h if self.members == 1 else torch.unflatten(h, 0, (self.seeds, self.members))

    def _rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Put inputs side by side, and once for every member: (S E, B, in)."""
        if self.members > 1:
            parts = [p.unsqueeze(1).expand(-1, self.members, -1, -1) if p.dim() == 3 else p for p in parts]
        x = parts[0] if len(parts) == 1 else torch.cat(tuple(parts), -1)
        return x.reshape(self.seeds * self.members, *x.shape[-2:])

    def _layers_of(self, views: Mapping[str, Tensor], branch: str) -> list[_Layer]:
        layers = []
        for i in range(len(self.branches[branch].sizes) - 1):
            kernel, bias, scale, shift = (views.get(f"{branch}/{i}.{kind}") for kind in KINDS)
            assert kernel is not None
            affine = None if scale is None or shift is None else (scale.unsqueeze(1), shift.unsqueeze(1))
            layers.append(_Layer(kernel, None if bias is None else bias.unsqueeze(1), affine))
        return layers

    def _plain(self, h: Tensor, branch: str, frozen: bool) -> Tensor:
        """Rows (S E, B, in) -> (S E, B, out), differentiated by autograd."""
        spec = self.branches[branch]
        layers = self._layers[branch] if frozen else self._layers_of(self._views, branch)
        skip = h
        for i, (kernel, bias, affine) in enumerate(layers):
            h = _linear(h, kernel, bias)
            if affine is not None:
                h = F.layer_norm(h, h.shape[-1:], eps=spec.layer_norm or 0.0)
                h = torch.addcmul(affine[1], h, affine[0])
            if spec.closes(i):
                h = h + skip
            elif i < len(layers) - 1:
                h = torch.tanh(h) if spec.trunk and i == 0 else spec.activation(h)
            if not spec.opens(i):
                skip = h
        return h

    def forward(
        self, parts: Sequence[Tensor], branch: str = "", keep: bool = True, dropped: Tensor | None = None
    ) -> tuple[Tensor, Tape]:
        """Apply one branch as a call does, outside of autograd; returns the output and, if kept, what `backward` needs.

        For networks whose activation is written out alone (`activations.ACTIVE`).
        """
        spec, kept = self.branches[branch], []
        layers = self._layers[branch]
        h = skip = self._rows(parts)
        for i, (kernel, bias, affine) in enumerate(layers):
            below, norm, active = h, None, None
            h = _linear(h, kernel, bias)
            if i == 0 and dropped is not None:
                h = h.mul_(dropped.reshape(h.shape))
            if affine is not None:
                norm = (h, *torch.native_layer_norm(h, h.shape[-1:], None, None, spec.layer_norm or 0.0))
                h = torch.addcmul(affine[1], norm[1], affine[0], out=None if keep else norm[1])
            if spec.closes(i):
                h = h.add_(skip)
            elif i < len(layers) - 1:
                h, active = spec.active(i).forward(h, keep)
            if not spec.opens(i):
                skip = h
            if keep:
                kept.append(_Kept(below, norm, active))
        return self._by_seed(h), Tape(branch, kept, _version(self.flat), dropped)

    def backward(self, grad: Tensor, tape: Tape, learn: bool = True, columns: slice | None = None) -> Tensor | None:
        """Go back through `forward`: add to the gradients of the parameters, return that of the input.

        Args:
            grad: the derivative by the output, of the output's shape.
            tape: what `forward` kept.
            learn: whether to add to the gradients of the parameters.
            columns: which columns of the input to differentiate by; None for none.

        Returns:
            (S, B, columns) for one member, (S, E, B, columns) for more.

        Raises:
            RuntimeError: the parameters have changed since.
        """
        found, by_input = self.slopes(grad, tape, learn, columns)
        if learn:
            self.add(found, tape.branch)
        return by_input

    def slopes(
        self, grad: Tensor, tape: Tape, learn: bool = True, columns: slice | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Do what `backward` says, but leave it to the compiler where its code ends: return what `add` is to add then.

        Outside of compiled code gradients are added at once, while they are in the cache, and nothing is left to `add`.
        """
        if _version(self.flat) != tape.version:
            raise RuntimeError(f"{self.name}: the parameters have changed since the forward pass")
        spec = self.branches[tape.branch]
        grad = grad.reshape(-1, *grad.shape[-2:])
        found: list[Tensor] = []
        for i in reversed(range(len(tape.layers))):
            (below, norm, active), (kernel, bias, affine) = tape.layers[i], self._layers[tape.branch][i]
            own: list[Tensor] = []
            if spec.closes(i):
                beside = grad
            if active is not None:
                grad = spec.active(i).back(grad, active)  # the output's layer has none: `grad` is our own by now
            if norm is not None and affine is not None:
                linear, normed, mean, rstd = norm
                own = [(grad * normed).sum(1), grad.sum(1)] if learn else []
                grad = grad * affine[0]
                mask = (True, False, False)
                grad = _layer_norm_backward(grad, linear, grad.shape[-1:], mean, rstd, None, None, mask)[0]
            if i == 0 and tape.dropped is not None:
                grad = grad * tape.dropped.reshape(grad.shape)
            if learn:
                by_kernel = (below * grad).sum(1) if grad.shape[-1] == 1 else torch.bmm(below.mT, grad).flatten(1)
                own = [by_kernel, *([] if bias is None else [grad.sum(1)]), *own]
                if torch.compiler.is_compiling():
                    found = own + found
                else:
                    self._add(own, tape.branch, i)
            if i > 0:
                grad = _times(grad, kernel)
            if spec.opens(i):
                grad = grad.add_(beside)
        if columns is None:
            return found, None
        first = max(0, min(columns.start, columns.stop - 8))  # not one column alone, see `_linear`
        return found, self._by_seed(_times(grad, kernel[:, first : columns.stop])[..., columns.start - first :])

    def add(self, found: Sequence[Tensor], branch: str = "") -> None:
        """Add what `slopes` left over of one branch's gradients."""
        for i, own in enumerate(self._grads[branch]):
            if found:
                self._add(found[: len(own)], branch, i)
                found = found[len(own) :]

    def _add(self, found: Sequence[Tensor], branch: str, layer: int) -> None:
        torch._foreach_add_(self._grads[branch][layer], list(found))

    def parameter(self, slot: str) -> Tensor:
        """Return one parameter, (S, E, *shape), sharing memory; `slot` is "branch/layer.kind"."""
        return torch.unflatten(self._frozen[slot], 0, (self.seeds, self.members))

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Return slot -> shape for every parameter."""
        return {slot: shape for slot, (_, shape) in self._slots.items()}

    def target(self) -> Net:
        """Return a copy that is never trained: the start of a target network."""
        return self._copied(self.flat.clone(), self.members)

    def some(self, members: Tensor) -> Net:
        """Return a copy, never trained, of some members: `members` (S, n) are the numbers of each seed's."""
        rows = self.members * torch.arange(self.seeds, device=members.device).unsqueeze(1) + members
        return self._copied(self.flat.detach()[rows.flatten()], members.shape[1])

    def _copied(self, flat: Tensor, members: int) -> Net:
        other = object.__new__(Net)
        other.name, other.branches, other.seeds, other.members = self.name, self.branches, self.seeds, members
        other._slots = self._slots
        other.flat = flat
        other._frozen = {
            slot: torch.unflatten(other.flat[:, start : start + math.prod(shape)], 1, shape)
            for slot, (start, shape) in self._slots.items()
        }
        other._views = other._frozen
        other._layers = {branch: other._layers_of(other._frozen, branch) for branch in self.branches}
        other._grads = {}
        return other

    def follow(self, online: Net, rate: float) -> None:
        """Exponential moving average, in place: self <- (1 - rate) self + rate online."""
        self.flat.lerp_(online.flat, rate)


def even(x: Tensor) -> Tensor:
    """Pad rows (S, B, d) with zeros to a multiple of `EVEN`."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % EVEN))
