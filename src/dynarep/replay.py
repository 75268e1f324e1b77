"""A ring buffer of transitions with a leading seed axis, and the parts of one that a split keeps from each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dynarep import process
from dynarep.placement import HOST, here, moved, store


class Replay:
    """Transitions of S seeds; the oldest rows are overwritten.

    Real transitions come in lock-step, chosen ones need not. On the host, memory is taken when it is first written: a
    buffer costs what it holds. A device gives all of it at once, and has no more than half of what it has free for it
    (`placement.store`). Row numbers and counts are kept on the host, nobody needs to ask the device for them.

    Args:
        fields: field name -> trailing shape, e.g. ``{"obs": (24,), "reward": ()}``.
        seeds: S.
        capacity: rows per seed.

    Attributes:
        device: where the data lie.
        data: field name -> (S, capacity, *shape).
        sizes: rows that each seed has, (S,) of int64, on the host.
    """

    def __init__(self, fields: Mapping[str, tuple[int, ...]], seeds: int, capacity: int) -> None:
        self.capacity = capacity
        self.device = store(4.0 * seeds * capacity * sum(math.prod(shape) for shape in fields.values()))
        self.data = {name: _zeros((seeds, capacity, *shape), self.device) for name, shape in fields.items()}
        self.sizes, self._next = torch.zeros(seeds, dtype=torch.int64), torch.zeros(seeds, dtype=torch.int64)
        self._row = torch.arange(seeds)

    @property
    def size(self) -> int:
        """The rows that every seed has."""
        return int(self.sizes.min())

    def add(self, rows: Mapping[str, np.ndarray | Tensor], keep: Tensor | None = None) -> None:
        """Append n rows per seed, or those of them that are kept.

        Args:
            rows: each field (S, n, ...).
            keep: (S, n) of bool; its device is waited for.

        Raises:
            ValueError: n exceeds the capacity.
        """
        values = {
            name: moved(torch.as_tensor(rows[name], dtype=target.dtype), self.device)
            for name, target in self.data.items()
        }
        n = next(iter(values.values())).shape[1]
        if n > self.capacity:
            raise ValueError(f"cannot add {n} rows to a buffer of {self.capacity}")
        if keep is None:
            added: Tensor | int = n
            seed = moved(self._row.unsqueeze(1), self.device)
            at = moved((self._next.unsqueeze(1) + torch.arange(n)) % self.capacity, self.device)
            for name, target in self.data.items():
                target[seed, at] = values[name]
        else:
            keep = moved(keep, HOST)
            added = keep.sum(1)
            seed, column = keep.nonzero(as_tuple=True)
            at = (self._next.unsqueeze(1) + keep.cumsum(1) - 1)[seed, column] % self.capacity
            seed, column, at = (moved(places, self.device) for places in (seed, column, at))
            for name, target in self.data.items():
                target[seed, at] = values[name][seed, column]
        self._next = (self._next + added) % self.capacity
        self.sizes = (self.sizes + added).clamp_(max=self.capacity)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Gather rows: `indices` (S, ...) of int64 below the seed's size -> each field (S, ..., *shape)."""
        seed = moved(self._row.view(-1, *[1] * (indices.dim() - 1)), self.device)
        places, wanted = moved(indices, self.device), process.device()
        return {name: moved(values[seed, places], wanted) for name, values in self.data.items()}

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs: the rows that are filled, and where the next one goes."""
        most = int(self.sizes.max())
        rows = {f"data/{name}": values[:, :most].clone() for name, values in self.data.items()}
        return {"sizes": self.sizes.clone(), "next": self._next.clone()} | rows

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        self.sizes, self._next = state["sizes"].clone(), state["next"].clone()
        for name, target in self.data.items():
            rows = state[f"data/{name}"]
            target[:, : rows.shape[1]] = rows


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if device != HOST:
        return torch.zeros(shape, device=device)
    return torch.from_numpy(np.zeros(shape, np.float32))  # the system's untouched pages; torch.zeros would write


class Part:
    """The rows of a replay on one side of a split that is known in advance.

    A row is counted as soon as it is stored; rows have their place in the part, 0 being its oldest.

    Args:
        replay: one that never overwrites a row.
        chosen: of each seed, the row numbers of the whole run that belong to the part, ascending, (n_s,) of int64.

    Raises:
        ValueError: a row number beyond the replay's capacity.
    """

    def __init__(self, replay: Replay, chosen: Sequence[np.ndarray]) -> None:
        if any(len(own) and own[-1] >= replay.capacity for own in chosen):
            raise ValueError(f"a part needs rows that a replay of {replay.capacity} does not keep")
        self.replay, self._chosen = replay, list(chosen)
        self._places = torch.zeros(len(self._chosen), max(map(len, self._chosen)), dtype=torch.int64)
        for line, own in zip(self._places, self._chosen, strict=True):
            line[: len(own)] = torch.from_numpy(own)
        self._row = torch.arange(len(self._chosen))

    @property
    def sizes(self) -> Tensor:
        """The rows of each seed that are stored already, (S,) of int64."""
        stored = zip(self._chosen, self.replay.sizes.tolist(), strict=True)
        return torch.tensor([int(np.searchsorted(own, size)) for own, size in stored])

    @property
    def size(self) -> int:
        """The stored rows that every seed has."""
        return int(self.sizes.min())

    def absolute(self, indices: Tensor) -> Tensor:
        """Return the replay's row numbers, (S, ...), of places in the part, (S, ...) of int64; on the host."""
        return self._places[self._row.view(-1, *[1] * (indices.dim() - 1)), moved(indices, HOST)]

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Gather rows: `indices` (S, ...) of int64 below the seed's size -> each field (S, ..., *shape)."""
        return self.replay.rows(self.absolute(indices))


def draw(generators: Sequence[np.random.Generator], size: int | Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Draw uniform row indices with replacement, (S, *shape) on the host, each seed from its own generator.

    `size` says how many rows there are to choose from, for all seeds alike or for each.
    """
    sizes = [size] * len(generators) if isinstance(size, int) else size
    return torch.from_numpy(np.stack([g.integers(n, size=shape) for g, n in zip(generators, sizes, strict=True)]))


def draw_slices(
    generators: Sequence[np.random.Generator],
    starts: Sequence[Sequence[int]],
    stored: tuple[int, int],
    length: int,
    count: int,
) -> np.ndarray:
    """Draw slices of `length` consecutive agent steps inside finished episodes, all of them alike likely.

    Args:
        generators: one per seed.
        starts: agent steps before each episode of a seed, ascending; its last episode is under way.
        stored: the oldest agent step whose transition is still there, and how many there were in all.
        length: at most as many as there are.
        count: slices.

    Returns:
        The agent steps where they begin, (S, count) of int64. A seed whose finished episodes hold no slice draws from
        the one under way (ours: short tests have no finished one); one that has none there either, its simulation
        having blown up just before, gets its newest steps.
    """
    oldest, done = stored
    drawn = []
    for generator, own in zip(generators, starts, strict=True):
        bounds = np.asarray(own)
        first = np.maximum(bounds[:-1], oldest)
        room = np.maximum(bounds[1:] - first - length + 1, 0)
        if not room.any():
            under_way = max(int(bounds[-1]), oldest)
            first = np.array([min(under_way, done - length)])
            room = np.array([done - length - first[0] + 1])
        ends = np.cumsum(room)
        place = generator.integers(ends[-1], size=count)
        episode = np.searchsorted(ends, place, side="right")
        drawn.append(first[episode] + place - (ends - room)[episode])
    return np.stack(drawn)


def spread(generators: Sequence[np.random.Generator], sizes: Sequence[int], count: int) -> Tensor:
    """Draw row indices, (S, count) on the host, that cover the rows evenly: each as often as any other, or once more.

    For measurements: where rows are few, drawing with replacement would add noise for nothing. `sizes` are at least 1.
    """
    drawn = []
    for generator, size in zip(generators, sizes, strict=True):
        rest = generator.choice(size, count % size, replace=False)
        drawn.append(np.concatenate([np.tile(np.arange(size), count // size), rest]))
    return torch.from_numpy(np.stack(drawn))


def normal(generators: Sequence[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normals, (S, *shape) of float32, each seed from its own generator."""
    drawn = np.empty((len(generators), *shape), np.float32)
    for own, generator in zip(drawn, generators, strict=True):
        generator.standard_normal(dtype=np.float32, out=own)
    return here(drawn)
