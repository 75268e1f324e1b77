"""What a process that trains is set to before it starts: nothing here changes a number."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc refuses more


def settle() -> None:
    """Compute on one thread, and keep freed memory.

    glibc hands blocks of more than 128 KiB back to the system as soon as they are free. Every intermediate result of a
    block of seeds is one, and the page faults of taking it back cost small networks up to half of their time.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # not in every C library
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
