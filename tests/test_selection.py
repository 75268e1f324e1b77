"""Rules that choose among synthetic transitions, against numbers by hand and naive loops over the papers' formulas."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from dynarep.agents.ensemble import Prediction
from dynarep.agents.selection import (
    RULES,
    fuse,
    information_loss,
    kept_share,
    kl_to_the_rest,
    make,
    mean_divergence,
)
from dynarep.configs.mbpo import MBPOConfig
from dynarep.streams import stream
from test_mbpo import build, filled

D = 3


def members(size=40, seeds=1, count=7) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(seeds, count, size, D, generator=g)
    return mean, (0.7 * torch.randn(seeds, count, size, D, generator=g)).exp()


def numbers(*values) -> torch.Tensor:
    """One number per member: (1, E, 1, 1)."""
    return torch.tensor(values).view(1, -1, 1, 1)


def rule(name, size=40, seeds=1, **settings):
    """A rule, and everything `choose` wants but the step: prediction, elites, generators, alive."""
    mean, variance = members(size, seeds)
    chosen = make(MBPOConfig(selection=name, infoprop_rows=200, **settings), D, range(seeds))
    elites = torch.tensor([[1, 2, 4, 5, 6]]).repeat(seeds, 1)
    prediction = Prediction(mean[..., :-1], mean[..., -1], variance)
    alive = torch.ones(seeds, size, dtype=torch.bool)
    return chosen, prediction, elites, [stream(s, "rule") for s in range(seeds)], alive


# -- measures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "expected"),
    [((0.0, 2.0, 2.0), 2.0), ((0.0, 1.0, 3.0), 0.5 * (0.5 + 2.0 - 1.0 + math.log(2.0))), ((1.0, 1.0, 1.0), 0.0)],
)
def test_kl_to_the_rest_by_hand(means, expected):
    """Variances 1; the rest of 0 is N(2, 1) in the first case, N(2, 2) in the second."""
    found = kl_to_the_rest(numbers(*means), torch.ones(1, 3, 1, 1), torch.zeros(1, 1, dtype=torch.int64))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_kl_to_the_rest_is_the_literal_formula():
    mean, variance = members()
    chosen = torch.arange(40).view(1, -1) % 7
    found = kl_to_the_rest(mean, variance, chosen)[0]
    for b in range(40):
        c, total = int(chosen[0, b]), 0.0
        for d in range(D):
            mu, var = mean[0, :, b, d].double(), variance[0, :, b, d].double()
            others = [e for e in range(7) if e != c]
            rest = float(mu[others].mean())
            spread = float((mu[others] ** 2 + var[others]).mean()) - rest**2
            own = float(var[c])
            total += 0.5 * (math.log(spread / own) + (own + (float(mu[c]) - rest) ** 2) / spread - 1)
        assert found[b].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("means", "variances", "expected"),
    [
        ((0.0, 2.0), (1.0, 1.0), 0.5),
        ((5.0, 5.0), (1.0, 4.0), 0.5 * (0.5 * math.log(4.0) - math.log(1.6))),
        ((5.0, 5.0), (4.0, 4.0), 0.0),
    ],
)
def test_geometric_divergence_by_hand(means, variances, expected):
    assert mean_divergence(numbers(*means), numbers(*variances)).item() == pytest.approx(expected, abs=1e-6)


def test_geometric_divergence_is_the_literal_formula():
    mean, variance = members()
    found, mu, var = mean_divergence(mean, variance)[0], mean[0].double().numpy(), variance[0].double().numpy()
    total, pairs = np.zeros(40), list(combinations(range(7), 2))
    for i, j in pairs:
        var_g = 1 / (0.5 / var[i] + 0.5 / var[j])
        mu_g = var_g * (0.5 * mu[i] / var[i] + 0.5 * mu[j] / var[j])
        inside = 0.5 * mu[i] ** 2 / var[i] + 0.5 * mu[j] ** 2 / var[j] - mu_g**2 / var_g
        inside += 0.5 * np.log(var[i]) + 0.5 * np.log(var[j]) - np.log(var_g)
        total += 0.5 * inside.sum(-1)
    assert len(pairs) == 21
    np.testing.assert_allclose(found.numpy(), total / 21, rtol=1e-5)


def test_kl_and_divergence_do_not_feel_units_and_origins_where_bits_do():
    mean, variance = members()
    unit, origin = torch.tensor([1e-3, 1.0, 500.0]), torch.tensor([0.0, 3.0, -200.0])
    other = mean * unit + origin, variance * unit.square()
    chosen = torch.arange(40).view(1, -1) % 7
    torch.testing.assert_close(
        kl_to_the_rest(*other, chosen), kl_to_the_rest(mean, variance, chosen), rtol=2e-3, atol=0
    )
    torch.testing.assert_close(mean_divergence(*other), mean_divergence(mean, variance), rtol=1e-3, atol=0)
    bits = [information_loss(fuse(*moments)[1], 1e-6) for moments in ((mean, variance), other)]
    torch.testing.assert_close(bits[1] - bits[0], unit.log2().expand_as(bits[0]), rtol=1e-4, atol=1e-4)


def test_members_that_agree_are_certain():
    mean, variance = (values[:, :1].expand(-1, 7, -1, -1) for values in members())
    chosen = torch.arange(40).view(1, -1) % 7
    assert kl_to_the_rest(mean, variance, chosen).abs().max() < 1e-5
    assert mean_divergence(mean, variance).abs().max() < 1e-5
    middle, fused, epistemic = fuse(mean, variance)
    torch.testing.assert_close(middle, mean[:, 0])
    torch.testing.assert_close(fused, variance[:, 0])
    assert epistemic.max() < 1e-10


def test_fusion_by_hand():
    middle, fused, epistemic = fuse(numbers(0.0, 4.0), numbers(1.0, 1 / 3))
    assert (middle.item(), fused.item(), epistemic.item()) == pytest.approx((3.0, 0.5, 5.0))


def test_information_loss_by_hand():
    variance = torch.tensor([1.0, 4.0, 0.0, 1e-13]) / (2 * math.pi * math.e)
    bits = math.log2(1e6)
    torch.testing.assert_close(information_loss(variance, 1e-6), torch.tensor([bits, bits + 1.0, 0.0, 0.0]))


@pytest.mark.parametrize(("step", "horizon", "share"), [(0, 10, 10 / 22), (9, 10, 1 / 22), (0, 1, 0.5), (1, 2, 1 / 6)])
def test_share_that_m2ac_stores(step, horizon, share):
    assert kept_share(step, horizon) == pytest.approx(share)


# -- rules -------------------------------------------------------------------------------------------------------


def drawn(seed, size, count) -> tuple[torch.Tensor, torch.Tensor]:
    """The members and the noise that a rule draws."""
    g = stream(seed, "rule")
    return torch.from_numpy(g.integers(count, size=size)), torch.from_numpy(
        g.standard_normal((-(-size // 32) * 32, D), dtype=np.float32)
    )


def test_m2ac_stores_the_most_certain_rows_penalised_and_goes_on_with_all():
    m2ac, prediction, elites, generators, alive = rule("m2ac", size=64, seeds=2, m2ac_penalty=0.25)
    alive[1, 44:] = False
    for step in range(2):
        rng = [stream(s, "rule") for s in range(2)] if step else generators
        found = m2ac.choose(step, prediction, elites, rng, alive)
        mean, variance = members(64, 2)
        for s in range(2):
            chosen, noise = drawn(s, 64, 7)
            assert set(chosen.tolist()) == set(range(7))  # elites or not
            u = kl_to_the_rest(mean, variance, chosen.repeat(2, 1))[s]
            rows = torch.arange(64)
            y = mean[s, chosen, rows] + variance[s, chosen, rows].sqrt() * noise
            torch.testing.assert_close(found.next_obs[s], y[:, :-1])
            torch.testing.assert_close(found.reward[s], y[:, -1] - 0.25 * u)
            wanted = math.floor(alive[s].sum().item() * kept_share(step, 10))
            best = set(sorted(range(int(alive[s].sum())), key=lambda b: u[b].item())[:wanted])
            assert set(found.store[s].nonzero()[:, 0].tolist()) == best
        assert torch.equal(found.go_on, alive)


def test_macura_stores_and_goes_on_below_a_running_threshold():
    macura, prediction, elites, _, alive = rule("macura", size=50, macura_scale=1.0, macura_percentile=40.0)
    u = mean_divergence(*members(50))[0]
    found = macura.choose(0, prediction, elites, [stream(0, "rule")], alive)
    threshold = np.percentile(u.numpy(), 40.0)
    assert macura.threshold().item() == pytest.approx(threshold, rel=1e-6)
    assert torch.equal(found.store[0], u < threshold)
    assert found.store.sum() == 20
    assert torch.equal(found.go_on, found.store)
    chosen, noise = (values[:50] for values in drawn(0, 64, 5))  # rows are padded to 64
    mean, variance = members(50)
    where = elites[0, chosen], torch.arange(50)
    y = mean[0][where] + variance[0][where].sqrt() * noise
    torch.testing.assert_close(found.next_obs[0], y[:, :-1])
    torch.testing.assert_close(found.reward[0], y[:, -1])
    after = macura.choose(1, prediction, elites, [stream(0, "rule")], found.go_on)  # later steps set no threshold
    assert macura.rounds == 1
    assert torch.equal(after.store, found.store)


def test_macuras_threshold_is_the_mean_of_the_rounds_it_remembers():
    macura, prediction, elites, rng, alive = rule("macura", macura_scale=3.0, macura_percentile=50, macura_history=4)
    base = []
    for k in range(6):
        wider = prediction._replace(next_obs=prediction.next_obs * (1 + k))
        mean = torch.cat([wider.next_obs, wider.reward.unsqueeze(-1)], -1)
        base.append(3.0 * mean_divergence(mean, wider.variance).median().item())
        macura.choose(0, wider, elites, rng, alive)
        assert macura.threshold().item() == pytest.approx(np.mean(base[-4:]), rel=0.05)  # medians of 40 interpolate
    restored = rule("macura", macura_history=4)[0]
    restored.load(macura.state())
    assert torch.equal(restored.threshold(), macura.threshold())


def test_macuras_percentile_is_of_rows_that_were_started():
    """400 starts are padded to 416 rows; zeros among the scores would lower the threshold."""
    macura, prediction, elites, rng, alive = rule("macura", size=33, macura_scale=1.0, macura_percentile=0.0)
    macura.choose(0, prediction, elites, rng, alive)
    assert macura.threshold().item() == pytest.approx(mean_divergence(*members(33)).min().item())


class Fixed:
    """An ensemble with one prediction."""

    def __init__(self, prediction):
        self.prediction = prediction

    def predict(self, obs, action):
        return self.prediction


def loss_of(mean, variance) -> torch.Tensor:
    _, fused, epistemic = fuse(mean, variance)
    gain = fused / (fused + epistemic)
    return information_loss((1 - gain) * fused, 1e-6)


def test_infoprop_takes_its_limits_from_real_transitions():
    infoprop, *_ = rule("infoprop", infoprop_step_quantile=0.9, infoprop_sum_quantile=0.25, infoprop_horizon=7)
    moments = members(200)
    infoprop.fit(Fixed(Prediction(moments[0][..., :-1], moments[0][..., -1], moments[1])), filled(), [stream(0, "fit")])
    loss = loss_of(*moments)[0].numpy()
    np.testing.assert_allclose(infoprop.most[0].numpy(), np.quantile(loss, 0.9, axis=0), rtol=1e-5)
    np.testing.assert_allclose(infoprop.most_in_sum[0].numpy(), 7 * np.quantile(loss, 0.25, axis=0), rtol=1e-5)


def test_infoprop_stops_at_the_step_limit_or_at_the_sum_of_the_steps():
    infoprop, prediction, elites, rng, alive = rule("infoprop")
    loss = loss_of(*members())
    infoprop.most = loss.amax(1) - 0.01  # the worst row of each output is cut
    found = infoprop.choose(0, prediction, elites, rng, alive)
    cut = (loss > infoprop.most.unsqueeze(1)).any(-1)
    assert 1 <= cut.sum() <= D
    assert torch.equal(found.store, ~cut)
    assert torch.equal(found.go_on, found.store)
    infoprop.most.fill_(math.inf)
    infoprop.most_in_sum = 2.5 * loss.amax(1)
    for _ in range(2):  # the sum starts anew with every rollout
        kept = [infoprop.choose(h, prediction, elites, rng, alive).store for h in range(4)]
        assert kept[0].all()
        assert kept[1].all()
        for h in (2, 3):
            assert torch.equal(kept[h], ((h + 1) * loss <= infoprop.most_in_sum.unsqueeze(1) * (1 + 1e-6)).all(-1))
        assert not kept[3].all()


def test_infoprop_filters_a_members_sample_through_the_fusion():
    """Given member c the sample has mean f + K (mu_c - f) and variance K^2 var_c + (1 - K) fused."""
    size = 40_000
    infoprop, *_ = rule("infoprop")
    mean, variance = (values[:, :, :1].expand(-1, -1, size, -1) for values in members())
    prediction = Prediction(mean[..., :-1], mean[..., -1], variance)
    alive = torch.ones(1, size, dtype=torch.bool)
    found = infoprop.choose(0, prediction, torch.zeros(1, 5, dtype=torch.int64), [stream(0, "rule")], alive)
    y = torch.cat([found.next_obs, found.reward.unsqueeze(-1)], -1)[0].double()
    chosen, _ = drawn(0, size, 7)
    middle, fused, epistemic = (values[0, 0].double() for values in fuse(mean[:, :, :1], variance[:, :, :1]))
    gain = fused / (fused + epistemic)
    for c in range(7):
        own = y[chosen == c]
        expected = gain**2 * variance[0, c, 0].double() + (1 - gain) * fused
        error = own.mean(0) - (middle + gain * (mean[0, c, 0].double() - middle))
        assert (error.abs() < 5 * (expected / len(own)).sqrt()).all()
        torch.testing.assert_close(own.var(0), expected, rtol=5 * math.sqrt(2 / len(own)), atol=0)


@pytest.mark.parametrize("name", RULES)
def test_no_row_that_left_is_stored_or_goes_on(name):
    chosen, prediction, elites, rng, alive = rule(name)
    alive[0, ::2] = False
    found = chosen.choose(0, prediction, elites, rng, alive)
    assert not (found.store & ~alive).any()
    assert not (found.go_on & ~alive).any()
    assert found.store.any()


# -- in the agent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "horizon"), [("none", 1), ("m2ac", 10), ("macura", 10), ("infoprop", 100)])
def test_rollouts_have_the_rules_horizon(name, horizon, monkeypatch):
    assert MBPOConfig(selection=name).horizon() == horizon
    if name == "none":
        return
    agent, steps = build(selection=name, **{f"{name}_horizon": 4}), []
    predict = agent.ensemble.predict
    monkeypatch.setattr(agent._rule, "fit", lambda *args: None)
    monkeypatch.setattr(agent.ensemble, "predict", lambda *rows: steps.append(1) or predict(*rows))
    if name == "macura":
        monkeypatch.setattr(agent._rule, "threshold", lambda: torch.tensor([math.inf]))
    agent.learn(filled(), 0)
    assert len(steps) == 4  # nothing ends: no row is rejected, the task is not listed
    stored = {"m2ac": sum(math.floor(20 * kept_share(h, 4)) for h in range(4))}
    assert agent.synthetic.size == stored.get(name, 80)


def test_limits_are_fitted_after_every_retraining():
    agent, replay = build(selection="infoprop", retrain_every=2), filled()
    limits = []
    for step in range(4):
        agent.learn(replay, step)
        limits.append(agent._rule.most.clone())
    assert limits[0].isfinite().all()
    assert torch.equal(limits[0], limits[1])
    assert not torch.equal(limits[1], limits[2])
    assert torch.equal(limits[2], limits[3])
