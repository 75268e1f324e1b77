"""SAC beyond the arrays of `test_parity_sac.py`: probes, policy, targets, streams, blocks, checkpoints, cost."""

import io
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import root
from torch.utils.flop_counter import FlopCounterMode

import probes
from dynarep.agents.sac import SAC
from dynarep.configs import Units
from dynarep.configs.sac import SACConfig
from dynarep.initialisers import halves, orthogonal
from dynarep.replay import Replay, draw
from dynarep.streams import stream

OBS, ACTION, BATCH = 5, 2, 32


def build(seeds=(0,), obs=OBS, action=ACTION, **settings) -> SAC:
    return SAC(SACConfig(**({"width": 16, "batch_size": BATCH, "updates_per_step": 2} | settings)), obs, action, seeds)


def generators(seeds, purpose="test") -> list[np.random.Generator]:
    return [stream(seed, purpose) for seed in seeds]


def transitions(seeds=(0,), size=BATCH, obs=OBS, action=ACTION) -> dict[str, torch.Tensor]:
    """What a seed sees depends on the seed alone."""
    parts = []
    for g in generators(seeds, "transitions"):
        part = {"obs": g.standard_normal((size, obs)), "action": g.uniform(-1, 1, (size, action))}
        part |= {"reward": g.standard_normal(size), "next_obs": g.standard_normal((size, obs))}
        parts.append(part | {"mask": (g.random(size) > 0.2) * 1.0})
    return {k: torch.from_numpy(np.stack([p[k] for p in parts]).astype(np.float32)) for k in parts[0]}


def filled(seeds=(0,), size=100, obs=OBS, action=ACTION) -> Replay:
    fields = {"obs": (obs,), "action": (action,), "reward": (), "next_obs": (obs,), "mask": ()}
    replay = Replay(fields, len(seeds), size)
    replay.add(transitions(seeds, size, obs, action))
    return replay


def spread(agent: SAC) -> SAC:
    """Make both critics and their targets four different functions, and the actor one with biases.

    Either critic is the smaller one on some rows: their last kernels have both signs, in turn and opposite.
    """
    for i, net in enumerate((agent.actor, agent.critic, agent.target)):
        g = torch.Generator().manual_seed(i)
        net.flat += 0.1 * torch.randn(net.flat.shape, generator=g)
    for net in (agent.critic, agent.target):
        head = net.parameter(f"/{agent.config.hidden_layers}.kernel")
        head[:, 0, ::2], head[:, 0, 1::2] = head[:, 0, ::2].abs(), -head[:, 0, 1::2].abs()
        head[:, 1] = -head[:, 0]
    return agent


def hold_temperature(agent: SAC, value: float) -> SAC:
    agent._log_temperature.flat.fill_(math.log(value))
    agent._optimisers["temperature"].lr = 0.0
    return agent


# -- probes ------------------------------------------------------------------------------------------------------

ALL = probes.ENDING + probes.CONTINUING
DISCOUNT = 0.8


def learner(count: int, **settings) -> SAC:
    fast = {"width": 32, "lr": 4e-3, "target_rate": 0.1, "discount": DISCOUNT, "updates_per_step": 50}
    return build(range(count), probes.OBS, probes.ACTION, **(fast | settings))


@pytest.fixture(scope="module")
def learned() -> SAC:
    """One agent whose seed i has learned probe i.

    The temperature settles where the entropy is `target_entropy`. At -3 that is below 1e-3 (see the test of the
    settled temperature), so that the values are those of acting best, without an entropy term.
    """
    torch.set_num_threads(1)
    agent, replay = learner(len(ALL), target_entropy=-3.0, initial_temperature=1e-3), probes.replay(ALL)
    for step in range(15):
        agent.learn(replay, step)
    return agent


@pytest.mark.parametrize("i", range(len(ALL)), ids=lambda i: f"{ALL[i].name}-{'on' if ALL[i].continuing else 'ends'}")
def test_probe_is_learned_in_value_and_action(learned, i):
    probe, rows = ALL[i], probes.transitions(ALL, 256, seed=1)
    assert learned.temperature[i] < 3e-3
    obs, action = rows["obs"][i], rows["action"][i]
    values = learned.q(rows["obs"], rows["action"])[i]
    torch.testing.assert_close(values, probe.value(obs, action, DISCOUNT), rtol=0, atol=0.1)
    if probe.best is not None:
        where = probe.cares(obs)
        assert where.any()
        chosen, best = learned.act(rows["obs"])[i, where, 0], probe.best(obs[where, 0])
        torch.testing.assert_close(chosen, best, rtol=0, atol=0.1)


@pytest.mark.parametrize("probe", ALL, ids=lambda p: f"{p.name}-{'on' if p.continuing else 'ends'}")
def test_closed_forms_of_the_probes_solve_the_bellman_equation(probe):
    obs = probes.states(probe, 64, stream(0, "states"))
    grid = torch.linspace(-1, 1, 201)[:, None]
    for bonus in (0.0, 0.3):
        values = torch.stack([probe.value(obs, a.expand(64, 1), 0.9, bonus) for a in grid])
        torch.testing.assert_close(values.amax(0), probe.state_value(obs, 0.9, bonus), rtol=1e-5, atol=1e-5)
        if probe.best is not None:
            chosen = grid[values.argmax(0), 0]
            torch.testing.assert_close(*(x[probe.cares(obs)] for x in (chosen, probe.best(obs[:, 0]))))


def test_entropy_of_later_actions_is_worth_temperature_times_entropy():
    indifferent, temperature = [p for p in ALL if p.best is None], 0.5
    agent = hold_temperature(learner(len(indifferent)), temperature)
    replay, rows = probes.replay(indifferent), probes.transitions(indifferent, 256, seed=1)
    for step in range(15):
        agent.learn(replay, step)
    entropy = -agent.log_prob_sample(rows["obs"], generators(range(len(indifferent))))[1].mean(1)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(2)), rtol=0, atol=0.1)  # uniform on [-1, 1]
    values = agent.q(rows["obs"], rows["action"])
    for i, probe in enumerate(indifferent):
        expected = probe.value(rows["obs"][i], rows["action"][i], DISCOUNT, temperature * entropy[i].item())
        torch.testing.assert_close(values[i], expected, rtol=0, atol=0.1)


def settled(entropy: float) -> np.ndarray:
    """Mean and log std before the tanh, and temperature, at which nothing moves in the probe "action".

    There the actor minimises E[(a - 1/2)^2] - alpha H, and H is `entropy`: three equations in three unknowns.
    """
    n, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()

    def slopes(x: np.ndarray) -> list[float]:
        mean, log_std, alpha = x
        spread = np.exp(log_std) * n
        a = np.tanh(mean + spread)
        slope = 2 * (a - probes.PEAK) * (1 - a**2) + alpha * 2 * a  # by u; the second term: -log(1 - a^2) in -H
        h = log_std + 0.5 * math.log(2 * math.pi * math.e) + weight @ np.log1p(-(a**2))
        return [weight @ slope, weight @ (slope * spread) - alpha, h - entropy]

    return root(slopes, [math.atanh(probes.PEAK), -1.5, 0.05]).x


def test_temperature_and_policy_settle_where_the_entropy_is_the_target():
    agent = learner(2, initial_temperature=0.065)
    replay = probes.replay([p for p in probes.ENDING if p.name == "action"] * 2)
    history = [agent.learn(replay, step)["temperature"] for step in range(24)]
    mean, log_std, alpha = settled(-0.5)
    assert torch.stack(history[-6:]).mean().item() == pytest.approx(alpha, rel=0.08)
    obs = replay.data["obs"]
    ours = agent.policy(obs)
    assert ours[0].mean().item() == pytest.approx(mean, abs=0.05)
    assert ours[1].mean().item() == pytest.approx(log_std, abs=0.1)
    assert -agent.log_prob_sample(obs, generators([0, 1]))[1].mean().item() == pytest.approx(-0.5, abs=0.1)


# -- policy ------------------------------------------------------------------------------------------------------


def constant_policy(mean: float, raw: float) -> SAC:
    agent = build()
    agent.actor.flat.zero_()
    agent.actor.parameter("/2.bias").copy_(torch.tensor([mean] * ACTION + [raw] * ACTION))
    return agent


@pytest.mark.parametrize(("raw", "expected"), [(-1e4, -10.0), (0.0, -4.0), (1e4, 2.0), (0.5, 6 * math.tanh(0.5) - 4)])
def test_log_std_lies_smoothly_between_its_limits(raw, expected):
    _, log_std = constant_policy(0.0, raw).policy(torch.zeros(1, BATCH, OBS))
    torch.testing.assert_close(log_std, torch.full((1, BATCH, ACTION), expected))


def test_log_probability_is_the_change_of_variables():
    agent, obs = spread(build()), transitions()["obs"]
    action, log_prob = agent.log_prob_sample(obs, generators([0]))
    noise = torch.from_numpy(generators([0])[0].standard_normal((1, BATCH, ACTION), dtype=np.float32))
    mean, log_std = (x.detach().double() for x in agent.policy(obs))
    u = mean + log_std.exp() * noise
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - torch.log1p(-u.tanh().square())
    torch.testing.assert_close(action.double(), u.tanh(), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_prob.double(), expected.sum(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mean", [-40.0, 15.0, 40.0])
def test_log_probability_and_its_gradient_are_finite_where_tanh_rounds_to_one(mean):
    agent = constant_policy(mean, 0.0)
    noise = torch.zeros(1, BATCH, ACTION)
    action, log_prob = agent.sample(torch.zeros(1, BATCH, OBS), noise)
    assert (action.abs() == 1).all()
    # log N(u) + log 4 + 2 log cosh, in its limit: 2 |u| - 2 log 2 for each dimension
    density = 4.0 - 0.5 * math.log(2 * math.pi) + 2 * abs(mean) - 2 * math.log(2)
    torch.testing.assert_close(log_prob, torch.full((1, BATCH), ACTION * density))
    log_prob.sum().backward()
    gradient = agent.actor.flat.grad
    assert gradient.isfinite().all()
    assert gradient.any()


def test_actions_without_noise_are_the_tanh_of_the_mean_for_any_number_of_rows():
    agent, obs = spread(build()), transitions(size=70)["obs"]
    some = agent.act(obs[:, :45])
    torch.testing.assert_close(some, agent.act(obs)[:, :45])
    mean = agent.policy(obs[:, :BATCH])[0].detach()
    assert torch.equal(agent.act(obs[:, :BATCH]), mean.tanh())


def test_exploration_is_sampled_anew_in_every_step_and_repeats_in_the_same_step():
    agent, obs = spread(build([3, 5])), transitions([3, 5], 1)["obs"][:, 0]
    first, second = agent.explore(obs, 7), agent.explore(obs, 8)
    assert first.shape == (2, ACTION)
    assert torch.equal(first, agent.explore(obs, 7))
    assert (first != second).all()
    noise = np.stack([stream(s, "explore", 7).standard_normal((1, ACTION), dtype=np.float32) for s in (3, 5)])
    mean, log_std = agent.policy(F.pad(obs[:, None], (0, 0, 0, 31)))
    expected = (mean[:, :1] + log_std[:, :1].exp() * torch.from_numpy(noise)).tanh()
    torch.testing.assert_close(first, expected[:, 0].detach())


def test_value_is_the_smaller_online_critics_of_every_row():
    agent, rows = spread(build()), transitions(size=45)
    plain = agent.values(agent.critic, rows["obs"], rows["action"]).detach()
    assert 0 < plain[0].argmin(0).sum() < 45  # neither critic is the smaller one everywhere
    torch.testing.assert_close(agent.q(rows["obs"], rows["action"]), plain.amin(1))


@pytest.mark.parametrize("layers", [1, 3])
def test_critic_layer_norm_stands_before_every_relu(layers):
    agent, rows = spread(build(critic_layer_norm=True, hidden_layers=layers)), transitions()
    for j in range(2):
        h = torch.cat([rows["obs"], rows["action"]], -1)[0]
        for i in range(layers + 1):
            p = {k: agent.critic.parameter(f"/{i}.{k}")[0, j] for k in ("kernel", "bias")}
            h = h @ p["kernel"] + p["bias"]
            if i < layers:
                scale, shift = (agent.critic.parameter(f"/{i}.{k}")[0, j] for k in ("scale", "shift"))
                h = F.layer_norm(h, (16,), scale, shift, 1e-6).relu()
        ours = agent.values(agent.critic, rows["obs"], rows["action"])[0, j].detach()
        torch.testing.assert_close(ours, h[:, 0], rtol=1e-4, atol=1e-5)


# -- targets and losses --------------------------------------------------------------------------------------------


def test_target_bootstraps_from_the_smaller_target_critic_unless_the_episode_terminated():
    agent, rows, noise = spread(build()), transitions(), torch.randn(1, BATCH, ACTION)
    alpha = torch.tensor([0.7])
    with torch.no_grad():
        action, log_prob = agent.sample(rows["next_obs"], noise)
        both = agent.values(agent.target, rows["next_obs"], action)
    assert 0 < both[0].argmin(0).sum() < BATCH
    y = agent.td_target(rows, action, log_prob, alpha)
    ended = rows["mask"] == 0
    assert 0 < ended.sum() < BATCH
    assert torch.equal(y[ended], rows["reward"][ended])
    expected = rows["reward"] + 0.99 * (both.amin(1) - 0.7 * log_prob)
    torch.testing.assert_close(y[~ended], expected[~ended])


@pytest.mark.parametrize("settings", [{}, {"critic_layer_norm": True}, {"hidden_layers": 1}], ids=str)
def test_both_steps_follow_the_derivatives_of_the_losses_as_autograd_finds_them(settings, monkeypatch):
    seeds = [0, 1]
    agent = spread(build(seeds, initial_temperature=0.3, **settings))
    rows, noise = transitions(seeds), agent.noise(generators(seeds))
    alpha, steps = agent.temperature, {}
    for name in ("critic", "actor"):
        flat = getattr(agent, name).flat
        monkeypatch.setattr(agent._optimisers[name], "step", lambda n=name, f=flat: steps.setdefault(n, f.grad.clone()))
    y = agent.td_target(rows, *(x.detach() for x in agent.sample(rows["next_obs"], noise[0])), alpha)
    agent.update(rows, noise)

    agent.critic.flat.grad.zero_()
    (agent.values(agent.critic, rows["obs"], rows["action"]) - y.unsqueeze(1)).square().mean(-1).sum().backward()
    torch.testing.assert_close(steps["critic"], agent.critic.flat.grad, rtol=1e-4, atol=1e-5)
    agent.actor.flat.grad.zero_()
    action, log_prob = agent.sample(rows["obs"], noise[1])
    both = agent.values(agent.critic, rows["obs"], action, frozen=True)
    assert 0 < both.argmin(1).sum() < both[:, 0].numel()
    (alpha.unsqueeze(1) * log_prob - both.amin(1)).mean(-1).sum().backward()
    torch.testing.assert_close(steps["actor"], agent.actor.flat.grad, rtol=1e-4, atol=1e-6)
    assert all(step.any() for step in steps.values())


def test_where_both_critics_agree_the_actor_climbs_their_mean(monkeypatch):
    found = []
    for distance in (0.0, 1.0):  # apart, the first is the smaller one everywhere and counts alone
        agent, rows = spread(build()), transitions()
        agent.critic.flat[1] = agent.critic.flat[0]
        agent.critic.parameter("/2.bias")[0, 1] += distance
        for name in ("critic", "actor"):
            monkeypatch.setattr(agent._optimisers[name], "step", lambda: None)
        agent.update(rows, agent.noise(generators([0])))
        found.append(agent.actor.flat.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0].any()


def test_an_update_that_nobody_asks_about_is_the_same():
    agents = build(), build()
    for report, agent in enumerate(agents):
        terms = agent.update(transitions(), agent.noise(generators([0])), report=bool(report))
        assert bool(terms) == bool(report)
    states = [agent.state() for agent in agents]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_an_update_changes_with_the_temperature_of_before_not_of_after():
    noise, rows, found = (torch.randn(1, BATCH, ACTION), torch.randn(1, BATCH, ACTION)), transitions(), []
    for held in (True, False):
        agent = spread(build())
        if held:
            hold_temperature(agent, 1.0)
        terms = agent.update(rows, noise)
        found.append((agent.actor.flat, agent.critic.flat, *terms.values()))
        assert terms["temperature"] == 1.0
        assert (agent.temperature == 1.0).all() == held
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_temperature_follows_the_derivative_of_its_loss_by_its_logarithm():
    agent = spread(build(initial_temperature=0.3))
    terms = agent.update(transitions(), agent.noise(generators([0])))
    loss = 0.3 * (terms["entropy"] + 0.5 * ACTION)
    torch.testing.assert_close(terms["temperature_loss"], loss)
    gradient = agent.state()["adam/temperature/first"] / (1 - 0.9)  # Adam itself hides constant factors
    torch.testing.assert_close(gradient[:, 0], loss)
    assert not gradient[:, 1:].any()


def test_target_entropy_counts_action_dimensions():
    assert build(action=6).target_entropy == -3.0
    assert build(action=6, target_entropy=-1.0).target_entropy == -6.0


def test_divergence_is_returned_not_raised_and_stays_in_its_seed():
    replays = [filled([0, 1, 2]), filled([0, 1, 2])]
    replays[1].data["reward"][1] = float("inf")
    agents = [build([0, 1, 2]), build([0, 1, 2])]
    for agent, replay in zip(agents, replays, strict=True):
        for step in range(3):
            terms = agent.learn(replay, step)
    assert not terms["critic_loss"][1].isfinite()
    healthy, sick = ({k: v for k, v in agent.state().items() if v.dim()} for agent in agents)
    assert not sick["critic"].view(3, -1)[1].isfinite().all()
    for name in healthy:
        for seed in (0, 2):
            assert torch.equal(*(state[name].view(3, -1)[seed] for state in (healthy, sick))), name
    assert not agents[1].explore(torch.zeros(3, OBS), 0)[1].isfinite().any()


# -- initialisation ------------------------------------------------------------------------------------------------


def test_orthogonal_kernels_are_uniformly_distributed():
    kernels = np.stack([orthogonal(1.0)(stream(i, "kernel"), 3, 2) for i in range(2000)])
    assert np.abs(kernels.mean(0)).max() < 5 / math.sqrt(3 * 2000)  # a QR decomposition alone has signs of its own
    np.testing.assert_allclose(kernels.var(0), 1 / 3, rtol=0.1)


def test_both_heads_are_drawn_on_their_own():
    mean, log_std = np.split(halves(orthogonal(3.0), orthogonal(1.0))(stream(0, "heads"), 8, 6), 2, -1)
    np.testing.assert_allclose(mean.T @ mean, 9 * np.eye(3), atol=1e-12)
    np.testing.assert_allclose(log_std.T @ log_std, np.eye(3), atol=1e-12)
    assert np.abs(mean.T @ log_std).max() > 0.1


def test_a_seed_starts_with_the_same_weights_in_every_block_and_critics_differ():
    together, alone = build([4, 0, 9]), build([0])
    for name in ("actor", "critic", "target"):
        ours, theirs = (getattr(agent, name) for agent in (together, alone))
        for slot in alone.actor.slots() if name == "actor" else alone.critic.slots():
            assert torch.equal(ours.parameter(slot)[1], theirs.parameter(slot)[0])
    kernel = together.critic.parameter("/0.kernel")
    assert len({kernel[s, j].numpy().tobytes() for s in range(3) for j in range(2)}) == 6
    assert torch.equal(together.target.flat, together.critic.flat)


# -- units ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"critic_layer_norm": True}], ids=str)
def test_what_the_reported_units_are_called_changes_no_bit_of_what_is_learned(settings):
    seeds, units = [0, 3], Units(obs=32.0, reward=2.0**-7)
    plain = build(seeds, **settings)
    told = SAC(plain.config, OBS, ACTION, seeds, units=units)
    ours, theirs = filled(seeds), filled(seeds)
    for name, unit in (("obs", units.obs), ("next_obs", units.obs), ("reward", units.reward)):
        theirs.data[name] *= unit
    for step in range(5):
        expected, seen = plain.learn(ours, step), told.learn(theirs, step)
        for name, value in seen.items():
            assert torch.equal(value, expected[name] * (units.reward if name in ("q1", "reward") else 1.0)), name
    before, after = plain.state(), told.state()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []

    some, reported = (replay.rows(torch.arange(45).repeat(2, 1)) for replay in (ours, theirs))
    assert torch.equal(told.explore(reported["obs"][:, 0], 9), plain.explore(some["obs"][:, 0], 9))
    assert torch.equal(told.act(reported["obs"]), plain.act(some["obs"]))
    samples = (
        agent.log_prob_sample(rows["obs"], generators(seeds)) for agent, rows in ((told, reported), (plain, some))
    )
    assert all(torch.equal(*pair) for pair in zip(*samples, strict=True))
    values = plain.q(some["obs"], some["action"])
    assert torch.equal(told.q(reported["obs"], reported["action"]), units.reward * values)


def test_units_that_are_not_declared_are_learned_as_they_come():
    agents = build(), SAC(build().config, OBS, ACTION, [0], units=Units(obs=32.0))
    for agent in agents:
        agent.learn(filled(), 0)
    assert not torch.equal(agents[0].critic.flat, agents[1].critic.flat)


# -- learning, blocks, checkpoints -----------------------------------------------------------------------------------


def test_learning_is_updates_on_rows_and_noise_of_the_steps_own_streams():
    seeds = [0, 3]
    agent, twin, replay = build(seeds), build(seeds), filled(seeds)
    terms = agent.learn(replay, 11)
    picks = draw([stream(s, "replay", 11) for s in seeds], replay.size, (2, BATCH))
    noise = [stream(s, "noise", 11) for s in seeds]
    for k in range(2):
        expected = twin.update(replay.rows(picks[:, k]), twin.noise(noise))
    assert torch.equal(agent.critic.flat, twin.critic.flat)
    assert torch.equal(agent.actor.flat, twin.actor.flat)
    assert all(torch.equal(terms[name], expected[name]) for name in expected)
    names = ("critic_loss", "actor_loss", "temperature_loss", "q1", "entropy", "temperature", "reward")
    assert [terms[name].shape for name in names] == [(2,)] * 7


def everything(seeds, obs, action, **settings) -> dict[str, torch.Tensor]:
    """Learn, act and evaluate; everything that a seed can show, seed axis first."""
    agent, replay = build(seeds, obs, action, **settings), filled(seeds, 77, obs, action)
    for step in range(2):
        seen = agent.learn(replay, step)
    rows = {name: values[:, :45] for name, values in replay.data.items()}  # an odd number of rows on purpose
    seen["explore"], seen["act"] = agent.explore(rows["obs"][:, 0], 5), agent.act(rows["obs"])
    seen["q"] = agent.q(rows["obs"], rows["action"])
    seen["sample"], seen["log_prob"] = agent.log_prob_sample(rows["obs"], generators(seeds))
    seen |= {name: value for name, value in agent.state().items() if value.dim()}
    return {name: value.reshape(len(seeds), -1) for name, value in seen.items()}


@pytest.mark.parametrize(
    ("obs", "action", "settings"),
    [
        (5, 1, {"width": 8}),
        (24, 6, {"width": 64, "batch_size": 64}),
        (67, 21, {"width": 104, "batch_size": 96, "critic_layer_norm": True}),
        (223, 38, {"width": 256, "batch_size": 256, "hidden_layers": 3}),
    ],
)
def test_a_seed_has_the_same_bits_in_every_block(obs, action, settings):
    alone = everything([0], obs, action, **settings)
    for block in ([0, 1], [3, 0, 1], list(range(10))):
        together = everything(block, obs, action, **settings)
        assert [k for k in alone if not torch.equal(alone[k][0], together[k][block.index(0)])] == []


def test_a_restored_checkpoint_continues_with_the_same_bits():
    seeds = [0, 2]
    straight, replay = build(seeds), filled(seeds)
    for step in range(2):
        straight.learn(replay, step)
    file = io.BytesIO()
    torch.save(straight.state(), file)
    file.seek(0)
    resumed = build(seeds)
    resumed.load(torch.load(file, weights_only=True))
    for agent in (straight, resumed):
        agent.learn(replay, 2)
    before, after = straight.state(), resumed.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(straight.temperature, resumed.temperature)


def test_a_checkpoint_is_a_copy():
    agent = build()
    state = agent.state()
    kept = {name: value.clone() for name, value in state.items()}
    agent.learn(filled(), 0)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


# -- cost ----------------------------------------------------------------------------------------------------------


def test_update_flops_are_the_published_counts():
    assert SACConfig().update_flops(67, 21) == pytest.approx(0.685e9, rel=1e-3)
    assert SACConfig().update_flops(15, 4) == pytest.approx(0.570e9, rel=1e-3)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_update_flops_count_the_products_that_an_update_makes(layers):
    agent, rows = build(obs=20, hidden_layers=layers), transitions(obs=20)
    with FlopCounterMode(display=False) as counter:
        agent.update(rows, agent.noise(generators([0])))
    # Scalar heads are no matrix products; the actor's loss goes back to 8 columns of the input, not to the action's.
    heads, too_many = 2 * BATCH * 6 * 2 * 16, 2 * BATCH * 2 * (8 - ACTION) * 16
    assert counter.get_total_flops() == agent.config.update_flops(20, ACTION) - heads + too_many


@pytest.mark.slow
def test_an_update_reaches_a_quarter_of_the_matrix_multiply_rate():
    agent = build(obs=67, action=21, width=256, batch_size=256)
    rows, noise = transitions(size=256, obs=67, action=21), agent.noise(generators([0]))
    x, shares = torch.randn(512, 512), []
    for _ in range(9):
        times = []
        for work, repeats in ((lambda: x @ x, 40), (lambda: agent.update(rows, noise), 10), (lambda: x @ x, 40)):
            start = time.process_time()
            for _ in range(repeats):
                work()
            times.append((time.process_time() - start) / repeats)
        rate = 2 * 512**3 / np.mean([times[0], times[2]])
        shares.append(agent.config.update_flops(67, 21) / times[1] / rate)
    assert np.median(shares) > 0.25
