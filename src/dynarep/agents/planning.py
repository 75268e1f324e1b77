"""MAD-TD's optional sampling planner (`mad-td` 3.11): one action is searched with the model and the online critics.

    mean = pi(z), std = .3
    6 times:  512 candidates mean + std N(0, 1) and the policy's action itself, clipped to [-1, 1]
              value v of each candidate;  the 64 best are elites, with weights softmax(v / .5)
              mean, std = weighted mean and standard deviation of the elites, std clipped to [.05, .3]
    act: one elite of the last iteration, drawn with its weight, while exploring; the weighted mean otherwise (ours)

A cross-entropy method over a single action, as in TD-MPC2 but for three things: the horizon is one step, nothing is
kept from one agent step to the next, and the temperature divides the values where TD-MPC2 multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynarep.configs.mad_td import MadTDConfig
from dynarep.placement import HOST, here, moved


class Plan(NamedTuple):
    """What a search ended with: the elites' weighted mean and one elite drawn by weight, each (S, B, a)."""

    mean: Tensor
    sample: Tensor


def plan(
    policy_action: Tensor,
    value: Callable[[Tensor], Tensor],
    config: MadTDConfig,
    generators: Sequence[np.random.Generator],
) -> Plan:
    """Search for one action in each of B states per seed.

    Args:
        policy_action: pi(z), (S, B, a).
        value: candidate actions (S, B, N, a) -> their values (S, B, N).
        config: the fields `plan_*`.
        generators: one per seed. All B states of a seed get the same draws, so that none depends on its place.
    """
    c, (_, states, size) = config, policy_action.shape
    shape = (c.plan_iterations, c.plan_samples, size)
    noise = here(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))
    mean, std = policy_action, torch.full_like(policy_action, c.plan_std_max)
    for i in range(c.plan_iterations):
        drawn = mean.unsqueeze(2) + std.unsqueeze(2) * noise[:, None, i]
        candidates = torch.cat([policy_action.unsqueeze(2), drawn], 2).clamp(-1.0, 1.0)
        best, index = value(candidates).topk(c.plan_elites, -1)
        weights = (best / c.plan_temperature).softmax(-1)
        # (S, B, a, elites): sums over whole contiguous rows, see nets.py on block invariance.
        elites = candidates.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, size)).mT.contiguous()
        share = weights.unsqueeze(2)
        mean = (share * elites).sum(-1)
        std = (share * (elites - mean.unsqueeze(-1)).square()).sum(-1).sqrt().clamp(c.plan_std_min, c.plan_std_max)
    u = torch.tensor([[g.random()] * states for g in generators])
    sums = moved(weights, HOST).cumsum(-1)  # whose order a GPU does not promise; the action goes there next anyway
    chosen = moved((sums < u.unsqueeze(-1)).sum(-1).clamp(max=c.plan_elites - 1), elites.device)
    return Plan(mean, elites.gather(-1, chosen[..., None, None].expand(-1, -1, size, 1)).squeeze(-1))
