"""When an imagined state ends its episode: the analytic rules of the STFL code (`ftfl` 3.3).

They are asked about synthetic next observations, where no simulator can be. z = obs[0] and angle = obs[1] in these
observations, in every version of the Gymnasium tasks. DMC tasks, HalfCheetah and whatever is not listed never end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Rule = Callable[[Tensor], Tensor]  # observations (..., o) -> (...) of bool


def never(obs: Tensor) -> Tensor:
    """No state ends the episode."""
    return torch.zeros(obs.shape[:-1], dtype=torch.bool, device=obs.device)


def _hopper(obs: Tensor) -> Tensor:
    # The reference means |x| < 100 and writes |x < 100|, which bounds the state from above alone.
    return ~(_hops(obs) & (obs[..., 1:] < 100).all(-1))


def _hopper_as_meant(obs: Tensor) -> Tensor:
    return ~(_hops(obs) & (obs[..., 1:].abs() < 100).all(-1))


def _hops(obs: Tensor) -> Tensor:
    z, angle = obs[..., 0], obs[..., 1]
    return z.isfinite() & (z > 0.7) & (angle.abs() < 0.2)


def _walker(obs: Tensor) -> Tensor:
    z, angle = obs[..., 0], obs[..., 1]
    return ~((z > 0.8) & (z < 2.0) & (angle > -1.0) & (angle < 1.0))


def _ant(obs: Tensor) -> Tensor:
    z = obs[..., 0]
    return ~(obs.isfinite().all(-1) & (z >= 0.2) & (z <= 1.0))


def _humanoid(obs: Tensor) -> Tensor:
    z = obs[..., 0]
    return (z < 1.0) | (z > 2.0)


def _pendulum(obs: Tensor) -> Tensor:
    return ~obs.isfinite().all(-1) | (obs[..., 1].abs() > 0.2)


# Quirk Q9: the reference looks for the pendulum's rule under a misspelt name, finds none, and never ends.
REFERENCE: Mapping[str, Rule] = {"Hopper": _hopper, "Walker2d": _walker, "Ant": _ant, "Humanoid": _humanoid}
INTENDED: Mapping[str, Rule] = {**REFERENCE, "Hopper": _hopper_as_meant, "InvertedPendulum": _pendulum}


def termination(task: str, rules: Literal["reference", "intended"] = "reference") -> Rule:
    """Return the rule of a task, e.g. ``Hopper-v5``; `rules` as in `MBPOConfig.terminations`."""
    table = REFERENCE if rules == "reference" else INTENDED
    return table.get(task.split("-v")[0], never)
