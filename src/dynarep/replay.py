"""A ring buffer of transitions with a leading seed axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class Replay:
    """Transitions of S seeds in lock-step; the oldest rows are overwritten.

    Args:
        fields: field name -> trailing shape, e.g. ``{"obs": (24,), "reward": ()}``.
        seeds: S.
        capacity: rows per seed.
    """

    def __init__(self, fields: Mapping[str, tuple[int, ...]], seeds: int, capacity: int) -> None:
        self.capacity, self.size, self._next = capacity, 0, 0
        self.data = {name: torch.zeros(seeds, capacity, *shape) for name, shape in fields.items()}
        self._row = torch.arange(seeds)

    def add(self, rows: Mapping[str, np.ndarray | Tensor]) -> None:
        """Append n rows per seed, each field of shape (S, n, ...). Raises ValueError if n exceeds the capacity."""
        n = next(iter(rows.values())).shape[1]
        if n > self.capacity:
            raise ValueError(f"cannot add {n} rows to a buffer of {self.capacity}")
        at = (self._next + torch.arange(n)) % self.capacity
        for name, target in self.data.items():
            target[:, at] = torch.as_tensor(rows[name], dtype=target.dtype)
        self._next = (self._next + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Gather rows: `indices` (S, ...) of int64 below `size` -> each field (S, ..., *shape)."""
        seed = self._row.view(-1, *[1] * (indices.dim() - 1))
        return {name: values[seed, indices] for name, values in self.data.items()}

    def state(self) -> dict[str, Tensor | int]:
        """Return what a checkpoint needs."""
        return {"size": self.size, "next": self._next} | {
            f"data/{k}": v[:, : self.size].clone() for k, v in self.data.items()
        }

    def load(self, state: Mapping[str, Tensor | int]) -> None:
        """Restore `state()`."""
        self.size, self._next = int(state["size"]), int(state["next"])
        for name, target in self.data.items():
            target[:, : self.size] = torch.as_tensor(state[f"data/{name}"])


def draw(generators: Sequence[np.random.Generator], size: int, shape: tuple[int, ...]) -> Tensor:
    """Draw uniform row indices below `size` with replacement, (S, *shape), each seed from its own generator."""
    return torch.from_numpy(np.stack([g.integers(size, size=shape) for g in generators]))
