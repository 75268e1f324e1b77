"""Diagnostics on cases with a known answer."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynarep.agents.ensemble import Ensemble
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.configs.model_fit import INCREMENT_METRICS, MODEL_METRICS
from dynarep.diagnostics import model
from dynarep.diagnostics.critic import Episode, against_return
from dynarep.diagnostics.model import gradient_norms, inflation, percent_model_error, reward_fit, variance_levels
from dynarep.streams import stream

# Rewards

REAL = np.random.default_rng(0).uniform(0, 1, 1000)


def test_a_right_reward_model_has_no_error_and_slope_one():
    fit = reward_fit(REAL, REAL)
    assert fit["nmse"] == 0
    assert fit["slope"] == pytest.approx(1)
    assert fit["mean_ratio"] == pytest.approx(1)
    assert fit["top_ratio"] == pytest.approx(1)


def test_a_model_that_predicts_the_mean_has_error_equal_to_the_variance():
    fit = reward_fit(np.full(1000, REAL.mean()), REAL)
    assert fit["nmse"] == pytest.approx(1)
    assert fit["slope"] == pytest.approx(0)


def test_a_model_collapsed_to_zero_has_ratio_zero_and_error_variance_plus_squared_mean():
    fit = reward_fit(np.zeros(1000), REAL)
    assert fit["mean_ratio"] == 0
    assert fit["nmse"] == pytest.approx(1 + REAL.mean() ** 2 / REAL.var())


def test_a_model_that_halves_and_shifts_has_slope_one_half_and_the_negative_share_it_has():
    fit = reward_fit(0.5 * REAL - 0.25, REAL)
    assert fit["slope"] == pytest.approx(0.5)
    assert fit["negative"] == np.mean(REAL < 0.5)


def test_deciles_sort_by_real_reward_and_hold_a_tenth_each():
    fit = reward_fit(REAL * 2, REAL)
    real = [fit[f"decile/{k}/real"] for k in range(10)]
    assert real == sorted(real)
    assert real[9] == pytest.approx(np.sort(REAL)[900:].mean())
    assert fit["decile/3/predicted"] == pytest.approx(2 * real[3])


def test_constant_rewards_say_nothing_instead_of_dividing_by_zero():
    assert np.isnan(reward_fit(REAL, np.ones(1000))["nmse"])


# Next states: each measure on numbers made by hand


CONSTANT = 1.1  # a number whose sample variance rounds to 5e-32 instead of 0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_percent_error_is_the_mean_over_members_of_relative_lengths() -> None:
    obs, following = torch.tensor([[0.0, 4.0], [5.0, 0.0]]), torch.tensor([[3.0, 4.0], [5.0, 12.0]])
    wrong = following + torch.tensor([[0.0, 6.0], [0.0, 0.0]])
    found = percent_model_error(torch.stack([following, wrong]), following, obs)
    # one of four errors is not zero: 6, against a step of 3 and a next state of length 5
    assert found["delta"] == pytest.approx(100 * (6 / 3) / 4)
    assert found["absolute"] == pytest.approx(100 * (6 / 5) / 4)


def test_percent_error_skips_rows_without_a_length() -> None:
    following = torch.tensor([[0.0, 0.0], [5.0, 0.0], [2.0, 0.0]])
    obs = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 0.0]])
    predicted = (following + torch.tensor([1.0, 0.0])).unsqueeze(0)
    found = percent_model_error(predicted, following, obs)
    assert found["delta"] == pytest.approx(50)  # the second row stood still
    assert found["absolute"] == pytest.approx(100 * (1 / 5 + 1 / 2) / 2)  # the first is at the origin
    assert math.isnan(percent_model_error(predicted, following, following)["delta"])


def test_variance_is_told_in_network_units_raw_units_and_shares_of_the_state() -> None:
    following = torch.stack(
        [2 * normal(500), 5 * normal(500, seed=1), torch.full((500,), CONSTANT, dtype=torch.double)], 1
    )
    std, network = torch.tensor([2.0, 5.0, 3.0, 10.0]).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    variance = (network * std.square()).expand(7, 500, 4)
    found = variance_levels(variance, std, following)
    logs = np.log(variance[0, 0].numpy())
    assert found["log_network"] == pytest.approx(np.log(network.numpy()).mean())
    assert found["log_raw"] == pytest.approx(logs.mean())
    assert found["log_raw_state"] == pytest.approx(logs[:3].mean())
    assert found["log_raw_reward"] == pytest.approx(logs[3])
    assert found["mean_raw"] == pytest.approx((0.1 * 4 + 0.2 * 25 + 0.3 * 9 + 0.4 * 100) / 4)
    real = following.numpy().var(0)  # the third dimension is constant and has no share
    assert found["state_share"] == pytest.approx((0.1 * 4 / real[0] + 0.2 * 25 / real[1]) / 2)


def test_inflation_counts_the_dimensions_that_are_too_wide() -> None:
    real = torch.cat([normal(400, 3), torch.full((400, 1), CONSTANT, dtype=torch.double)], 1)
    factors = torch.tensor([1.19, 1.21, 0.5]).double()
    sampled = torch.cat([real[:, :3] * factors.sqrt(), normal(400, 1)], 1)  # the constant dimension is left out
    found = inflation(sampled, real)
    assert found["share"] == pytest.approx(1 / 3)
    assert found["log_ratio"] == pytest.approx(factors.log().mean().item())
    assert found["energy"] == pytest.approx((sampled.square().sum() / real.square().sum()).item())
    assert inflation(3 * real, real)["energy"] == pytest.approx(9)


def test_where_nothing_varies_there_is_no_ratio() -> None:
    constant = torch.full((400, 1), CONSTANT, dtype=torch.double)
    assert math.isnan(inflation(normal(400, 1), constant)["log_ratio"])
    assert math.isnan(model.state_error(normal(400, 1), constant))


def test_inflation_of_a_diverged_model_is_not_zero() -> None:
    sampled = normal(50, 2)
    sampled[3, 1] = math.inf
    assert math.isnan(inflation(sampled, normal(50, 2))["share"])


# The report, on ensembles whose output is known


def constant(mean: list[float], log_variance: float, **switches: object) -> Ensemble:
    """Two seeds, three members, two state dimensions and a reward; every output is the same whatever comes in."""
    config = EnsembleConfig(
        **{"members": 3, "elites": 2, "model_width": 8, "model_layers": 2, "weight_decay": (0, 0, 0), **switches}
    )
    ensemble = Ensemble(config, 2, 1, [0, 1])
    ensemble.net.flat.zero_()
    low, high = math.exp(config.log_variance_min), math.exp(config.log_variance_max)
    gate = (math.exp(log_variance) - low) / high
    raw = config.log_variance_max + math.log(gate / (1 - gate))
    ensemble.net.parameter("/2.bias").copy_(torch.tensor([*mean, raw, raw, raw]))
    return ensemble


def transitions(n: int = 20_000, **fields: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two seeds of rows: states of standard normals, next states independent of them, rewards 1 or 0."""
    rows = {"obs": normal(2, n, 2), "action": normal(2, n, 1, seed=1), "next_obs": normal(2, n, 2, seed=2)}
    rows["reward"] = (torch.arange(n) % 2).double().expand(2, n)
    return {name: values.float() for name, values in (rows | fields).items()}


def generators() -> list[np.random.Generator]:
    return [stream(seed, "measure") for seed in (0, 1)]


def test_a_residual_model_of_noise_doubles_its_variance_and_a_direct_one_keeps_it() -> None:
    """Both know all that can be known of s', its mean and its spread; the residual one adds its noise to s."""
    batch = transitions()
    residual = model.report(constant([0, 0, 0.5], 0.0), batch, generators())
    direct = model.report(constant([0, 0, 0.5], 0.0, target="direct"), batch, generators())
    for s in (0, 1):
        assert residual["inflation/share"][s] == 1
        assert residual["inflation/log_ratio"][s] == pytest.approx(math.log(2), abs=0.05)
        assert residual["inflation/energy"][s] == pytest.approx(2, rel=0.05)
        assert direct["inflation/share"][s] == 0
        assert direct["inflation/log_ratio"][s] == pytest.approx(0, abs=0.05)
        assert direct["state/nmse"][s] == pytest.approx(1, abs=0.01)
        assert residual["state/nmse"][s] == pytest.approx(2, abs=0.05)
        assert residual["variance/state_share"][s] == pytest.approx(1, abs=0.03)
        # |s^ - s'| is |s - s'| for a residual of 0, and |s'| for a constant 0
        assert residual["pme/delta"][s] == pytest.approx(100, rel=1e-5)
        assert direct["pme/absolute"][s] == pytest.approx(100, rel=1e-5)


def test_sampled_rewards_spread_as_the_model_says() -> None:
    found = model.report(constant([0, 0, 0.5], math.log(0.36)), transitions(), generators())
    assert found["reward/sampled_sd_ratio"] == pytest.approx([0.6 / 0.5] * 2, rel=0.03)
    assert found["reward/nmse"] == pytest.approx([1, 1])
    assert found["variance/log_raw_reward"] == pytest.approx([math.log(0.36)] * 2, rel=1e-5)


def test_normalised_targets_are_reported_in_raw_units() -> None:
    batch = transitions(next_obs=3 * normal(2, 20_000, 2, seed=2))
    ensemble = constant([0, 0, 0], math.log(0.25), target="direct", normalise_targets=True)
    ensemble.fit_normalisers(batch)
    found = model.report(ensemble, batch, generators(), batch)
    for s in (0, 1):
        assert found["variance/log_network"][s] == pytest.approx(math.log(0.25), rel=1e-5)
        assert found["variance/in_sample_log_network"][s] == pytest.approx(math.log(0.25), rel=1e-5)
        assert found["variance/state_share"][s] == pytest.approx(0.25, rel=1e-3)
        assert found["variance/log_raw_reward"][s] == pytest.approx(math.log(0.25 * 0.25), rel=1e-3)
        assert found["variance/log_raw_state"][s] == pytest.approx(math.log(0.25 * 9), abs=0.03)
        assert found["reward/mean_predicted"][s] == pytest.approx(0.5, abs=1e-4)


def test_in_sample_rows_are_told_apart_from_unseen_ones() -> None:
    states = normal(2, 64, 2, seed=5)
    unseen, seen = transitions(64), transitions(64, obs=states, next_obs=states)  # seen: steps of no length
    found = model.report(constant([3, 4, 0], 0.0, target="residual"), unseen, generators(), seen)
    assert found["pme_in/absolute"] != found["pme/absolute"]
    lengths = seen["next_obs"].double().norm(dim=-1)
    assert found["pme_in/absolute"] == pytest.approx((100 * 5 / lengths).mean(1).tolist(), rel=1e-5)
    assert all(math.isnan(value) for value in found["pme_in/delta"])
    ensemble = trained()
    found = model.report(ensemble, unseen, generators(), seen)
    of_seen = model.report(ensemble, seen, generators())
    assert found["variance/in_sample_log_network"] == of_seen["variance/log_network"] != found["variance/log_network"]
    assert found["gradient/share"] == of_seen["gradient/share"]  # the training loss is one of training rows


def test_only_elites_predict_and_all_members_err() -> None:
    ensemble = constant([0, 0, 0.5], 0.0, target="direct")
    ensemble.net.parameter("/2.bias")[:, 0, :3] = torch.tensor([30.0, 40.0, 100.0])
    ensemble.elites = torch.tensor([[1, 2], [0, 1]])  # the second seed chose the bad member
    batch = transitions(2000, next_obs=torch.tensor([[3.0, 4.0], [-3.0, -4.0]]).repeat(1000, 1).expand(2, -1, -1))
    found = model.report(ensemble, batch, generators())
    assert found["reward/mean_predicted"] == pytest.approx([0.5, 50.25])
    assert found["state/nmse"] == pytest.approx([1, 1 + 25])  # half of (30, 40), in deviations of (3, 4)
    assert found["pme/absolute"] == pytest.approx([100 * (1 + 1 + 10) / 3] * 2)  # 9 or 11 times as long as s'


def test_a_report_has_the_declared_metrics_with_and_without_training_rows() -> None:
    batch, ensemble = transitions(64), constant([0, 0, 0], 0.0)
    assert set(model.report(ensemble, batch, generators(), batch)) == MODEL_METRICS
    in_sample = {name for name in MODEL_METRICS if "in" in name.split("/")[0].split("_") or "in_sample" in name}
    assert len(in_sample) == 3
    assert set(model.report(ensemble, batch, generators())) == MODEL_METRICS - in_sample


def test_a_diverged_model_is_reported_and_not_a_crash() -> None:
    ensemble = constant([0, 0, 0], 0.0)
    ensemble.net.flat[:3] = math.nan  # the first seed
    ensemble.net.parameter("/2.bias")[1, :, 2] = math.inf
    found = model.report(ensemble, transitions(64), generators())
    assert not np.isfinite(found["reward/mse"]).any()
    assert math.isnan(found["inflation/share"][0])
    assert found["inflation/share"][1] == 1


# Increments: on the same ensembles, and by hand


def test_increments_are_judged_entry_by_entry_and_still_ones_left_out() -> None:
    """Three entries that move, by 1, 0.01 and 1e-4, and two that do not."""
    signs = torch.tensor([1.0, -1.0]).double().repeat(50)
    moves = signs[:, None] * torch.tensor([1.0, 0.01, 1e-4, 0.0, 1e-8]).double()
    variance = torch.tensor([4.0, 1e-4, 1e-8 / 4, 1.0, 1.0]).double()
    found = model.increment_fit(moves * torch.tensor([1.5, 3.0, 1.0, 1.0, 9.0]), variance, 1.2 * moves, moves, 1e-3)
    assert found["live"] == 3
    assert found["below_floor"] == pytest.approx(2 / 3)
    assert found["sd_ratio"] == pytest.approx((2 * 1 * 0.5) ** (1 / 3))
    assert found["inflated"] == 1
    found = model.increment_fit(moves * torch.tensor([1.5, 3.0, 0.9, 1.0, 9.0]), variance, 1.09 * moves, moves, 1e-3)
    assert found["nmse"] == pytest.approx((0.25 * 4 * 0.01) ** (1 / 3))
    assert found["r2"] == pytest.approx(0.75)  # the entry in the middle
    assert found["inflated"] == 0  # 1.09 squared is 1.19


def test_predicting_no_change_knows_nothing_of_increments_and_the_noise_floor_drowns_them() -> None:
    """Steps of a thousandth: a raw model's deviation is exp(-5) at least; of a direct one the mean is far off, too."""
    obs = normal(2, 4000, 2)
    batch = transitions(4000, obs=obs, next_obs=obs + 0.001 * normal(2, 4000, 2, seed=2))
    found = model.increments(constant([0, 0, 0], -9.999), batch, generators(), slice(0))
    assert found["increment/nmse"] == pytest.approx([1, 1], abs=1e-3)
    assert found["increment/r2"] == pytest.approx([0, 0], abs=1e-3)
    assert found["increment/sd_ratio"] == pytest.approx([1000 * math.exp(-5)] * 2, rel=0.05)
    assert found["increment/below_floor"] == found["increment/inflated"] == [1, 1]
    direct = model.increments(constant([0, 0, 0], -9.999, target="direct"), batch, generators(), slice(0))
    assert direct["increment/nmse"] == pytest.approx([1e6, 1e6], rel=0.1)


def test_increments_of_entries_left_out_do_not_count_but_in_the_scales() -> None:
    obs = torch.zeros(2, 2000, 2)
    wide = normal(2, 2000, 2, seed=2) * torch.tensor([3.0, 4.0])
    batch = transitions(2000, obs=obs, next_obs=wide)
    ensemble = constant([0, 0, 0.5], math.log(0.25))
    ensemble.net.parameter("/2.bias")[..., 5] = -9.0  # the reward's variance is another
    both, one = (model.increments(ensemble, batch, generators(), part) for part in (slice(0), slice(1, 2)))
    assert (both["increment/live"], one["increment/live"]) == ([2, 2], [1, 1])
    assert one["increment/sd_ratio"] == pytest.approx([0.5 / 3] * 2, rel=0.05)
    assert both["increment/sd_ratio"] == pytest.approx([0.5 / math.sqrt(12)] * 2, rel=0.05)
    for found in (both, one):
        assert found["increment/over_reward"] == pytest.approx([25 / 0.25] * 2, rel=0.05)


def test_increments_are_those_of_elites_and_of_each_seed() -> None:
    ensemble = constant([0, 0, 0.5], 0.0)
    ensemble.net.parameter("/2.bias")[:, 0, :2] = 5.0
    ensemble.elites = torch.tensor([[1, 2], [0, 1]])  # the second seed chose the bad member
    obs = normal(2, 2000, 2)
    batch = transitions(2000, obs=obs, next_obs=obs + normal(2, 2000, 2, seed=2))
    found = model.increments(ensemble, batch, generators(), slice(0))
    assert found["increment/nmse"] == pytest.approx([1, 1 + 2.5**2], rel=0.1)
    assert found["increment/inflated"] == [0, 1]  # noise of the right size; two members that disagree by 5


def test_increments_of_a_diverged_model_and_of_a_world_that_stands_still_are_no_numbers() -> None:
    diverged = constant([0, 0, 0], 0.0)
    diverged.net.flat[:3] = math.nan  # the first seed
    found = model.increments(diverged, transitions(64), generators(), slice(0))
    for name in ("nmse", "r2", "sd_ratio", "inflated"):
        assert [math.isnan(value) for value in found[f"increment/{name}"]] == [True, False], name
    still = transitions(64, obs=torch.ones(2, 64, 2), next_obs=torch.ones(2, 64, 2))
    found = model.increments(constant([0, 0, 0], 0.0), still, generators(), slice(0))
    assert found["increment/live"] == [0, 0]
    assert found.keys() == {*INCREMENT_METRICS}
    for name in INCREMENT_METRICS - {"increment/live", "increment/over_reward"}:
        assert math.isnan(found[name][0]), name


# The reward's share of the gradient


def trained(**switches: object) -> Ensemble:
    small = {"members": 3, "elites": 2, "model_width": 8, "model_layers": 2, "weight_decay": (0, 0, 0)}
    ensemble = Ensemble(EnsembleConfig(**{**small, **switches}), 2, 1, [0, 1])
    ensemble.fit_normalisers(transitions(64))
    return ensemble


@pytest.mark.parametrize("rows", [64, 40])  # 40 are filled up to 64 inside
@pytest.mark.parametrize("normalised", [False, True])
def test_gradient_norms_are_those_of_the_loss_written_out(rows: int, normalised: bool) -> None:
    ensemble, batch = trained(normalise_targets=normalised), transitions(rows)
    found = gradient_norms(ensemble, batch)
    for s in (0, 1):
        norms = []
        for e in range(3):
            w = [ensemble.net.parameter(f"/{i}.kernel")[s, e].double() for i in range(3)]
            w[1].requires_grad_()
            x = torch.cat([batch["obs"][s], batch["action"][s]], 1)
            x = ((x - ensemble.input_mean[s]) / ensemble.input_std[s]).double()
            out = F.silu(F.silu(x @ w[0]) @ w[1]) @ w[2]  # biases start at 0
            y = torch.cat([batch["next_obs"][s] - batch["obs"][s], batch["reward"][s, :, None]], 1).double()
            y = (y - ensemble.target_mean[s]) / ensemble.target_std[s]
            log_variance = 0.5 - F.softplus(0.5 - out[:, 3:])
            log_variance = -10 + F.softplus(log_variance + 10)
            loss = ((out[:, :3] - y) ** 2 * (-log_variance).exp() + log_variance) / (3 * rows)
            norms.append([torch.autograd.grad(part.sum(), w[1], retain_graph=True)[0].norm() for part in loss.T])
            state = torch.autograd.grad(loss[:, :2].sum(), w[1])[0].norm()
            norms[-1] = [state, norms[-1][2]]
        state, reward = torch.tensor(norms).mean(0)
        assert found["state"][s].item() == pytest.approx(state.item(), rel=1e-4)
        assert found["reward"][s].item() == pytest.approx(reward.item(), rel=1e-4)
        assert found["share"][s].item() == pytest.approx((reward / state).item(), rel=1e-4)


def test_a_reward_that_the_last_layer_ignores_has_no_share() -> None:
    ensemble = trained()
    ensemble.net.parameter("/2.kernel")[..., [2, 5]] = 0.0  # the reward's mean and log-variance
    found = gradient_norms(ensemble, transitions(64))
    assert (found["reward"] == 0).all()
    assert (found["state"] > 0).all()
    assert (found["share"] == 0).all()


def test_a_reward_network_of_its_own_is_measured_there() -> None:
    found = gradient_norms(trained(separate_reward=True), transitions(64))
    assert (found["reward"] > 0).all()


def test_measuring_leaves_the_ensemble_as_it_was() -> None:
    measured, alone = trained(), trained()
    batch = transitions(64)
    for ensemble in (measured, alone, measured, alone):
        ensemble.update(batch)
        if ensemble is measured:
            model.report(ensemble, batch, generators(), batch)
            assert not measured.net.flat.grad.any()
    for name, values in measured.state().items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(alone.state()[name])), name


# Critics


def test_a_policy_without_entropy_has_no_soft_return_and_no_temperature():
    rng = stream(0, "episodes")
    lengths = (12, 7)
    episodes = [Episode(np.zeros((n, 1)), np.zeros((n, 1)), rng.standard_normal(n), terminated=False) for n in lengths]
    q = rng.standard_normal(sum(lengths))
    plain = against_return(episodes, q, None, 0.9, math.nan, 4)
    soft = against_return(episodes, q, np.zeros(len(q)), 0.9, 1.0, 4)
    assert list(plain) == ["q", "mc", "bias"]
    assert list(soft) == ["q", "mc", "mc_soft", "bias", "bias_soft"]
    assert plain == {name: soft[name] for name in plain}
    assert soft["mc_soft"] == soft["mc"]
    assert all(math.isnan(value) for value in against_return(episodes, q, None, 0.9, 1.0, 13).values())
