"""What a process that trains is set to before it starts, and what its manifests say of that.

The defaults change no number. A device, compiled updates or other kernels do change last bits: runs that were made
differently do not belong into one figure, and the audit looks for such mixtures.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from dynarep import mkl
from dynarep.errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc refuses more
EAGER = "Pass --no-compiled to train without compiling, or write 'compiled: false' into the tier's file."

_state: dict[str, Any] = {"device": "cpu", "compiled": False}
F = TypeVar("F", bound=Callable[..., Any])


def settle(device: str = "cpu", compiled: bool = False, kept: Path | None = None) -> None:
    """Compute on one thread, on that device, with full float32 products, and keep freed memory.

    glibc hands blocks of more than 128 KiB back to the system as soon as they are free. Every intermediate result of a
    block of seeds is one, and the page faults of taking it back cost small networks up to half of their time.

    Args:
        device: where tensors live, as PyTorch names it.
        compiled: whether `fused` compiles.
        kept: the folder of compiled code, which other processes may share; None for PyTorch's own.

    Raises:
        UserError: no such device here; or compiled, and there is no compiler that works.
    """
    if kept is not None:  # before PyTorch's compiler is imported: it looks once
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")  # torch.use_deterministic_algorithms imports the compiler, for seconds
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # 1 to 3 % of the time
    torch.set_float32_matmul_precision("highest")  # no TF32
    from dynarep import placement  # which asks this module where to put things

    _state.update(device=str(placement.check(device)), compiled=False)
    if compiled:
        _prepare_to_compile()
        _state.update(compiled=True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # not in every C library
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def device() -> torch.device:
    """Return where this process computes."""
    return torch.device(_state["device"])


def describe() -> dict[str, str | int | bool]:
    """Return what decides last bits besides code and packages, as this process is now: the manifest's "machine"."""
    return {
        "device": str(_state["device"]),
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "mkl": mkl.path(),
        "compiled": bool(_state["compiled"]),
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def fused(function: F) -> F:
    """Return a function, compiled as one piece and for fixed shapes if this process compiles."""
    if not _state["compiled"]:
        return function
    return cast(F, torch.compile(function, dynamic=False, fullgraph=True))


def _prepare_to_compile() -> None:
    """Set PyTorch's compiler up and try it; UserError if it does not find or cannot use the one for C++."""
    import torch._dynamo
    from torch._inductor import config, cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError(f"compiled updates need a C++ compiler, and none was found ($CXX, or g++). {EAGER}") from None
    torch.use_deterministic_algorithms(True)  # tells the compiler too
    config.compile_threads = 1  # in this process: no helpers that outlive it
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of going on without compiling
    torch._dynamo.reset()  # what an earlier job of this process compiled for its shapes
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device()))
    except Exception as error:  # whatever is missing: headers of Python, a folder to write to
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"compiled updates: PyTorch's compiler does not work here: {said[0]:.200} {EAGER}") from None
