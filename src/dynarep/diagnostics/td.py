"""How critic and model generalise from trained to held-out transitions and to the policy's own actions (`mad-td` 4.2).

    y  = r + gamma min_j Qbar_j(E(o'), pi(E(o')))
    L2 = mean m (Q1(E(o), a) - y)^2 + mean m (Q2(E(o), a) - y)^2                                            `td_error`
    on training rows, on held-out ones (validation), on true outcomes of a = pi(E(o)) at the latter   `generalisation`

Targets are the agent's own. So an error says how well the critic agrees with its backup, not whether it is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def td_error(agent: Any, z: Tensor, action: Tensor, reward: Tensor, next_z: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Critic error on given transitions against the agent's own targets (`mad-td` 4.2), each (S,).

    Args:
        agent: a MadTD.
        z, action, reward, next_z, mask: (S, B, L), (S, B, a), (S, B), (S, B, L), (S, B); real rows only.

    Returns:
        l2: the reference's `l2_q_loss`, mean m (Q1 - y)^2 + mean m (Q2 - y)^2; rms: its square root per critic and
        unmasked row, in reward units, comparable between batches; ce: the cross-entropy that is trained; q: mean value
        of the smaller critic, in reward units.
    """
    y = agent.td_target(reward, next_z)
    log_q = agent.q_log(agent.critic, z, action)
    q = agent.histogram.decode(log_q)
    square = mask.unsqueeze(1) * (q - y.unsqueeze(1)).square()
    rows = mask.sum(-1).clamp(min=1.0)
    return {
        "l2": square.mean(-1).sum(-1),
        "rms": (square.sum((1, 2)) / (2 * rows)).sqrt(),
        "ce": agent.cross_entropy(y, log_q, mask),
        "q": (mask * q.amin(1)).sum(-1) / rows,
    }


@torch.no_grad()
def generalisation(
    agent: Any, train: Mapping[str, Tensor], validation: Mapping[str, Tensor], on_policy: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Judge critic and model on what they were trained on, on what they were not, and on the policy's own actions.

    Args:
        agent: a MadTD.
        train, validation, on_policy: obs (S, B, o), action (S, B, a), reward (S, B), next_obs (S, B, o), mask (S, B),
            none of it model data; B a multiple of 32, as always where a seed's bytes must not depend on its block.
            `on_policy` are the states of `validation` with the policy's action, true outcome and the stored mask.

    Returns:
        Each (S,), SET being train, validation or on_policy: td_l2/SET, td_rms/SET, td_ce/SET and q/SET, see `td_error`;
        td_rms/on_over_validation, their ratio (claim C1; NaN for a critic without error). Of an agent with a model
        also, SET being validation or on_policy: model_reward_rms/SET, root mean square error of the predicted reward,
        and its on_over_validation; model_latent_ce/SET, the cross-entropy that trains the latent (L_z of `mad-td` 3.6).
        Means over unmasked rows.
    """
    found: dict[str, Tensor] = {}
    for name, rows in (("train", train), ("validation", validation), ("on_policy", on_policy)):
        z, next_z = agent.encode(rows["obs"]), agent.encode(rows["next_obs"])
        error = td_error(agent, z, rows["action"], rows["reward"], next_z, rows["mask"])
        found |= {f"td_{kind}/{name}": error[kind] for kind in ("l2", "rms", "ce")}
        found[f"q/{name}"] = error["q"]
        if name != "train" and not agent.config.model_free:
            reward_rms, latent_ce = _model_error(agent, z, next_z, rows)
            found |= {f"model_reward_rms/{name}": reward_rms, f"model_latent_ce/{name}": latent_ce}
    for kind in ("td_rms", "model_reward_rms"):
        if f"{kind}/on_policy" in found:
            found[f"{kind}/on_over_validation"] = found[f"{kind}/on_policy"] / found[f"{kind}/validation"]
    return found


def _model_error(agent: Any, z: Tensor, next_z: Tensor, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Root mean square error of the reward, and cross-entropy of the next latent per entry, each (S,)."""
    log_next, reward = agent.imagine(z, rows["action"])
    smoothing, mask = agent.config.label_smoothing, rows["mask"]
    consistent = (1.0 - smoothing) * next_z + smoothing / agent.config.simnorm_group
    count = mask.sum(-1).clamp(min=1.0)
    squares = (mask * (rows["reward"] - reward).square()).sum(-1)
    return (squares / count).sqrt(), -(mask * (consistent * log_next).mean(-1)).sum(-1) / count
