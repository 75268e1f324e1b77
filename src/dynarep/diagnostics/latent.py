"""What MAD-TD's reference logs of a minibatch: losses of the model, the latent space, critic and actor (`mad-td` 4.4).

    z = E(o), z* = E(o'), a* = pi(z*), and z', r' = M(z, a) of the stored action                           `model_terms`
    the critics on the minibatch as they train on it, its last rows replaced by model data           `critic_statistics`
    pi(z) against the stored actions                                                                  `actor_statistics`

The reference logs each part before that part's own step, but after the steps of the parts before it. Here all are told
at the agent's current parameters, and nothing is trained. Means are over rows, each weighted with its mask where "m"
says so, and divide by all rows. All deviations are population ones. Names are the reference's, grouped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynarep.diagnostics.td import td_error

Batch = Mapping[str, Tensor]


def latent_report(agent: Any, batch: Batch) -> dict[str, Tensor]:
    """Return everything that the reference logs of one minibatch, each (S,).

    Args:
        agent: a MadTD, left as it is.
        batch: obs (S, B, o), action (S, B, a), reward (S, B), next_obs (S, B, o), mask (S, B); a minibatch as in
            training, that is of `agent.config.batch_size` rows.

    Returns:
        The numbers of `model_terms` (none for the model-free agent), `critic_statistics` and `actor_statistics`.

    Raises:
        ValueError: the batch has another number of rows, and some would have to become model data.
    """
    model = {} if agent.config.model_free else model_terms(agent, batch)
    return model | critic_statistics(agent, batch) | actor_statistics(agent, batch)


@torch.no_grad()
def model_terms(agent: Any, batch: Batch) -> dict[str, Tensor]:
    """Return losses and errors of encoder and model, each (S,).

    Returns:
        model/reward_loss, model_loss, vaml_loss, model_critic_loss: L_r, L_z, L_v, L_Q of `mad-td` 3.6, also where the
        agent does not train on one; model/total_loss: the sum of those that it trains on. Squared distances, mean m:
        model/l2_byol, of z* and z'; model/l2_logits, of the groups' log-softmax of z* (normalised twice, as in the
        reference) and log z'; model/l2_vaml, of both target critics' values of z* and z', taking a*; model/l2_action,
        of a* and pi(z'). model/q_mean: mean of both online critics at (z*, a*). latent/entropy: of each SimNorm group
        of z, at most the log of its size; latent/mean, and latent/std, over rows, then averaged over coordinates.
    """
    c, mask, reward = agent.config, batch["mask"], batch["reward"]
    z, next_z = agent.encode(batch["obs"]), agent.encode(batch["next_obs"])
    next_a = agent.policy(next_z)
    log_next, imagined_reward = agent.imagine(z, batch["action"])
    imagined = log_next.exp()

    target_p = agent.q_log(agent.target, next_z, next_a).exp()
    target_q = agent.values(agent.target, next_z, next_a)
    y = reward + c.discount * target_q.amin(1)
    consistent = (1.0 - c.label_smoothing) * next_z + c.label_smoothing / c.simnorm_group
    value_aware = (target_p * agent.q_log(agent.target, imagined, next_a)).mean(-1).mean(1)
    found = {
        "model/reward_loss": (mask * (reward - imagined_reward).square()).mean(-1),
        "model/model_loss": -(mask * (consistent * log_next).mean(-1)).mean(-1),
        "model/vaml_loss": -(mask * value_aware).mean(-1),
        "model/model_critic_loss": agent.cross_entropy(y, agent.q_log(agent.critic, z, batch["action"]), mask),
    }
    trained = {"reward_loss", "model_loss"}
    trained |= {"vaml_loss"} if c.value_aware_loss else set()
    trained |= {"model_critic_loss"} if c.critic_shapes_encoder else set()
    found["model/total_loss"] = torch.stack([found[f"model/{name}"] for name in sorted(trained)]).sum(0)

    distances = {
        "byol": (next_z - imagined).square().mean(-1),
        "logits": (_groups(next_z, c.simnorm_group).log_softmax(-1).flatten(-2) - log_next).square().mean(-1),
        "vaml": (target_q - agent.values(agent.target, imagined, next_a)).square().mean(1),
        "action": (next_a - agent.policy(imagined)).square().mean(-1),
    }
    found |= {f"model/l2_{name}": (mask * distance).mean(-1) for name, distance in distances.items()}
    found["model/q_mean"] = agent.values(agent.critic, next_z, next_a).mean(1).mean(-1)
    found["latent/entropy"] = torch.special.entr(_groups(z, c.simnorm_group)).sum(-1).mean(-1).mean(-1)
    found["latent/mean"] = z.mean(-1).mean(-1)
    found["latent/std"] = z.mT.contiguous().std(-1, correction=0).mean(-1)
    return found


@torch.no_grad()
def critic_statistics(agent: Any, batch: Batch) -> dict[str, Tensor]:
    """Return what critics and targets look like on a minibatch as it is trained on, each (S,).

    Returns:
        On the mixed batch: critic/critic_loss, L_c; critic/l2_q_loss, see `td.td_error`; critic/q1, q1_std, q2, q2_std,
        unmasked values; critic/entropy of the predicted histograms; critic/target_diversity, the deviation of y. On the
        stored one: critic/reward, reward_std; and ood_correlation, Pearson's between ||pi(z) - a|| and
        min_j Q_j(z, pi(z)): whether actions far from the data are valued higher. NaN where either does not vary.
        Arms whose model rows need more than the agent itself (a simulator, random draws) keep the stored ones here.

    Raises:
        ValueError: see `latent_report`.
    """
    z, next_z = agent.encode(batch["obs"]), agent.encode(batch["next_obs"])
    action, reward, following = _mixed(agent, z, next_z, batch)
    error = td_error(agent, z, action, reward, following, batch["mask"])
    log_q = agent.q_log(agent.critic, z, action)
    q = agent.histogram.decode(log_q)
    chosen = agent.policy(z)
    distance = torch.linalg.vector_norm(chosen - batch["action"], dim=-1)
    return {
        "critic/critic_loss": error["ce"],
        "critic/l2_q_loss": error["l2"],
        **{f"critic/q{j + 1}": q[:, j].mean(-1) for j in (0, 1)},
        **{f"critic/q{j + 1}_std": q[:, j].std(-1, correction=0) for j in (0, 1)},
        "critic/entropy": -(log_q.exp() * log_q).sum(-1).mean(-1).mean(-1),
        "critic/target_diversity": agent.td_target(reward, following).std(-1, correction=0),
        "critic/reward": batch["reward"].mean(-1),
        "critic/reward_std": batch["reward"].std(-1, correction=0),
        "ood_correlation": correlation(distance, agent.values(agent.critic, z, chosen).amin(1)),
    }


@torch.no_grad()
def actor_statistics(agent: Any, batch: Batch) -> dict[str, Tensor]:
    """Return how far the policy is from the data, each (S,).

    Returns:
        actor/actor_loss, L_pi, minus the mean of the smaller target critic's values at pi(z); actor/action_churn, mean
        (pi(z) - a)^2 against the stored actions; actor/mean_abs_action, mean_action, of pi(z).
    """
    z = agent.encode(batch["obs"])
    action = agent.policy(z)
    return {
        "actor/actor_loss": -agent.values(agent.target, z, action).amin(1).mean(-1),
        "actor/action_churn": (action - batch["action"]).square().flatten(1).mean(-1),
        "actor/mean_abs_action": action.abs().flatten(1).mean(-1),
        "actor/mean_action": action.flatten(1).mean(-1),
    }


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of two (S, B), (S,) float32; NaN where either does not vary."""
    x, y = x.double(), y.double()
    varies = (x.amin(-1) < x.amax(-1)) & (y.amin(-1) < y.amax(-1))  # rounding leaves constants a little variance
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    pearson = (x * y).mean(-1) / (x.square().mean(-1) * y.square().mean(-1)).sqrt()
    return torch.where(varies, pearson, torch.nan).float()


def _mixed(agent: Any, z: Tensor, next_z: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Action, reward and next latent as the critics are trained on them."""
    c, rows = agent.config, z.shape[1]
    if c.real_rows() == c.batch_size or c.model_data == "simulator" or c.model_actions == "uniform":
        return batch["action"], batch["reward"], next_z
    if rows != c.batch_size:
        raise ValueError(f"a minibatch of {rows} rows: must have the agent's batch_size, {c.batch_size}")
    mixed: tuple[Tensor, Tensor, Tensor] = agent.mix(z, next_z, batch)
    return mixed


def _groups(z: Tensor, size: int) -> Tensor:
    """(S, B, L) -> (S, B, L / size, size)."""
    return torch.unflatten(z, -1, (-1, size))
