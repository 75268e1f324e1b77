"""Which kernels MKL, the library of PyTorch's matrix products on CPUs, takes: on AMD processors the slow ones, unless.

MKL looks at a processor's instructions only if a function of its own says that Intel made it. A function of that name
that was loaded before PyTorch is found first; ours (`_mkl.c`) says yes to every processor. Intel's own see no
difference, and other libraries do not ask. Last bits change, so manifests say what MKL really does, not what was tried.

    DYNAREP_MKL=own    leaves the choice to MKL
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path

VARIABLE, OWN = "DYNAREP_MKL", "own"
INTEL_PATH, OWN_CHOICE, NO_MKL = "intel path", "own choice", "none"


def library() -> Path | None:
    """Return what was built at set-up from `_mkl.c`; None where no compiler was there."""
    return next((path for path in Path(__file__).parent.glob("_mkl.*.so")), None)


def prefer() -> None:
    """Have MKL look at the instructions of any processor, if it was not started yet and nobody forbids it."""
    found = library()
    if found is None or os.environ.get(VARIABLE) == OWN:
        return
    if "torch" in sys.modules and path() == OWN_CHOICE:
        warnings.warn(
            "PyTorch was imported before dynarep, so MKL keeps its slower kernels for this processor, and runs will "
            f"say so. Import dynarep first, or set {VARIABLE}={OWN}.",
            stacklevel=3,
        )
        return
    try:
        ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    except OSError:  # built for another machine: as if it were not there
        return


def path() -> str:
    """Return what MKL does in this process, asked of itself; the first call imports PyTorch and fixes it.

    Its number for the kernels is 0 for those of any processor, or stands for instructions that Intel named.
    """
    import torch

    name = "libtorch_cpu.so" if sys.platform == "linux" else "libtorch_cpu.dylib"
    try:
        chosen: int = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).mkl_serv_cpu_detect()
    except (OSError, AttributeError):
        return NO_MKL
    return INTEL_PATH if chosen > 0 else OWN_CHOICE
