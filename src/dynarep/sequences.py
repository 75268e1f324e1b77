"""Consecutive rows of a replay, drawn so that they do not cross an episode's end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynarep.placement import moved
from dynarep.replay import Replay

TRIES = 16  # see `draw`
CHUNK = 1 << 16  # rows looked at together


class Sequences:
    """Sequences of `length` consecutive transitions of one replay.

    A row goes on in the next one where that begins with the observation it ended with, to the bit, and where it did not
    terminate. So nobody has to say where episodes end; and a full buffer's newest row does not go on in its oldest.
    What was found is kept, and only rows that are new are looked at; nothing waits for a device.

    Args:
        replay: with fields obs, next_obs and mask; all seeds' rows come in lock-step, and fewer than its capacity from
            one draw to the next.
        length: rows of a sequence.
    """

    def __init__(self, replay: Replay, length: int) -> None:
        self.replay, self.length = replay, length
        seeds = len(replay.sizes)
        self._goes_on = torch.zeros(seeds, replay.capacity, dtype=torch.bool, device=replay.device)
        self._looked, self._following = False, 0  # and where the next row was to go then

    def draw(self, generators: Sequence[np.random.Generator], count: int) -> Tensor:
        """Return the rows where sequences begin, (S, count) of int64 on the replay's device, all alike likely.

        Every place is drawn `TRIES` times and the first that does not cross an end is taken. Where episodes have 8
        steps or more and a sequence 3, all of them cross one in less than one case in 10^9; then, and in episodes that
        are too short for any, a sequence does cross an end.

        Raises:
            ValueError: there are fewer rows than one sequence needs.
        """
        room = self.replay.size - self.length + 1
        if room < 1:
            raise ValueError(f"{self.replay.size} transitions are fewer than the {self.length} of a sequence")
        self._look()
        drawn = np.stack([generator.integers(room, size=(TRIES, count)) for generator in generators])
        starts = moved(torch.from_numpy(drawn), self.replay.device)
        seed = torch.arange(len(drawn), device=starts.device).view(-1, 1, 1)
        whole = torch.ones_like(starts, dtype=torch.bool)
        for t in range(self.length - 1):
            whole &= self._goes_on[seed, starts + t]
        first = whole.to(torch.uint8).argmax(1, keepdim=True)
        return starts.gather(1, first).squeeze(1)

    def _look(self) -> None:
        """Find out of the rows since the last time, and of the one before them, whether they go on in the next."""
        capacity, following = self.replay.capacity, int(self.replay._next[0])
        new = (following - self._following) % capacity if self._looked else self.replay.size
        first = following - new - 1
        for start in range(first, following, CHUNK):
            rows = torch.arange(start, min(start + CHUNK, following), device=self._goes_on.device) % capacity
            left, right = self.replay.data["next_obs"][:, rows], self.replay.data["obs"][:, (rows + 1) % capacity]
            self._goes_on[:, rows] = (left == right).all(-1) & (self.replay.data["mask"][:, rows] > 0)
        self._looked, self._following = True, following
