"""The ensemble: units, elites, random streams and block invariance. Equations: `test_parity_mbpo.py`.

Rollouts: `test_ensemble_sampling.py`. What departs from the reference by a switch: `test_ensemble_switches.py`.
"""

import io
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynarep.agents.ensemble import Ensemble
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.replay import draw
from dynarep.streams import stream

CELLS = list(product(("residual", "direct"), (False, True)))
FTFL = {"target": "direct", "normalise_targets": True}
OBS, ACTION = 5, 2


def build(seeds=(0,), obs=OBS, action=ACTION, **settings) -> Ensemble:
    defaults = {"model_width": 16, "model_batch_size": 32, "holdout_draws": 500}
    return Ensemble(EnsembleConfig(**(defaults | settings)), obs, action, seeds)


def generators(seeds, purpose="model") -> list[np.random.Generator]:
    return [stream(s, "test", purpose) for s in seeds]


def transitions(seeds=(0,), size=200, obs=OBS, action=ACTION) -> dict[str, torch.Tensor]:
    """Linear dynamics with channels in different units: what a seed sees depends on the seed alone."""
    parts = []
    for s in seeds:
        g = stream(s, "test", "data")
        state, act = g.standard_normal((size, obs)), g.uniform(-1, 1, (size, action))
        step = 0.1 * np.roll(state, 1, -1) + 0.3 * act.sum(-1, keepdims=True) + 0.01 * g.standard_normal((size, obs))
        unit = np.logspace(1, -1, obs)
        reward = 0.01 * state[:, 0] + 0.02 * act[:, 0]
        parts.append({"obs": state * unit, "action": act, "reward": reward, "next_obs": (state + step) * unit})
    return {k: torch.from_numpy(np.stack([p[k] for p in parts]).astype(np.float32)) for k in parts[0]}


def spread(ensemble: Ensemble) -> Ensemble:
    """Make members differ visibly; freshly initialised ones all predict nearly 0."""
    ensemble.net.flat.mul_(2.5)
    return ensemble


def constant(ensemble: Ensemble, mean: torch.Tensor, raw_log_variance: torch.Tensor) -> Ensemble:
    """Make the networks ignore their input: outputs (..., E, D) in network units."""
    ensemble.net.flat.zero_()
    ensemble.net.parameter(f"/{ensemble.config.model_layers}.bias").copy_(torch.cat([mean, raw_log_variance], -1))
    return ensemble


def soft_clamp(u: torch.Tensor) -> torch.Tensor:
    """The specification's two softplus, literally."""
    upper = 0.5 - F.softplus(0.5 - u)
    return -10 + F.softplus(upper + 10)


# -- blocks and streams ------------------------------------------------------------------------------------------


def everything(seeds, obs, action, **settings) -> dict[str, torch.Tensor]:
    """Train two chunks, predict and sample; everything that a seed can show, seed axis first."""
    ensemble = build(seeds, obs, action, model_width=104, **settings)
    data, rng = transitions(seeds, 157, obs, action), generators(seeds)
    seen = {}
    for chunk in range(2):
        seen |= {f"{name}, chunk {chunk}": value for name, value in ensemble.train_chunk(data, rng, steps=2).items()}
    some = data["obs"][:, :45], data["action"][:, :45]  # an odd number of rows on purpose
    seen |= ensemble.predict(*some)._asdict() | dict(zip(("s'", "r"), ensemble.sample(*some, rng), strict=True))
    seen |= {"score": ensemble.score(data)} | ensemble.state()
    return {name: value.reshape(len(seeds), -1) for name, value in seen.items() if value.dim()}


@pytest.mark.parametrize("batch_size", [32, 128])
@pytest.mark.parametrize(("target", "normalise"), CELLS)
def test_a_seed_has_the_same_bits_in_every_block(target, normalise, batch_size):
    for obs, action, shared in ((OBS, ACTION, True), (24, 3, False)):
        cell = {
            "target": target,
            "normalise_targets": normalise,
            "model_batch_size": batch_size,
            "shared_batches": shared,
        }
        alone = everything([0], obs, action, **cell)
        for block in ([0, 1], [3, 0, 1]):
            for name, value in everything(block, obs, action, **cell).items():
                assert torch.equal(value[block.index(0)], alone[name][0]), (name, block, obs)


def test_another_seeds_generator_never_moves_a_draw():
    data, states = transitions([0, 1]), []
    for skipped in (0, 7):
        ensemble, rng = build([0, 1]), generators([0, 1])
        rng[1].random(skipped)
        ensemble.train_chunk(data, rng, steps=2)
        states.append((*ensemble.sample(data["obs"], data["action"], rng), ensemble.net.flat.view(2, -1)))
    for first, second in zip(*states, strict=True):
        assert torch.equal(first[0], second[0])
        assert not torch.equal(first[1], second[1])


def test_a_restored_checkpoint_continues_with_the_same_bits():
    data = transitions()
    original, rng = build(**FTFL), generators([0])
    original.train_chunk(data, rng, steps=3)
    file = io.BytesIO()
    torch.save(original.state(), file)
    file.seek(0)
    restored = build([0], **FTFL)
    restored.net.flat.add_(1.0)
    restored.load(torch.load(file, weights_only=True))
    again = np.random.default_rng()
    again.bit_generator.state = rng[0].bit_generator.state
    results = []
    assert original.elites.tolist() != build().elites.tolist()
    for ensemble, own in ((original, rng), (restored, [again])):
        sample = ensemble.sample(data["obs"], data["action"], own)  # before a chunk refits normalisers and elites
        losses = ensemble.train_chunk(data, own, steps=3)
        results.append(losses | ensemble.state() | dict(zip(("s'", "r"), sample, strict=True)))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# -- units -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["residual", "direct"])
def test_normalised_network_predicts_through_the_affine_map(target):
    ensemble, data = spread(build(target=target, normalise_targets=True)), transitions()
    mu, sigma = torch.linspace(-3, 4, OBS + 1)[None], torch.logspace(-2, 2, OBS + 1)[None]
    ensemble.target_mean, ensemble.target_std = mu, sigma
    m, log_variance = (x.detach().double() for x in ensemble.forward(data["obs"], data["action"]))
    y = mu + sigma * m
    if target == "residual":
        y[..., :-1] += data["obs"].unsqueeze(1)
    got = ensemble.predict(data["obs"], data["action"])
    torch.testing.assert_close(got.next_obs.double(), y[..., :-1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.reward.double(), y[..., -1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.variance.double(), sigma**2 * log_variance.exp(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("target", ["residual", "direct"])
def test_normalisation_by_zero_and_one_is_raw_regression_bit_for_bit(target):
    data, results = transitions(), []
    for normalise in (False, True):
        ensemble = build(target=target, normalise_targets=normalise)
        losses = [ensemble.update({k: v[:, :32] for k, v in data.items()}) for _ in range(3)]
        some = data["obs"], data["action"]
        prediction, sample = ensemble.predict(*some), ensemble.sample(*some, generators([0]))
        results.append([ensemble.net.flat, *prediction, *sample, *losses[-1].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("target", "normalise"), CELLS)
def test_an_oracle_network_yields_the_true_transition_in_every_cell(target, normalise, monkeypatch):
    ensemble, data = build(target=target, normalise_targets=normalise), transitions()
    ensemble.fit_normalisers(data)
    y = (ensemble.targets(data) - ensemble.target_mean[:, None]) / ensemble.target_std[:, None]
    known = ensemble._inputs(data["obs"], data["action"])[0]

    def oracle(x, net):
        x = x.unsqueeze(1).expand(-1, net.members, -1, -1) if x.dim() == 3 else x
        mean = y[0, torch.cdist(x, known).argmin(-1)]
        return torch.cat([mean, torch.full_like(mean, -50.0)], -1)

    monkeypatch.setattr(ensemble, "_output", oracle)
    p = ensemble.predict(data["obs"], data["action"])
    truth = data["next_obs"].unsqueeze(1).expand_as(p.next_obs)
    torch.testing.assert_close(p.next_obs, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.reward, data["reward"].unsqueeze(1).expand_as(p.reward), rtol=1e-5, atol=1e-6)
    assert ensemble.score(data).max() < 1e-9
    state, reward = ensemble.sample(data["obs"], data["action"], generators([0]))
    noise = 6 * math.exp(-5) * ensemble.target_std
    assert ((state - data["next_obs"]).abs() < noise[:, None, :-1]).all()
    assert ((reward - data["reward"]).abs() < noise[:, -1:]).all()


@settings(max_examples=40, deadline=None)
@given(
    cell=st.sampled_from(["residual", "direct"]),
    mean=st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4),
    scale=st.lists(st.floats(-6, 4), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_normalising_and_denormalising_returns_the_transition(cell, mean, scale, seed):
    ensemble, data = build(obs=3, target=cell, normalise_targets=True, model_width=8), transitions([seed], 32, obs=3)
    ensemble.target_mean = torch.tensor([mean])
    ensemble.target_std = 10 ** torch.tensor([scale])
    back = ensemble._raw(ensemble._normalised_targets(data)[:, 0], data["obs"])
    truth = torch.cat([data["next_obs"], data["reward"].unsqueeze(-1)], -1)
    ulp = torch.finfo(torch.float32).eps
    size = truth.abs() + torch.tensor(mean).abs() + F.pad(data["obs"].abs(), (0, 1))
    assert ((back - truth).abs() <= 4 * ulp * size).all()


def test_a_constant_target_channel_is_harmless():
    ensemble, data = build(**FTFL), transitions()
    data["reward"] = torch.full_like(data["reward"], 1.0)
    losses = ensemble.train_chunk(data, generators([0]), steps=20)
    assert all(value.isfinite().all() for value in losses.values())
    _, reward = ensemble.sample(data["obs"], data["action"], generators([0]))
    torch.testing.assert_close(reward, data["reward"], rtol=0, atol=1e-5)


# -- network and loss --------------------------------------------------------------------------------------------


def test_log_variance_is_the_soft_clamp_and_keeps_its_limits():
    u = torch.tensor([-1e4, -50, -12, -10, -9, -5, -1, 0, 0.5, 2, 30, 1e4])
    ensemble = build(obs=len(u) - 1)
    constant(ensemble, torch.zeros(7, len(u)), u.expand(7, -1))
    _, log_variance = ensemble.forward(torch.zeros(1, 32, len(u) - 1), torch.zeros(1, 32, ACTION))
    torch.testing.assert_close(log_variance[0, 3, 7].double(), soft_clamp(u.double()), rtol=0, atol=2e-6)
    assert log_variance.min() >= -10 - 1e-6
    assert log_variance.max() <= 0.5 + 3e-5  # the second softplus lets log(1 + exp(-10.5)) through
    assert log_variance[0, 0, 0, 7].div(2).exp().item() == pytest.approx(0.79, abs=0.005)  # sigma of an output of 0


@pytest.mark.parametrize("members_share_rows", [True, False])
def test_handwritten_gradient_is_the_derivative_of_the_published_loss(members_share_rows):
    ensemble = build([0, 1])
    g = torch.Generator().manual_seed(0)
    out = torch.randn(2, 7, 32, 2 * (OBS + 1), generator=g)
    out[..., OBS + 1 :] *= 6  # reaches both limits of the clamp
    y = torch.randn(2, 1 if members_share_rows else 7, 32, OBS + 1, generator=g)
    reference = out.double().requires_grad_()
    m, u = reference.chunk(2, -1)
    mse = ((m - y) ** 2 * (-soft_clamp(u)).exp()).mean((2, 3)).sum(1)
    log_variance = soft_clamp(u).mean((2, 3)).sum(1)
    (mse + log_variance).sum().backward()
    got = *ensemble.head.terms(out, y), ensemble.head.slope(out, y)
    for ours, theirs in zip(got, (mse.detach(), log_variance.detach(), reference.grad), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-7)


def test_shared_rows_equal_the_same_rows_given_to_every_member():
    data = {k: v[:, :32] for k, v in transitions().items()}
    own = {k: v.unsqueeze(1).expand(-1, 7, *v.shape[1:]) for k, v in data.items()}
    shared, separate = build(), build()
    for name, value in shared.update(data).items():
        torch.testing.assert_close(value, separate.update(own)[name] if name == "mse_loss" else value)
    torch.testing.assert_close(shared.net.flat, separate.net.flat, rtol=0, atol=1e-6)
    assert torch.equal(shared.score(data), separate.score(own))


@pytest.mark.parametrize(
    "settings",
    [{}, {"shared_batches": False}, {"separate_reward": True}, {"members": 1, "elites": 1}, {"learnable_bounds": True}],
    ids=str,
)
def test_an_update_steps_along_the_derivative_of_the_loss_it_returns(settings, monkeypatch):
    ensemble = build([0, 1], **(FTFL | settings))
    if ensemble.config.members > 1:  # of one, the initial kernels are large enough
        spread(ensemble)
    members, shape = ensemble.config.members, (2, 32) if ensemble.config.shared_batches else (2, 7, 32)
    rows = torch.from_numpy(np.random.default_rng(0).integers(200, size=shape))
    data = transitions([0, 1])
    ensemble.fit_normalisers(data)
    batch = {name: values[torch.arange(2).view(-1, *[1] * (len(shape) - 1)), rows] for name, values in data.items()}
    m, log_variance = ensemble.forward(batch["obs"], batch["action"])
    loss = (m - ensemble._normalised_targets(batch)).square() * (-log_variance).exp() + log_variance
    groups = [loss[..., :-1], loss[..., -1:]] if ensemble.config.separate_reward else [loss]
    loss = sum(group.mean((2, 3)).sum(1) for group in groups)
    decay = 0.5 * (ensemble._decay * ensemble.net.flat.square()).view(2, members, -1).sum((1, 2))
    loss.sum().backward()
    expected = ensemble.net.flat.grad + ensemble._decay * ensemble.net.flat
    ensemble.net.flat.grad.zero_()

    monkeypatch.setattr(ensemble._adam, "step", lambda: None)
    terms = ensemble.update(batch)
    torch.testing.assert_close(ensemble.net.flat.grad, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["total_loss"], loss.detach() + decay + terms.get("bounds_loss", 0.0))
    torch.testing.assert_close(terms["grad_norm"], expected.view(2, -1).norm(dim=1))


def test_an_update_that_nobody_asks_about_is_the_same():
    agents, data = (build(learnable_bounds=True), build(learnable_bounds=True)), transitions()
    for report, ensemble in enumerate(agents):
        for start in (0, 32):
            terms = ensemble.update({k: v[:, start : start + 32] for k, v in data.items()}, report=bool(report))
        assert bool(terms) == bool(report)
    states = [ensemble.state() for ensemble in agents]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_minibatches_are_drawn_as_if_one_by_one():
    """All at once, in truth; a seed's numbers would change if that were not the same."""
    found = []
    for chunks in ([3], [1, 1, 1]):
        rng = generators([0, 3])
        found.append(torch.cat([draw(rng, 160, (steps, 32)) for steps in chunks], 1))
    assert torch.equal(*found)


def test_weight_decay_adds_each_layers_rate_times_its_kernel_and_spares_biases(monkeypatch):
    rates, data, found = (1.0, 2.0, 3.0, 4.0, 5.0), {k: v[:, :32] for k, v in transitions().items()}, []
    for weight_decay in (rates, (0.0,) * 5):
        ensemble = build(weight_decay=weight_decay)
        ensemble.net.parameter("/2.bias").fill_(3.0)
        net = ensemble.net.target()
        monkeypatch.setattr(ensemble._adam, "step", lambda: None)
        terms = ensemble.update(data)
        net.flat.copy_(ensemble.net.flat.grad)  # so that slots can be read
        found.append((terms["weight_decay"][0], net))
    expected = sum(0.5 * rate * ensemble.net.parameter(f"/{i}.kernel").square().sum() for i, rate in enumerate(rates))
    torch.testing.assert_close(found[0][0], expected, rtol=1e-5, atol=0)
    assert found[1][0] == 0
    for slot in ensemble.net.slots():
        rate = rates[int(slot[1])] if slot.endswith("kernel") else 0.0
        difference = found[0][1].parameter(slot) - found[1][1].parameter(slot)
        torch.testing.assert_close(difference, rate * ensemble.net.parameter(slot), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("target", "normalise"), CELLS)
def test_ensemble_learns_linear_dynamics(target, normalise):
    data = transitions(size=1000)
    ensemble = build(target=target, normalise_targets=normalise, model_width=48, model_lr=3e-3)
    before = ensemble.score(data)
    for _ in range(2):
        ensemble.train_chunk(data, generators([0]), steps=100)
    p = ensemble.predict(data["obs"], data["action"])
    elites = ensemble.elites[0]
    error = (p.next_obs[0, elites].mean(0) - data["next_obs"][0]).square().mean(0)
    # Of the regressed quantity; the channel with the largest unit is learned in every cell, the reward need not be.
    assert error[0] < 0.35 * ensemble.targets(data)[0, :, 0].var()
    assert normalise or (ensemble.score(data) < before).all()
    if normalise:
        reward_error = (p.reward[0, elites].mean(0) - data["reward"][0]).square().mean()
        assert reward_error < 0.2 * data["reward"].var()


def test_one_member_and_fewer_layers_work():
    ensemble, data = build(members=1, elites=1, model_layers=2, weight_decay=(0.0, 0.0, 0.0)), transitions()
    ensemble.train_chunk(data, generators([0]), steps=1)
    assert ensemble.predict(data["obs"], data["action"]).variance.shape == (1, 1, 200, OBS + 1)
    assert ensemble.sample(data["obs"], data["action"], generators([0]))[1].shape == (1, 200)


def test_many_rows_are_predicted_like_few():
    ensemble, data = spread(build([0, 1], **FTFL)), transitions([0, 1], size=1101)
    ensemble.fit_normalisers(data)
    whole = ensemble.predict(data["obs"], data["action"])
    part = ensemble.predict(data["obs"][:, 1000:], data["action"][:, 1000:])
    for all_rows, last_rows in zip(whole, part, strict=True):
        torch.testing.assert_close(all_rows[:, :, 1000:], last_rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"model_layers": 2}, "weight_decay has 5 rates"), ({"members": 3}, "elites = 5 exceeds members = 3")],
)
def test_inconsistent_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


# -- chunks and elites -------------------------------------------------------------------------------------------


def test_elites_are_the_members_with_the_lowest_holdout_error():
    ensemble, data = build([0, 1], model_lr=1e-30), transitions([0, 1])
    offset = torch.tensor([[3.0, 0, 5, 1, 4, 2, 6], [0, 6, 1, 5, 2, 4, 3]])
    mean = 50 * offset[..., None].expand(-1, -1, OBS + 1)
    constant(ensemble, mean, torch.zeros_like(mean))
    ensemble.train_chunk(data, generators([0, 1]), steps=1)
    assert ensemble.elites.tolist() == [[0, 1, 3, 4, 5], [0, 2, 4, 5, 6]]


def test_score_counts_rows_as_often_as_they_are_drawn():
    ensemble, data = spread(build([0, 1], **FTFL)), transitions([0, 1], size=40)
    ensemble.fit_normalisers(data)
    counts = torch.from_numpy(np.random.default_rng(0).integers(4, size=(2, 40))).float()
    repeated = torch.stack(
        [ensemble.score({k: v.repeat_interleave(counts[s].long(), 1) for k, v in data.items()})[s] for s in range(2)]
    )
    torch.testing.assert_close(ensemble.score(data, counts), repeated, rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_channel_that_is_constant_in_training_cannot_choose_the_elites(normalise):
    ensemble, data = build(target="direct", normalise_targets=normalise), transitions()
    data["next_obs"][..., 0] = 0.0
    ensemble.fit_normalisers(data)
    data["next_obs"][:, 0, 0] = 1.0  # a rare contact, 1e6 standard deviations away
    assert ensemble.score(data).max() < (12.0 if normalise else 1e3)
    y = ensemble._normalised_targets(data)
    assert y[0, 0, 0, 0] == pytest.approx(1e6 if normalise else 1.0)  # the training target is not cut


@pytest.mark.parametrize("shared", [True, False])
def test_a_chunk_learns_and_normalises_on_one_part_and_scores_on_the_other(shared, monkeypatch):
    seeds, size = [0, 1], 203
    ensemble, data = build(seeds, shared_batches=shared, **FTFL), transitions(seeds, size)
    data["reward"] = torch.arange(size).float().repeat(2, 1)  # every row carries its own number
    learned, scored = [], []

    def update(batch, report):
        learned.append(batch["reward"])
        return {}

    def score(batch, counts):
        scored.append((batch["reward"], counts))
        return torch.zeros(2, 7)

    monkeypatch.setattr(ensemble, "update", update)
    monkeypatch.setattr(ensemble, "score", score)
    rng = generators(seeds)
    for chunk in range(2):
        ensemble.train_chunk(data, rng, steps=100)
        rows = torch.stack(learned[-100:], 1)  # (S, steps, [E,] B)
        assert rows.shape == ((2, 100, 32) if shared else (2, 100, 7, 32))
        held, counts = scored[chunk]
        assert held.shape == (2, 40)
        assert (counts.sum(1) == 500).all()
        for s in seeds:
            train = sorted(set(range(size)) - set(held[s].long().tolist()))
            assert set(rows[s].flatten().long().tolist()) == set(train)
            x = torch.cat([data["obs"][s, train], data["action"][s, train]], -1).double()
            torch.testing.assert_close(ensemble.input_mean[s].double(), x.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ensemble.input_std[s].double(), x.std(0, correction=0), rtol=1e-5, atol=2e-6)
            assert ensemble.target_mean[s, -1].item() == pytest.approx(np.mean(train), rel=1e-6)
            assert ensemble.target_std[s, -1].item() == pytest.approx(np.std(train), rel=1e-6)
        if not shared:
            assert not torch.equal(rows[0, 0, 0], rows[0, 0, 1])
    assert not torch.equal(scored[0][0], scored[1][0])  # quirk Q4: a new split in every chunk
