"""What departs from the reference's ensemble by a switch, and an ensemble whose noise is known."""

import math

import numpy as np
import pytest
import torch

from dynarep.streams import stream
from test_ensemble import ACTION, CELLS, FTFL, OBS, build, everything, generators, soft_clamp, spread, transitions

SWITCHES = [
    {"learnable_bounds": True},
    {"separate_reward": True},
    {"separate_reward": True, "learnable_bounds": True, "elite_score": "relative", "shared_batches": False},
    {"resplit": "never", "elite_score": "raw", "target_statistics": "block", "target_refit": "welford", **FTFL},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(switches))
def test_a_seed_has_the_same_bits_in_every_block(switches):
    for obs, action in ((OBS, ACTION), (24, 3)):
        alone = everything([0], obs, action, **switches)
        for block in ([0, 1], [3, 0, 1]):
            for name, value in everything(block, obs, action, **switches).items():
                assert torch.equal(value[block.index(0)], alone[name][0]), (name, block, obs)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(switches))
def test_a_restored_checkpoint_continues_with_the_same_bits(switches):
    data, states = transitions(), []
    original, restored = build(**switches), build(**switches)
    original.train_chunk(data, generators([0]), steps=3)
    restored.load(original.state())
    for ensemble in (original, restored):
        ensemble.train_chunk(data, generators([0], "then"), steps=3)
        states.append(ensemble.state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# -- Q2: bounds of the log-variance ------------------------------------------------------------------------------


def test_gradient_of_learned_bounds_is_the_derivative_of_original_mbpos_loss():
    ensemble = build([0, 1], learnable_bounds=True)
    bounds, d = ensemble.head._learned.net, OBS + 1
    g = torch.Generator().manual_seed(0)
    bounds.flat[:, :d] = torch.randn(2, d, generator=g)
    bounds.flat[:, d : 2 * d] = -3 + torch.randn(2, d, generator=g)
    out, y = 3 * torch.randn(2, 7, 32, 2 * d, generator=g), torch.randn(2, 1, 32, d, generator=g)
    high = bounds.flat[:, :d].double().requires_grad_()
    low = bounds.flat[:, d : 2 * d].double().requires_grad_()
    m, u = out.double().requires_grad_().chunk(2, -1)
    limit = high[:, None, None] - torch.nn.functional.softplus(high[:, None, None] - u)
    log_variance = low[:, None, None] + torch.nn.functional.softplus(limit - low[:, None, None])
    loss = ((m - y) ** 2 * (-log_variance).exp() + log_variance).mean((2, 3)).sum()
    penalty = 0.01 * (high.sum(1) - low.sum(1))
    (loss + penalty.sum()).backward()
    mse, term = ensemble.head.terms(out, y)
    ensemble.head.slope(out, y)
    torch.testing.assert_close((mse + term).sum().double(), loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(bounds.flat.grad[:, :d].double(), high.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bounds.flat.grad[:, d : 2 * d].double(), low.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ensemble.head.step()["bounds_loss"].double(), penalty.detach(), rtol=1e-5, atol=0)


def test_bounds_that_were_not_learned_yet_are_the_fixed_ones():
    fixed, learned = spread(build()), spread(build(learnable_bounds=True, bounds_penalty=0.0))
    data = {name: values[:, :32] for name, values in transitions().items()}
    for name, value in fixed.update(data).items():
        torch.testing.assert_close(learned.update(data)[name] if name == "mse_loss" else value, value)
    torch.testing.assert_close(learned.net.flat, fixed.net.flat, rtol=0, atol=1e-6)


# -- Q3, Q4: elites ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "normalise"), CELLS)
@pytest.mark.parametrize("score", ["network", "raw", "relative"])
def test_the_elites_score_is_in_the_stated_units(target, normalise, score):
    ensemble = spread(build([0, 1], target=target, normalise_targets=normalise, elite_score=score))
    data = transitions([0, 1])
    data["next_obs"][..., 2] = 7.0  # constant as a direct target
    ensemble.fit_normalisers(data)
    y, p = ensemble.targets(data).double(), ensemble.predict(data["obs"], data["action"])
    guess = torch.cat([p.next_obs, p.reward.unsqueeze(-1)], -1).double()
    if target == "residual":
        guess[..., :-1] -= data["obs"].unsqueeze(1)
    error, variance = (guess - y.unsqueeze(1)).square(), y.var(1, correction=0)[:, None, None]
    if score == "relative":
        expected = torch.where(variance > 0, error / variance, 0.0).mean((2, 3))
    else:
        unit = ensemble.target_std.double()[:, None, None] if score == "network" else 1.0
        expected = (error / unit**2).mean((2, 3))
    torch.testing.assert_close(ensemble.score(data).double(), expected, rtol=1e-3, atol=1e-6)


def test_a_rare_contact_cannot_choose_the_elites_by_any_score():
    for score in ("network", "raw", "relative"):
        ensemble, data = build(elite_score=score, **FTFL), transitions()
        data["next_obs"][..., 0] = 0.0
        ensemble.fit_normalisers(data)
        data["next_obs"][:, 0, 0] = 1.0  # 1e6 standard deviations of the training part
        assert ensemble.score(data).max() < 300, score


def test_a_split_for_good_never_moves_a_transition_to_the_other_side():
    ensemble = build([0, 1], resplit="never")
    smaller, larger = ensemble._split(1003, []), ensemble._split(5000, [])
    for parts, size in ((smaller, 1000), (larger, 5000)):  # rows 1000 to 1002 wait for their group
        held, train = parts
        assert (held.shape, train.shape) == ((2, size // 5), (2, size * 4 // 5))
        for s in range(2):
            assert sorted([*held[s].tolist(), *train[s].tolist()]) == list(range(size))
    assert torch.equal(larger[0][:, :200], smaller[0])
    assert torch.equal(build([1], resplit="never")._split(5000, [])[0][0], larger[0][1])
    assert not torch.equal(larger[0][0], larger[0][1])
    places = np.bincount(larger[0].flatten().numpy() % 5, minlength=5)
    assert np.abs(places / 400 - 1).max() < 0.2  # any of five, alike
    with pytest.raises(ValueError, match=r"needs 5 transitions or more \(1 / holdout\), got 4"):
        ensemble._split(4, [])


def test_chunks_learn_from_one_part_for_good_if_they_are_told_to(monkeypatch):
    ensemble, data = build([0, 1], resplit="never"), transitions([0, 1])
    data["reward"] = torch.arange(200).float().repeat(2, 1)
    learned, scored = [], []
    monkeypatch.setattr(ensemble, "update", lambda batch, report: learned.append(batch["reward"]) or {})
    monkeypatch.setattr(ensemble, "score", lambda b, counts: scored.append(b["reward"]) or torch.zeros(2, 7))
    for _ in range(3):
        ensemble.train_chunk(data, generators([0, 1]), steps=50)
    assert torch.equal(scored[0], scored[2])
    for s in range(2):
        assert not {*torch.stack(learned)[:, s].flatten().tolist()} & {*scored[0][s].tolist()}


# -- Q11, and what 3.5 leaves open -------------------------------------------------------------------------------


def test_initial_kernels_without_the_member_axis_are_lecuns():
    kernel = build(model_width=96, obs=67, action=21, member_fan_in=False).net.parameter("/0.kernel")
    assert kernel.std().item() == pytest.approx(1 / math.sqrt(88), rel=0.02)


def test_statistics_of_blocks_have_one_scale_for_the_state_and_one_for_the_reward():
    ensemble, data = build(target_statistics="block", **FTFL), transitions()
    ensemble.fit_normalisers(data)
    y = ensemble.targets(data)[0].double()
    torch.testing.assert_close(ensemble.target_mean[0].double(), y.mean(0), rtol=1e-5, atol=1e-6)
    state = y[:, :-1].var(0, correction=0).mean().sqrt() + 1e-6
    reward = y[:, -1].std(correction=0) + 1e-6
    expected = torch.tensor([*[state] * OBS, reward], dtype=torch.float64)
    torch.testing.assert_close(ensemble.target_std[0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("refit", ["chunk", "welford"])
def test_target_statistics_come_from_the_training_part_or_from_all_rows(refit):
    ensemble, data = build(target_refit=refit, **FTFL), transitions()
    rows = torch.arange(0, 200, 2).unsqueeze(0)
    ensemble.fit_normalisers(data, rows)
    y, x = ensemble.targets(data)[0], torch.cat([data["obs"], data["action"]], -1)[0]
    used = y[::2] if refit == "chunk" else y
    torch.testing.assert_close(ensemble.target_mean[0], used.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ensemble.target_std[0], used.std(0, correction=0), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(ensemble.input_mean[0], x[::2].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("floor", "expected"), [(False, 1e-6), (True, 1.0)])
def test_a_constant_target_has_deviation_epsilon_or_one(floor, expected):
    ensemble, data = build(epsilon_floor=floor, **FTFL), transitions()
    data["reward"] = torch.full_like(data["reward"], 3.0)
    ensemble.fit_normalisers(data)
    assert ensemble.target_std[0, -1].item() == pytest.approx(expected)
    varied = ensemble.targets(data)[0, :, 0].std(correction=0) + (0.0 if floor else 1e-6)
    assert ensemble.target_std[0, 0].item() == pytest.approx(varied.item(), rel=1e-6)


@pytest.mark.parametrize("target", ["residual", "direct"])
def test_normalised_networks_do_not_feel_the_unit_of_the_reward(target):
    """A power of two changes no mantissa: every weight is the same to the last bit. Raw targets fail this."""
    for normalise in (True, False):
        found = []
        for unit in (1.0, 2.0**-7):
            ensemble, data = build(target=target, normalise_targets=normalise, epsilon=0.0), transitions()
            data["reward"] = data["reward"] * unit
            ensemble.train_chunk(data, generators([0]), steps=5)
            p = ensemble.predict(data["obs"], data["action"])
            found.append((ensemble.net.flat, ensemble.elites, p.next_obs, p.reward / unit))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) == normalise


def test_a_separate_reward_network_leaves_the_state_network_alone():
    for separate in (True, False):
        weights = []
        for unit in (1.0, 100.0):
            ensemble, data = build(separate_reward=separate), transitions()
            data["reward"] = data["reward"] * unit
            ensemble.train_chunk(data, generators([0]), steps=5)
            weights.append([ensemble.net.parameter(f"/{i}.kernel") for i in range(4)])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True)) == separate


def test_separate_networks_have_a_likelihood_each():
    ensemble = spread(build([0, 1], separate_reward=True))
    data = {name: values[:, :32] for name, values in transitions([0, 1]).items()}
    x = ensemble._inputs(data["obs"], data["action"])
    state, reward = ensemble.net(x).detach(), ensemble.net(x, "reward").detach()
    out = ensemble._output(x, ensemble.net).detach()
    total, pieces = torch.zeros(2, dtype=torch.float64), []
    for part, y in ((state, ensemble.targets(data)[..., :-1]), (reward, ensemble.targets(data)[..., -1:])):
        leaf = part.double().requires_grad_()
        m, u = leaf.chunk(2, -1)
        log_variance = soft_clamp(u)
        loss = ((m - y.unsqueeze(1)).square() * (-log_variance).exp() + log_variance).mean((2, 3)).sum(1)
        loss.sum().backward()
        total += loss.detach()
        pieces += leaf.grad.chunk(2, -1)
    y = ensemble._normalised_targets(data)
    (mse, term), slope = ensemble.head.terms(out, y), ensemble.head.slope(out, y)
    torch.testing.assert_close((mse + term).double(), total, rtol=1e-5, atol=0)
    expected = torch.cat([pieces[0], pieces[2], pieces[1], pieces[3]], -1)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-6)


def test_weight_decay_reaches_the_separate_reward_network():
    ensemble = build(separate_reward=True)
    rates = ensemble.config.weight_decay
    kernels = [
        ensemble.net.parameter(f"{branch}/{i}.kernel").square().sum() for branch in ("", "reward") for i in range(5)
    ]
    expected = sum(0.5 * rate * size for rate, size in zip(2 * rates, kernels, strict=True))
    decay = ensemble.update({k: v[:, :32] for k, v in transitions().items()})["weight_decay"][0]
    torch.testing.assert_close(decay, expected, rtol=1e-5, atol=0)


# -- a task whose noise is known ---------------------------------------------------------------------------------

NOISE = 0.3
UNITS = (1.0, 0.5, 0.2, 0.5)  # of three state channels and the reward: the noise lies within the clamp, raw or not
FAR_UNITS = (50.0, 0.5, 0.2, 0.005)  # the first channel's above exp(0.25), the reward's below exp(-5)


def linear(units, size, part) -> dict[str, torch.Tensor]:
    """Linear dynamics and reward, each with Gaussian noise of 0.3 units."""
    g, unit = stream(0, "test", "linear", part), np.array(units)
    x, a = g.standard_normal((size, 3)), g.uniform(-1, 1, (size, 1))
    next_x, r = 0.8 * x + 0.2 * np.roll(x, 1, -1) + 0.5 * a, 0.5 * (x[:, 0] - a[:, 0])
    noise = NOISE * g.standard_normal((size, 4))
    rows = {"obs": x * unit[:3], "action": a, "reward": (r + noise[:, 3]) * unit[3]}
    rows["next_obs"] = (next_x + noise[:, :3]) * unit[:3]
    return {name: torch.from_numpy(values[None].astype(np.float32)) for name, values in rows.items()}


def fitted(units, target, normalise, **switches) -> torch.Tensor:
    """Mean predicted variance on unseen rows, as a multiple of the true one, per output."""
    small = {"model_width": 16, "model_layers": 2, "weight_decay": (0.0,) * 3, "members": 2, "elites": 2}
    fast = {"model_lr": 5e-3, "model_batch_size": 128, "member_fan_in": False} | switches
    ensemble = build(obs=3, action=1, target=target, normalise_targets=normalise, **small, **fast)
    data, unseen, rng = linear(units, 8000, "training"), linear(units, 2000, "unseen"), generators([0])
    for _ in range(5):
        ensemble.train_chunk(data, rng, 100)
    variance = ensemble.predict(unseen["obs"], unseen["action"]).variance.mean((0, 1, 2))
    return variance / (NOISE * torch.tensor(units)) ** 2


@pytest.mark.parametrize(
    ("target", "normalise"),
    [
        ("residual", False),
        ("direct", True),
        pytest.param("residual", True, marks=pytest.mark.slow),
        pytest.param("direct", False, marks=pytest.mark.slow),
    ],
)
def test_predicted_variance_is_the_noise_of_the_task(target, normalise):
    ratio = fitted(UNITS, target, normalise)
    assert (ratio.log().abs() < 0.2).all(), ratio


@pytest.mark.parametrize("normalise", [False, True])
def test_noise_outside_the_clamp_is_predicted_in_normalised_units_alone(normalise):
    ratio = fitted(FAR_UNITS, "direct", normalise)
    if normalise:
        assert (ratio.log().abs() < 0.2).all(), ratio
    else:
        assert ratio[0] < 0.01
        assert ratio[-1] > 10


def test_learned_bounds_follow_noise_that_lies_outside_the_fixed_ones():
    ratio = fitted(FAR_UNITS, "direct", False, learnable_bounds=True)
    assert ratio[0] > 0.013  # fixed: exp(0.5) / 15^2 = 0.0073; bounds start there and move slowly
    assert ratio[-1] < 1000
