"""What a dynamics ensemble has learned, on transitions that it never saw: FTFL's causes 1 and 2, in numbers.

    reward/*      mean prediction of the elites against the real reward                                   `reward_fit`
    state/nmse    the same for the next state: squared error / variance, mean over dimensions              `state_error`
    pme/*         ||m_e - s'|| / ||s' - s|| or / ||s'||, percent, as STFL logs it                `percent_model_error`
    variance/*    predicted variance: in network units, in raw units, and against the variance of s'  `variance_levels`
    inflation/*   variance of sampled next states against that of the real ones                            `inflation`
    gradient/*    how much of the last hidden layer's gradient is the reward's doing                    `gradient_norms`
    increment/*   s' - s instead of s', without entries that repeat the frame before    `increments`, `increment_fit`

Network units are those of the regression: what target a model has, and whether it is normalised, changes them. Only
raw units, and ratios to the variance of s', compare residual with direct targets (`ftfl` 4.3).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dynarep.agents.ensemble import Batch, Ensemble, Generators
from dynarep.nets import EVEN
from dynarep.placement import host

INFLATED = 1.2  # ours: a sampled dimension with this many times the real variance counts as inflated
STILL = 1e-6  # an increment with no larger deviation counts as constant: the regression's own guard, `epsilon`
NO_NORM = 1e-8  # `ftfl` 4.2: rows whose denominator is smaller are left out of percentages


def report(
    ensemble: Ensemble, unseen: Batch, generators: Generators, in_sample: Batch | None = None
) -> dict[str, list[float]]:
    """Return every model metric, one number per seed. Not finite where the model is, or where nothing varies.

    Args:
        ensemble: the model, left as it is.
        unseen: obs (S, N, o), action (S, N, a), reward (S, N), next_obs (S, N, o) in raw units, never trained on.
        generators: one per seed, for one sampled next state and reward of every unseen row.
        in_sample: rows of the training data, (S, M, ...). With them there are also `pme_in/*` and
            `variance/in_sample_log_network` (quirk Q10: what the reference logs), and `gradient/*` is of these rows.
    """
    prediction = ensemble.predict(unseen["obs"], unseen["action"])
    sampled_obs, sampled_reward = ensemble.sample(unseen["obs"], unseen["action"], generators)
    seen = ensemble.predict(in_sample["obs"], in_sample["action"]) if in_sample is not None else None
    gradients = gradient_norms(ensemble, unseen if in_sample is None else in_sample)
    values: dict[str, list[float]] = {}
    for s in range(len(ensemble.seeds)):
        obs, following, elites = unseen["obs"][s].double(), unseen["next_obs"][s].double(), ensemble.elites[s]
        means, std = prediction.next_obs[s].double(), ensemble.target_std[s].double()
        reward, drawn = unseen["reward"][s].double(), sampled_reward[s].double()
        with np.errstate(over="ignore", invalid="ignore"):  # a model that diverged is a result
            fit = reward_fit(host(prediction.reward[s, elites].double().mean(0)), host(reward))
        fit["sampled_sd_ratio"] = _ratio(drawn.std(correction=0), reward.std(correction=0))
        groups = {
            "reward": fit,
            "state": {"nmse": state_error(means[elites].mean(0), following)},
            "pme": percent_model_error(means, following, obs),
            "variance": variance_levels(prediction.variance[s].double(), std, following),
            "inflation": inflation(sampled_obs[s].double(), following),
            "gradient": {name: float(norms[s]) for name, norms in gradients.items()},
        }
        if in_sample is not None and seen is not None:
            rows = (seen.next_obs[s].double(), in_sample["next_obs"][s].double(), in_sample["obs"][s].double())
            groups["pme_in"] = percent_model_error(*rows)
            groups["variance"]["in_sample_log_network"] = _log_network(seen.variance[s].double(), std).item()
        for group, numbers in groups.items():
            for name, value in numbers.items():
                values.setdefault(f"{group}/{name}", []).append(value)
    return values


def reward_fit(predicted: np.ndarray, real: np.ndarray, deciles: int = 10) -> dict[str, float]:
    """How well a model's mean rewards fit real ones, in raw reward units (`ftfl` 4.1).

    Args:
        predicted, real: (n,) mean prediction and real reward of transitions the model never saw.
        deciles: groups of equal size by real reward; the mean of both is returned for each.

    Returns:
        mse; variance of the real rewards; nmse, their ratio (1 - R^2; 1 is "predicts the mean"); mean_ratio, mean
        prediction over mean reward; slope of the regression of prediction on reward (1 is right, 0 is "collapsed");
        negative, the share of predictions below zero; top_ratio, mean prediction over mean reward in the highest
        tenth; decile/k/real and decile/k/predicted.
    """
    predicted, real = predicted.astype(np.float64), real.astype(np.float64)
    variance = float(np.var(real))
    mse = float(np.mean((predicted - real) ** 2))
    fit = {
        "mse": mse,
        "variance": variance,
        "nmse": mse / variance if variance > 0 else float("nan"),
        "mean_real": float(np.mean(real)),
        "mean_predicted": float(np.mean(predicted)),
        "slope": float(np.mean((predicted - predicted.mean()) * (real - real.mean()))) / variance
        if variance > 0
        else float("nan"),
        "negative": float(np.mean(predicted < 0)),
    }
    fit["mean_ratio"] = fit["mean_predicted"] / fit["mean_real"] if fit["mean_real"] else float("nan")
    order = np.argsort(real, kind="stable")
    for k, group in enumerate(np.array_split(order, deciles)):
        fit[f"decile/{k}/real"] = float(np.mean(real[group]))
        fit[f"decile/{k}/predicted"] = float(np.mean(predicted[group]))
    top = fit[f"decile/{deciles - 1}/real"]
    fit["top_ratio"] = fit[f"decile/{deciles - 1}/predicted"] / top if top else float("nan")
    return fit


def state_error(predicted: Tensor, real: Tensor) -> float:
    """Return squared error / variance of next states (n, o), mean over dimensions; constant ones are left out."""
    kept = _varied(real)
    error = (predicted - real).square().mean(0)
    return float((error[kept] / real.var(0, correction=0)[kept]).mean())


def percent_model_error(predicted: Tensor, following: Tensor, obs: Tensor) -> dict[str, float]:
    """Return the mean over members and rows of 100 ||error|| / ||s' - s|| and 100 ||error|| / ||s'|| (`ftfl` 4.2).

    Args:
        predicted: mean next states of every member (E, n, o), raw units.
        following, obs: (n, o). Rows whose denominator has no length are left out; NaN if none remains.

    Returns:
        delta, STFL's own for residual targets; absolute. The numerator is the same for all kinds of target.
    """
    error = torch.linalg.vector_norm(predicted - following, dim=-1)
    percent = {}
    for name, base in (("delta", following - obs), ("absolute", following)):
        norm = torch.linalg.vector_norm(base, dim=-1)
        kept = norm >= NO_NORM
        percent[name] = float(100.0 * (error[:, kept] / norm[kept]).mean())
    return percent


def variance_levels(variance: Tensor, target_std: Tensor, following: Tensor) -> dict[str, float]:
    """Return levels of the predicted variance in several units (`ftfl` 4.3).

    Args:
        variance: of every member and row, (E, n, o + 1), raw units, reward last.
        target_std: (o + 1,), raw units per network unit.
        following: real next states (n, o).

    Returns:
        log_network, log_raw: mean log-variance over members, rows and outputs; log_raw_state, log_raw_reward: of these
        outputs alone; mean_raw: mean variance; state_share: mean over state dimensions of mean variance / var(s').
    """
    log, kept = variance.log(), _varied(following)
    share = variance[..., :-1].mean((0, 1))[kept] / following.var(0, correction=0)[kept]
    return {
        "log_network": _log_network(variance, target_std).item(),
        "log_raw": float(log.mean()),
        "log_raw_state": float(log[..., :-1].mean()),
        "log_raw_reward": float(log[..., -1].mean()),
        "mean_raw": float(variance.mean()),
        "state_share": float(share.mean()),
    }


def _log_network(variance: Tensor, target_std: Tensor) -> Tensor:
    """Mean log-variance in network units, of raw variances (E, n, o + 1)."""
    return (variance.log() - 2.0 * target_std.log()).mean()


def inflation(sampled: Tensor, real: Tensor) -> dict[str, float]:
    """Compare sampled next states (n, o) with the real ones of the same states and actions.

    Returns:
        share: of state dimensions, those whose sampled variance exceeds 1.2 times the real one; log_ratio: mean over
        dimensions of ln var(sampled) / var(real); energy: E|sampled|^2 / E|real|^2. Dimensions that are constant in
        reality have no ratio and are left out of the first two.
    """
    kept = _varied(real)
    ratio = sampled.var(0, correction=0)[kept] / real.var(0, correction=0)[kept]
    share = (ratio > INFLATED).double().mean() if ratio.isfinite().all() else math.nan
    return {
        "share": float(share),
        "energy": _ratio(sampled.square().sum(), real.square().sum()),
        "log_ratio": float(ratio.log().mean()),
    }


def increments(ensemble: Ensemble, unseen: Batch, generators: Generators, left_out: slice) -> dict[str, list[float]]:
    """Return what the elites know of s' - s on rows they never saw, one number per seed; see `increment_fit`.

    Args:
        ensemble: the model, left as it is; in raw units, whatever its targets are.
        unseen: see `report`.
        generators: one per seed, for one sampled next state of every row.
        left_out: entries of an observation that repeat the frame before: the model reads them off its input.

    Returns:
        increment/*, and increment/over_reward: sum of the variances of s' - s, over all entries, / that of the reward.
    """
    prediction = ensemble.predict(unseen["obs"], unseen["action"])
    sampled, _ = ensemble.sample(unseen["obs"], unseen["action"], generators)
    kept = torch.ones(unseen["obs"].shape[-1], dtype=torch.bool, device=sampled.device)
    kept[left_out] = False
    floor = math.exp(ensemble.config.log_variance_min)
    values: dict[str, list[float]] = {}
    for s in range(len(ensemble.seeds)):
        obs, following, elites = unseen["obs"][s].double(), unseen["next_obs"][s].double(), ensemble.elites[s]
        mean = prediction.next_obs[s, elites].double().mean(0) - obs
        variance = prediction.variance[s, elites, :, :-1].double().mean((0, 1))
        drawn, real = sampled[s].double() - obs, following - obs
        found = increment_fit(mean[:, kept], variance[kept], drawn[:, kept], real[:, kept], floor)
        total = real.var(0, correction=0).sum()
        found["over_reward"] = _ratio(total, unseen["reward"][s].double().var(correction=0))
        for name, value in found.items():
            values.setdefault(f"increment/{name}", []).append(value)
    return values


def increment_fit(mean: Tensor, variance: Tensor, sampled: Tensor, real: Tensor, floor: float) -> dict[str, float]:
    """Compare predicted with real increments, entry by entry; entries that stand `STILL` are left out (ours).

    Args:
        mean, sampled, real: mean prediction, one draw, and truth, (n, o).
        variance: predicted, mean over rows, (o,).
        floor: the smallest variance that a model in raw units can express.

    Returns:
        live: how many entries move; below_floor: share of them whose variance is below `floor`. nmse: geometric mean
        over entries of squared error / variance; r2: median of 1 less that. sd_ratio: geometric mean of predicted /
        real standard deviation. inflated: share of entries whose sampled variance exceeds 1.2 times the real one.
    """
    real_variance = real.var(0, correction=0)
    live = real_variance > STILL**2
    own = real_variance[live]
    error = (mean - real).square().mean(0)[live] / own
    drawn = sampled.var(0, correction=0)[live] / own
    inflated = (drawn > INFLATED).double().mean() if drawn.isfinite().all() else math.nan
    return {
        "live": float(live.sum()),
        "below_floor": float((own < floor).double().mean()),
        "nmse": float(error.log().mean().exp()),
        "r2": 1.0 - float(error.quantile(0.5)) if len(error) else math.nan,
        "sd_ratio": float((variance[live] / own).log().mean().div(2).exp()),
        "inflated": float(inflated),
    }


def gradient_norms(ensemble: Ensemble, batch: Batch) -> dict[str, Tensor]:
    """Return how strongly reward and state shape the last hidden layer (`ftfl` 4.6), each (S,).

    The loss of a member is a mean over rows and outputs; it is split into the sum over state outputs and the reward's
    part. `state`, `reward`: norm of either part's derivative by the kernel of the last hidden layer (the one before the
    output layer; in every branch, where the reward has a network of its own), mean over members. `share`: reward /
    state. `batch`: rows in raw units, (S, N, ...). Computed aside: the networks' own gradients are not touched.
    """
    size = batch["reward"].shape[1]
    # An even number of rows: the first ones again, which do not count.
    filled = torch.arange(-(-size // EVEN) * EVEN, device=batch["reward"].device)
    rows = {name: values[:, filled % size] for name, values in batch.items()}
    counts = (filled < size)[:, None]
    std, mean = ensemble.target_std[:, None], ensemble.target_mean[:, None]
    y = ((ensemble.targets(rows) - mean) / std).unsqueeze(1)
    last = f"/{ensemble.config.model_layers - 1}.kernel"
    kernels = [ensemble.net._views[slot] for slot in ensemble.net.slots() if slot.endswith(last)]
    with torch.enable_grad():
        m, log_variance = ensemble.forward(rows["obs"], rows["action"])
        loss = torch.where(counts, (m - y).square() * (-log_variance).exp() + log_variance, 0.0) / (size * y.shape[-1])
        parts = {"state": loss[..., :-1].sum(), "reward": loss[..., -1].sum()}
        slopes = {
            name: torch.autograd.grad(part, kernels, retain_graph=True, allow_unused=True)
            for name, part in parts.items()
        }
    norms = {}
    for name, grads in slopes.items():
        squares = sum(grad.double().square().sum((-2, -1)) for grad in grads if grad is not None)  # (S E,)
        norms[name] = torch.as_tensor(squares).sqrt().view(len(ensemble.seeds), -1).mean(1)
    return norms | {"share": norms["reward"] / norms["state"]}


def _varied(values: Tensor) -> Tensor:
    """Which dimensions of (n, o) are not constant. Not by their variance: rounding leaves constants a little of it."""
    return values.amin(0) < values.amax(0)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else math.nan
