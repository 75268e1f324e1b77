"""What a process that trains is set to before it starts, and what its manifests say of that.

The defaults change no number. A device, or compiled updates, do change last bits: runs that were made differently do
not belong into one figure, and the audit looks for such mixtures.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc refuses more

_state: dict[str, Any] = {"device": "cpu", "compiled": False}
F = TypeVar("F", bound=Callable[..., Any])


def settle(device: str = "cpu", compiled: bool = False) -> None:
    """Compute on one thread, on that device, and keep freed memory.

    glibc hands blocks of more than 128 KiB back to the system as soon as they are free. Every intermediate result of a
    block of seeds is one, and the page faults of taking it back cost small networks up to half of their time.

    Args:
        device: where tensors live, as PyTorch names it.
        compiled: whether `fused` compiles.
    """
    _state.update(device=device, compiled=compiled)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # not in every C library
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def device() -> torch.device:
    """Return where this process computes."""
    return torch.device(_state["device"])


def fused(function: F) -> F:
    """Return a function that updates tensors in place, compiled for fixed shapes if this process compiles."""
    if not _state["compiled"]:
        return function
    return cast(F, torch.compile(function, dynamic=False))
