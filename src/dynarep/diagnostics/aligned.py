"""What an aligned latent model has learned, on episodes that it never saw (`extensions` A8).

    reward/*      reward(z, a) against the real reward: error, R^2, slope                              `reward_fit`
    latent/r2     mean of the prior m(.|z, a) against that of the target encoder at s'                  `latent_r2`
    probe/*       what of s a linear map can read from z, 1 - MSE / variance per channel                    `probe`
    kl/*          KL(m(.|z_t, a_t) || ebar(.|s_{t+1})) per step along three of them, and its two parts     `rollout`
    sd/* saturated/*  deviations of prior and target, and how many of them lie at a bound                  `rollout`
    objective/*   a step's KL against its reward, as both stand in the representation loss                 `rollout`
    imagined/*    the actor's intrinsic reward against its reward, along three imagined steps             `imagine`
    classifier/*  how well real and predicted next latents are told apart                                 `accuracy`
    gradient/*    the shares of KL, reward and value in the encoder's gradient                          `gradients`
    q/*           min_j Q_j along the random policy's episodes against their discounted returns       `against_policy`

Arms of the experiment change units and latents, so errors are in raw units or relative to a variance. `latent/r2` is
relative to each arm's own latent, which can be easy to predict because it has dropped information: `probe/*` tells.
Real rewards of few episodes vary much or little by chance, so an error that is compared between seeds is divided by the
variance of the training rewards (`extensions` A7 iv).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dynarep.agents.alm import ALM
from dynarep.agents.latents import Gaussian, kl_parts
from dynarep.diagnostics.critic import Episode, overestimation, values
from dynarep.placement import host
from dynarep.replay import normal

FLOOR = 0.11  # ours: a deviation below it lies at its floor, 0.1 (`extensions` A2)
SATURATED = 25.0  # `extensions` A8: of means within +-30
RIDGE = 1e-6  # ours: penalty per training row on coefficients of standardised latents, for those that say the same
LOST = 0.5  # ours: a channel of which a linear probe explains less counts as lost

Rows = Mapping[str, Tensor]  # fields of transitions, (S, N, ...)
Found = dict[str, list[float]]
Generators = Sequence[np.random.Generator]


def report(
    agent: ALM,
    unseen: Rows,
    sequences: Rows,
    training: Rows,
    generators: Generators,
    std: float,
    weight: Tensor,
) -> Found:
    """Return the metrics of single rows and of short sequences, one number per seed. Not finite where the agent is.

    Args:
        agent: left as it is.
        unseen: obs (S, N, o), action (S, N, a), reward (S, N), next_obs (S, N, o) of held-out episodes, raw units.
        sequences: of held-out episodes, obs (S, K + 1, B, o) and action (S, K, B, a).
        training: rows that the agent was fitted to: their rewards' variance is a yardstick, the probe is fitted there.
        generators: one per seed, for latents and actions; the same ones give the same numbers.
        std: of the actor's noise in updates.
        weight: of KL in the representation loss now, (S,).
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a model that diverged is a result
        before, after = (agent.encode(unseen[name], target=True) for name in ("obs", "next_obs"))
        prior = agent.predict(before.mean, unseen["action"])
        predicted = host(agent.reward(before.mean, unseen["action"]))
        fitted = host(agent.encode(training["obs"], target=True).mean)
        per_seed: list[dict[str, float]] = []
        for s in range(len(predicted)):
            rewards = host(training["reward"][s])
            groups = {
                "reward": reward_fit(predicted[s], host(unseen["reward"][s]), rewards),
                "latent": {"r2": latent_r2(host(prior.mean[s]), host(after.mean[s]))},
                "probe": probe(fitted[s], host(training["obs"][s]), host(before.mean[s]), host(unseen["obs"][s])),
            }
            per_seed.append({f"{group}/{name}": x for group, own in groups.items() for name, x in own.items()})
        found = {name: [own[name] for own in per_seed] for name in per_seed[0]}
        for part in (
            rollout(agent, sequences, generators, weight),
            imagine(agent, before, generators, std),
            accuracy(agent, before, after, unseen["action"], generators),
        ):
            found |= {name: host(each).tolist() for name, each in part.items()}
    return found


def reward_fit(predicted: np.ndarray, real: np.ndarray, training: np.ndarray) -> dict[str, float]:
    """How well mean rewards fit real ones, in raw reward units.

    Args:
        predicted, real: (n,), of transitions never seen.
        training: (m,), real rewards of the training rows.

    Returns:
        mse; variance of the real rewards, and of the training rewards; error, mse over the latter; r2, 1 - mse over the
        former; slope of the regression of prediction on reward. NaN where a variance is 0.
    """
    predicted, real = predicted.astype(np.float64), real.astype(np.float64)
    mse, variance = float(np.mean((predicted - real) ** 2)), float(np.var(real))
    yardstick = float(np.var(training.astype(np.float64)))
    covariance = float(np.mean((predicted - predicted.mean()) * (real - real.mean())))
    return {
        "mse": mse,
        "variance": variance,
        "training_variance": yardstick,
        "error": mse / yardstick if yardstick else math.nan,
        "r2": 1.0 - mse / variance if variance else math.nan,
        "slope": covariance / variance if variance else math.nan,
    }


def latent_r2(predicted: np.ndarray, real: np.ndarray) -> float:
    """Return 1 - squared error / variance of latents (n, d), each summed over dimensions; NaN if nothing varies."""
    predicted, real = predicted.astype(np.float64), real.astype(np.float64)
    spread = float(real.var(0).sum())
    return 1.0 - float(((predicted - real) ** 2).mean(0).sum()) / spread if spread else math.nan


def probe(latent: np.ndarray, obs: np.ndarray, unseen_latent: np.ndarray, unseen_obs: np.ndarray) -> dict[str, float]:
    """Read the observation from the latent by ridge regression, fitted to training rows, judged on rows never seen.

    Args:
        latent, obs: (n, d) and (n, o), training rows.
        unseen_latent, unseen_obs: (m, d) and (m, o).

    Returns:
        Of 1 - MSE / variance (that of the training rows) per channel: mean, median and worst; lost, the share of
        channels below `LOST`. Channels that are constant in training are left out; NaN if there is no other.
    """
    z, s, z_new, s_new = (part.astype(np.float64) for part in (latent, obs, unseen_latent, unseen_obs))
    kept = s.min(0) < s.max(0)
    if not kept.any() or not all(np.isfinite(part).all() for part in (z, z_new)):
        return dict.fromkeys(("mean", "median", "worst", "lost"), math.nan)
    scale = np.where(z.std(0) > 0, z.std(0), 1.0)
    x, x_new = (z - z.mean(0)) / scale, (z_new - z.mean(0)) / scale
    y = s[:, kept] - s[:, kept].mean(0)
    map_ = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    error = ((x_new @ map_ + s[:, kept].mean(0) - s_new[:, kept]) ** 2).mean(0)
    r2 = 1.0 - error / s[:, kept].var(0)
    return {
        "mean": float(r2.mean()),
        "median": float(np.median(r2)),
        "worst": float(r2.min()),
        "lost": float((r2 < LOST).mean()),
    }


@torch.no_grad()
def rollout(agent: ALM, sequences: Rows, generators: Generators, weight: Tensor) -> dict[str, Tensor]:
    """Roll the model along real actions as the representation loss does, from a sampled latent; each number (S,).

    Args:
        agent: left as it is.
        sequences: obs (S, K + 1, B, o) and action (S, K, B, a), of consecutive steps.
        generators: one per seed.
        weight: of KL in the loss, (S,).

    Returns:
        kl/step, nats per step, the sum of kl/mean_part ((m - n)^2 / 2 sd_target^2) and kl/sd_part; means and shares of
        deviations and means; objective/reward, mean |reward(z_t, a_t)| in the units that the loss has it in;
        objective/kl_to_reward, weighted KL over it.
    """
    obs, action = sequences["obs"], sequences["action"]
    z = _sample(agent.encode(obs[:, 0]), generators)
    steps: list[dict[str, Tensor]] = []
    for t in range(action.shape[1]):
        rewards = agent.reward(z, action[:, t]) / agent.scale
        prior, target = agent.predict(z, action[:, t]), agent.encode(obs[:, t + 1], target=True)
        by_mean, by_sd = kl_parts(prior, target)
        own = {"kl/mean_part": by_mean, "kl/sd_part": by_sd, "objective/reward": rewards.abs()}
        for name, of in (("prior", prior), ("target", target)):
            own[f"sd/{name}"] = of.std
            own[f"sd/{name}_floor"] = (of.std < FLOOR).float()
            own[f"saturated/{name}"] = (of.mean.abs() > SATURATED).float()
        steps.append({name: _mean(each) for name, each in own.items()})
        z = _sample(prior, generators)
    found = {name: torch.stack([own[name] for own in steps]).mean(0) for name in steps[0]}
    found["kl/step"] = found["kl/mean_part"] + found["kl/sd_part"]
    found["objective/kl_to_reward"] = weight * found["kl/step"] / found["objective/reward"]
    return found


@torch.no_grad()
def imagine(agent: ALM, start: Gaussian, generators: Generators, std: float) -> dict[str, Tensor]:
    """Let actor and model go on from sampled latents for K steps, as the actor's loss does; each number (S,).

    Args:
        agent: left as it is.
        start: latents (S, B, L).
        generators: one per seed.
        std: of the noise on actions, cut as in updates.

    Returns:
        intrinsic, the mean of 0.1 x logit difference; intrinsic_size and reward_size, means of its size and of that of
        the reward, in the units that the actor trains with; intrinsic_to_reward, their ratio.
    """
    c, z = agent.config, _sample(start, generators)
    intrinsic, rewards = [], []
    for _ in range(c.horizon):
        action = agent.policy(z)
        noise = (std * normal(generators, tuple(action.shape[1:]))).clamp(-c.noise_clip, c.noise_clip)
        action = (action + noise).clamp(-1.0, 1.0)
        following = _sample(agent.predict(z, action), generators)
        rewards.append(_mean((agent.reward(z, action) / agent.scale).abs()))
        difference = c.classifier_weight * agent.logit_difference(z, action, following)
        intrinsic.append(torch.stack([_mean(difference), _mean(difference.abs())]))
        z = following
    signed, size = torch.stack(intrinsic).mean(0)
    reward = torch.stack(rewards).mean(0)
    return {
        "imagined/intrinsic": signed,
        "imagined/intrinsic_size": size,
        "imagined/reward_size": reward,
        "imagined/intrinsic_to_reward": size / reward,
    }


@torch.no_grad()
def accuracy(
    agent: ALM, before: Gaussian, after: Gaussian, action: Tensor, generators: Generators
) -> dict[str, Tensor]:
    """Return how often the classifier tells a next latent of the target encoder from one of the model, (S,).

    Half of the latents are of either kind, so guessing is right in one half. `before`, `after`: (S, B, L) of the target
    encoder at s and s'; action: (S, B, a).
    """
    z = _sample(before, generators)
    real = agent.logit_difference(z, action, _sample(after, generators))
    made = agent.logit_difference(z, action, _sample(agent.predict(z, action), generators))
    right = _mean((real > 0).float()) / 2 + _mean((made < 0).float()) / 2
    return {"classifier/accuracy": torch.where((real + made).isfinite().all(-1), right, math.nan)}


def gradients(batches: Sequence[Mapping[str, Tensor]]) -> Found:
    """Turn norms (S,) of the encoder's gradient by each term of the loss, of several minibatches, into shares.

    Of the sum of norms, each averaged over minibatches. `total` is the average norm of the whole gradient, before
    clipping: terms may point in different directions. Without an encoder (arm O) there are no shares: NaN.
    """
    norms = {name: np.mean([host(own[name]) for own in batches], axis=0, dtype=np.float64) for name in batches[0]}
    terms = {name: norms[name] for name in ("kl", "reward", "value")}
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = np.sum(list(terms.values()), axis=0)
        found = {f"gradient/{name}": (each / whole).tolist() for name, each in terms.items()}
    return found | {"gradient/total": norms["total"].tolist()}


def against_policy(agent: ALM, episodes: Sequence[Sequence[Episode]]) -> Found:
    """Compare min_j Q_j along each seed's held-out episodes with what the random policy got (`critic.overestimation`).

    Episodes are cut short, so the return has the tail that it would have had, and first halves alone count.
    """
    whole = [[np.concatenate([getattr(e, name) for e in own]) for own in episodes] for name in ("obs", "action")]
    found: Found = {}
    for own, q in zip(episodes, values(agent, *whole), strict=True):
        measured = overestimation(own, q, agent.config.discount, math.inf)
        for name in ("mc_tail", "over", "over_abs"):
            found.setdefault(f"q/{name}", []).append(measured[name])
    return found


def _sample(of: Gaussian, generators: Generators) -> Tensor:
    return of.sample(normal(generators, tuple(of.mean.shape[1:])))


def _mean(numbers: Tensor) -> Tensor:
    """Return each seed's mean, (S, ...) -> (S,): over one contiguous row of its own."""
    return numbers.flatten(1).mean(1)
