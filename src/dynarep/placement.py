"""Where tensors lie: networks and batches on the process's device, what is drawn and counted on the host.

    here(array)    host -> device, without waiting for it: every draw of a step goes over once
    host(tensor)   device -> host, which waits for the device: actions for the simulator, numbers for a record
    store(bytes)   where a buffer of that size lies

Random numbers come from NumPy's streams on the host (`dynarep.streams`), so every device gets the same ones. Nothing
between two agent steps' updates waits for the device: no number is read back there.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from dynarep import process
from dynarep.errors import UserError

SHARE = 0.5  # ours: a buffer takes at most this share of the device's free memory, the rest is for networks and batches
HOST = torch.device("cpu")


def here(array: np.ndarray) -> Tensor:
    """Return an array on the process's device; on the host it shares the array's memory.

    The copy need not have arrived yet when this returns. The driver has read pageable memory by then: the array may be
    written to again.
    """
    return moved(torch.from_numpy(array), process.device())


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on another device; one that is there already is returned as it is.

    Nobody waits for a copy to a device. One to the host is complete when this returns.
    """
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device != HOST)


def host(tensor: Tensor) -> np.ndarray:
    """Return a tensor's numbers as an array; of one on the host, its own memory."""
    array: np.ndarray = tensor.cpu().numpy()
    return array


def store(size: float) -> torch.device:
    """Return where a buffer of `size` bytes lies: on the device if at most half of its free memory is needed for it.

    Rows of a buffer on the host go over when they are gathered. The numbers are the same.
    """
    device = process.device()
    return device if device == HOST or size <= SHARE * free(device) else HOST


def free(device: torch.device) -> float:
    """Return a device's free memory in bytes; infinity where PyTorch cannot tell."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float("inf")


def check(name: str) -> torch.device:
    """Return the device of that name, ready to be computed on with the same bytes every time.

    TF32 stays off. cuBLAS wants its workspace fixed before its first use, or its sums may change their order.

    Raises:
        UserError: there is no such device here; the message says what there is.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: is no device. {_there()}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: cpu and cuda are supported, nothing else. {_there()}")
    if device.type == "cpu":
        return HOST
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU or driver was found"
        raise UserError(f"--device {name}: {why}. {_there()}")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are only {torch.cuda.device_count()}. {_there()}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def _there() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))]
    return f"Here there is: {', '.join(names)}. Pass --device with one of them, or leave it out."
