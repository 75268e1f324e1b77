"""A device that is none: tensors say that they lie on it, compute on the host, and refuse what a real one would.

    with pretend() as device:      the process computes on `device`
        ...                        an operation that mixes both kinds of tensor fails where it is called
        device.reads               operations that waited for numbers to come back to the host, in order

Numbers are those of the host, to the bit. So a whole run can be compared with one on the host: placement may change
nothing. Refused are: tensors of both places in one operation, other than copies from one to the other (PyTorch lets
numbers without dimensions pass, and copies indices; both are constants of a graph or hidden copies on a GPU); and what
raises on a GPU when algorithms must be deterministic.

The device is called "lazy": one of PyTorch's names that nothing here implements, and whose backward passes run in the
calling thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from dynarep import process

NAME = "lazy"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
UNSTEADY = {aten.cumsum, aten.histc, aten.put_, aten.median, aten.kthvalue, aten.bincount}


class Far(torch.Tensor):
    """A tensor on the device; `own` holds its numbers."""

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> "Far":
        layout = {"strides": own.stride(), "storage_offset": own.storage_offset(), "dtype": own.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, own.size(), device=torch.device(NAME), **layout)

    def __init__(self, own: torch.Tensor) -> None:
        self.own = own

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function}: called outside of `pretend`")

    def tolist(self):
        return self.cpu().tolist()


class Device(TorchDispatchMode):
    """What operations do while the device is there."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        far: dict[int, Far] = {}
        near: list[torch.Tensor] = []

        def own(value):
            if isinstance(value, Far):
                far[id(value.own)] = value
                return value.own
            if isinstance(value, torch.Tensor):
                near.append(value)
            if isinstance(value, torch.device) and value.type == NAME:
                return torch.device("cpu")
            return value

        kwargs = kwargs or {}
        args_here, kwargs_here = tree_map(own, args), tree_map(own, kwargs)
        if function in COPIES:
            wanted = kwargs.get("device") or (args[0].device if function is aten.copy_.default else None)
            if far and wanted is not None and wanted.type == "cpu":
                self.reads.append(str(function))
        else:
            if far and near:
                raise AssertionError(f"{function}: mixes tensors on the device with some on the host")
            self._judge(function, args, bool(far))
        found = function(*args_here, **kwargs_here)
        if function is aten._local_scalar_dense.default:
            return found
        target = kwargs.get("device")
        there = torch.device(target).type == NAME if target is not None else bool(far)
        if function is aten.copy_.default:
            return args[0]

        def placed(value):
            if not isinstance(value, torch.Tensor):
                return value
            known = far.get(id(value))  # what was changed in place
            return known if known is not None else Far(value) if there else value

        return tree_map(placed, found)

    def _judge(self, function, args, far: bool) -> None:
        masks = [x for x in (args[1] if function is aten.index.Tensor else ()) if x is not None]
        if far and (function in READS or any(mask.dtype == torch.bool for mask in masks)):
            self.reads.append(str(function))
        if far and function.overloadpacket in UNSTEADY and args[0].dtype.is_floating_point:
            raise AssertionError(f"{function}: is not deterministic on a GPU")


@contextmanager
def pretend() -> Iterator[Device]:
    """Let this process compute on the device within the context."""
    before, lifted, quantile = process._state["device"], torch._C._only_lift_cpu_tensors(), torch.quantile

    def whole(values, *args, **kwargs):  # its parts change shapes in place, which a tensor like ours cannot follow
        return (
            Far(quantile(values.own, *args, **kwargs)) if isinstance(values, Far) else quantile(values, *args, **kwargs)
        )

    torch._C._set_only_lift_cpu_tensors(True)  # let the mode see how lists become tensors on a device
    process._state["device"], torch.quantile = NAME, whole
    try:
        with Device() as device:
            yield device
    finally:
        process._state["device"], torch.quantile = before, quantile
        torch._C._set_only_lift_cpu_tensors(lifted)


def fetched(value):
    """Return nested containers with every tensor on the host; call it within `pretend`."""
    return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, value)
