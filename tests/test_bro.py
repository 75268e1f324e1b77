"""BRO beyond the arrays of `test_parity_bro.py`: probes, derivatives, acting, resets, blocks, checkpoints, cost."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import probes
import test_online
from dynarep.agents import bro
from dynarep.agents.bro import BRO
from dynarep.agents.squashed import choose
from dynarep.configs.bro import BROConfig
from dynarep.replay import draw, normal
from dynarep.streams import stream
from test_sac import ACTION, BATCH, OBS, filled, generators, transitions

SMALL = {"critic_width": 16, "actor_width": 8, "quantiles": 8, "batch_size": BATCH, "updates_per_step": 3, "resets": ()}


def build(seeds=(0,), obs=OBS, action=ACTION, **settings) -> BRO:
    return BRO(BROConfig(**(SMALL | settings)), obs, action, seeds)


def noise_of(seeds, size=BATCH, action=ACTION) -> list[torch.Tensor]:
    return list(normal(generators(seeds, "noise"), (3, size, action)).unbind(1))


def spread(agent: BRO) -> BRO:
    """Make critics and targets four different functions that disagree either way, and all biases something."""
    for i, net in enumerate((agent.actor, agent.optimist, agent.critic, agent.target)):
        net.flat += 0.1 * torch.randn(net.flat.shape, generator=torch.Generator().manual_seed(i))
    return agent


def check_gradient(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Small entries are differences of large numbers: their rounding is measured by the largest entry."""
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def differences(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


# -- probes ------------------------------------------------------------------------------------------------------

ALL = probes.ENDING + probes.CONTINUING
DISCOUNT = 0.8


def learner(chosen, **settings) -> BRO:
    fast = {"critic_width": 32, "actor_width": 32, "lr": 4e-3, "target_rate": 0.1, "discount": DISCOUNT}
    fast |= {"updates_per_step": 50, "initial_temperature": 1e-3, "target_entropy": -3.0}
    return build(range(len(chosen)), probes.OBS, probes.ACTION, **(fast | settings))


def learned(chosen, steps: int, **settings) -> BRO:
    agent, replay = learner(chosen, **settings), probes.replay(chosen)
    for step in range(steps):
        agent.learn(replay, step)
    return agent


def check_probes(agent: BRO, chosen) -> None:
    rows = probes.transitions(chosen, 256, seed=1)
    values, actions = agent.q(rows["obs"], rows["action"]), agent.act(rows["obs"])
    for i, probe in enumerate(chosen):
        obs, action = rows["obs"][i], rows["action"][i]
        expected = probe.value(obs, action, DISCOUNT)
        torch.testing.assert_close(values[i], expected, rtol=0, atol=0.1, msg=lambda m, p=probe: f"{p.name}: {m}")
        if probe.best is not None:
            where = probe.cares(obs)
            assert where.any()
            torch.testing.assert_close(actions[i, where, 0], probe.best(obs[where, 0]), rtol=0, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "settings"),
    [(ALL, {}), (probes.ENDING[4:], {"optimist": False}), (probes.ENDING[4:], {"pessimism": 1.0})],
    ids=["all", "plain", "pessimistic"],
)
def test_probes_are_learned_in_value_and_action(chosen, settings):
    check_probes(learned(chosen, 15, **settings), chosen)


@pytest.mark.slow
def test_entropy_of_later_actions_is_worth_temperature_times_entropy():
    indifferent, temperature = [p for p in ALL if p.best is None], 0.5
    agent, replay = learner(indifferent, initial_temperature=temperature), probes.replay(indifferent)
    agent._optimisers["temperature"].lr = 0.0
    for step in range(15):
        agent.learn(replay, step)
    rows = probes.transitions(indifferent, 256, seed=1)
    entropy = -agent.log_prob_sample(rows["obs"], generators(range(len(indifferent))))[1].mean(1)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(2)), rtol=0, atol=0.1)  # uniform on [-1, 1]
    values = agent.q(rows["obs"], rows["action"])
    for i, probe in enumerate(indifferent):
        expected = probe.value(rows["obs"][i], rows["action"][i], DISCOUNT, temperature * entropy[i].item())
        # The entropy is skewed from one sample to the next: quantiles of it need not average to its mean.
        torch.testing.assert_close(values[i], expected, rtol=0.03, atol=0.05)


def test_quantiles_settle_where_the_huber_losses_of_a_noisy_reward_do():
    """The asymmetric Huber loss of quantile tau has its minimum where the weighted cut errors cancel."""
    agent = build(quantiles=8)
    rewards = torch.cat([torch.full((1, 24), -2.0), torch.full((1, 8), 6.0)], 1)
    z = torch.zeros(1, 2, BATCH, 8)
    targets = rewards.unsqueeze(-1).expand(1, BATCH, 8)
    for _ in range(400):
        z -= 64.0 * agent._quantile_slope(z, targets).mean(2, keepdim=True)
    tau = (torch.arange(8) + 0.5) / 8
    # three of four rewards are -2: below, the cut error is -1 at most, above 6 - z is cut to 1 for every z < 5
    above = torch.where(tau < 0.75, -2.0 + tau / (3 * (1 - tau)), 6.0 - 3 * (1 - tau) / tau)
    torch.testing.assert_close(z[0, 0, 0], above, rtol=0, atol=1e-3)


# -- derivatives, targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"pessimism": 0.6, "critic_blocks": 1, "actor_blocks": 2}, {"quantiles": 12, "critic_blocks": 3}],
    ids=str,
)
def test_all_steps_follow_the_derivatives_of_the_losses_as_autograd_finds_them(settings, monkeypatch):
    seeds = [0, 1]
    agent = spread(build(seeds, initial_temperature=0.3, **settings))
    last = 1 + 2 * agent.config.actor_blocks
    agent.actor.parameter(f"/{last}.kernel")[..., ACTION:] *= 0.1
    agent.actor.parameter(f"/{last}.bias")[..., ACTION:] = 0.7  # deviations near 1: the KL does not outweigh the values
    rows, noise, pess, alpha = transitions(seeds), noise_of(seeds), agent.config.pessimism, agent.temperature
    steps = {}
    for name, optimiser in agent._optimisers.items():
        flat = optimiser.net.flat
        monkeypatch.setattr(optimiser, "step", lambda n=name, f=flat: steps.setdefault(n, f.grad.clone()))
    agent.update(rows, noise)

    with torch.no_grad():
        ahead = choose(agent.actor(rows["next_obs"]), noise[0])
        # The targets have followed the critics, which have not moved, by a two hundredth.
        y = agent.td_target(rows, ahead.action, ahead.log_prob, alpha)
        agent.target.flat.copy_((agent.target.flat - 0.005 * agent.critic.flat) / 0.995)
        y = agent.td_target(rows, ahead.action, ahead.log_prob, alpha)
        mean, std = agent.policy(rows["obs"])
    for net in (agent.critic, agent.actor, agent.optimist):
        net.flat.grad.zero_()
    z = agent.critic((rows["obs"], rows["action"]))
    agent.quantile_loss(y[:, None, :, None] - z.unsqueeze(-1)).sum().backward()
    check_gradient(steps["critic"], agent.critic.flat.grad)

    chosen = choose(agent.actor(rows["obs"]), noise[1])
    first, second = agent.critic((rows["obs"], chosen.action), frozen=True).unbind(1)
    assert 0 < (first < second).sum() < first.numel()
    value = (first + second) / 2 - pess * (first - second).abs() / 2
    (alpha.unsqueeze(1) * chosen.log_prob - value.mean(-1)).mean(-1).sum().backward()
    check_gradient(steps["actor"], agent.actor.flat.grad)

    shift = agent.optimist((rows["obs"], mean))
    action = (mean + shift + 0.75 * std * noise[2]).tanh()
    first, second = agent.critic((rows["obs"], action), frozen=True).unbind(1)
    policies = (torch.distributions.Normal(m, std) for m in (mean + shift, mean))
    kl = torch.distributions.kl_divergence(*policies).sum(-1).mean(-1)
    value = (first + second) / 2 + agent.adjustment("optimism").view(-1, 1, 1) * (first - second).abs() / 2
    (agent.adjustment("kl_weight") * kl - value.mean((1, 2))).sum().backward()
    check_gradient(steps["optimist"], agent.optimist.flat.grad)

    excess = kl.detach() / ACTION - 0.05
    for name, loss in (("optimism", lambda v: excess * (v - pess)), ("kl_weight", lambda v: -excess * v)):
        raw = agent._scalars[name].flat[:, 0].clone().requires_grad_()
        loss(torch.exp(-10 + 8.75 * (1 + raw.tanh()))).sum().backward()
        torch.testing.assert_close(steps[name][:, 0], raw.grad, rtol=1e-4, atol=1e-6)
    assert all(step.any() for step in steps.values())


def test_targets_bootstrap_every_quantile_unless_the_episode_terminated_and_values_are_as_pessimistic():
    rows, alpha = transitions(), torch.tensor([0.7])
    ended = rows["mask"] == 0
    assert 0 < ended.sum() < BATCH
    for pessimism in (0.0, 0.5, 1.0):
        agent = spread(build(pessimism=pessimism))
        with torch.no_grad():
            ahead = choose(agent.actor(rows["next_obs"]), noise_of([0])[0])
            both = agent.target((rows["next_obs"], ahead.action))
        y = agent.td_target(rows, ahead.action, ahead.log_prob, alpha)
        assert torch.equal(y[ended], rows["reward"][ended].unsqueeze(-1).expand(-1, 8))
        value = (1 - pessimism) * both.mean(1) + pessimism * both.amin(1) - 0.7 * ahead.log_prob.unsqueeze(-1)
        expected = rows["reward"].unsqueeze(-1) + 0.99 * value
        torch.testing.assert_close(y[~ended], expected[~ended], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            online = agent.critic((rows["obs"], rows["action"]))
        value = (1 - pessimism) * online.mean(1) + pessimism * online.amin(1)
        torch.testing.assert_close(agent.q(rows["obs"], rows["action"]), value.mean(-1))


def test_pieces_of_the_pairs_have_the_same_bits_as_all_of_them(monkeypatch):
    agent = build(quantiles=12)
    z, y = torch.randn(2, 2, BATCH, 12), torch.randn(2, BATCH, 12)
    whole = agent._quantile_slope(z, y)
    for pairs in (1, 5000):
        monkeypatch.setattr(bro, "PAIRS", pairs)
        assert torch.equal(agent._quantile_slope(z, y), whole)


def test_an_update_that_nobody_asks_about_is_the_same():
    agents = build(), build()
    for report, agent in enumerate(agents):
        terms = agent.update(transitions(), noise_of([0]), report=bool(report))
        assert bool(terms) == bool(report)
    assert differences(*(agent.state() for agent in agents)) == []


# -- acting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimist", [True, False])
def test_the_optimist_explores_and_the_conservative_actor_is_judged(optimist):
    seeds = [3, 5]
    agent, obs = spread(build(seeds, optimist=optimist)), transitions(seeds, 1)["obs"]
    own = F.pad(obs, (0, 0, 0, 31))
    with torch.no_grad():
        mean, std = (x[:, :1] for x in agent.policy(own))
        shift = agent.optimist((own, agent.policy(own)[0]))[:, :1]
    assert shift.abs().min() > 1e-3
    noise = normal([stream(s, "explore", 7) for s in seeds], (1, ACTION))
    expected = mean + shift + 0.75 * std * noise if optimist else mean + std * noise
    torch.testing.assert_close(agent.explore(obs[:, 0], 7), expected[:, 0].tanh())
    assert (agent.explore(obs[:, 0], 8) != agent.explore(obs[:, 0], 7)).all()
    torch.testing.assert_close(agent.act(obs), mean.tanh())


def test_actions_values_and_samples_do_not_depend_on_how_many_rows_are_asked_about():
    agent, rows = spread(build()), transitions(size=70)
    some = {name: values[:, :45] for name, values in rows.items()}
    torch.testing.assert_close(agent.act(some["obs"]), agent.act(rows["obs"])[:, :45])
    torch.testing.assert_close(agent.q(some["obs"], some["action"]), agent.q(rows["obs"], rows["action"])[:, :45])
    action, log_prob = agent.log_prob_sample(some["obs"], generators([0]))
    chosen = choose(
        agent.actor(F.pad(some["obs"], (0, 0, 0, 19))).detach(),
        F.pad(normal(generators([0]), (45, ACTION)), (0, 0, 0, 19)),
    )
    assert torch.equal(action, chosen.action[:, :45])
    assert torch.equal(log_prob, chosen.log_prob[:, :45])


# -- start, resets -------------------------------------------------------------------------------------------------


def test_networks_start_orthogonal_with_the_references_gains_and_no_biases():
    agent = build(actor_blocks=1)
    for name in ("critic", "actor", "optimist"):
        net = getattr(agent, name)
        last = max(int(slot.split("/")[1].split(".")[0]) for slot in net.slots())
        for slot in net.slots():
            layer, kind = slot.removeprefix("/").split(".")
            for values in net.parameter(slot)[0].numpy().astype(float):
                if kind != "kernel":
                    assert (values == (1.0 if kind == "scale" else 0.0)).all()
                    continue
                heads = np.split(values, 2, -1) if (name, int(layer)) == ("actor", last) else [values]
                gains = {"actor": (2.0, 1.0), "optimist": (1e-4,)}.get(name) if int(layer) == last else (2.0,)
                for head, squared in zip(heads, gains or (2.0,), strict=True):
                    product = head.T @ head if head.shape[0] >= head.shape[1] else head @ head.T
                    np.testing.assert_allclose(product, squared * np.eye(len(product)), atol=4e-6 * squared)
    assert "/3.bias" not in agent.optimist.slots()
    assert torch.equal(agent.target.flat, agent.critic.flat)
    assert not torch.equal(agent.critic.flat[0], agent.critic.flat[1]), "two critics, not one twice"


def test_a_reset_is_a_new_start_of_everything_but_the_buffer():
    seeds, replay = [0, 3], filled([0, 3])
    agent, never, fresh = (build(seeds, resets=resets) for resets in ((2,), (), ()))
    kept = {name: values.clone() for name, values in replay.data.items()}
    for step in range(2):
        agent.learn(replay, step)
        never.learn(replay, step)
    assert differences(agent.state(), never.state()) == []
    agent.learn(replay, 2)
    fresh.learn(replay, 2)  # an agent whose first learning this is
    never.learn(replay, 2)
    assert differences(agent.state(), fresh.state()) == []
    assert len(differences(agent.state(), never.state())) == len(agent.state())
    assert all(torch.equal(replay.data[name], values) for name, values in kept.items())
    agent.learn(replay, 3)
    fresh.learn(replay, 3)
    assert differences(agent.state(), fresh.state()) == []


def test_the_reference_resets_before_the_learning_of_frames_15001_50001_and_so_on():
    """Agent step i, counted from 0, is frame i + 1."""
    frames = [15001, 50001, 250001, 500001, 750001, 1000001, 1500001, 2000001]
    assert [step + 1 for step in BROConfig().reset_steps()] == frames
    assert [step + 1 for step in BROConfig(updates_per_step=3).reset_steps()] == frames
    assert BROConfig(updates_per_step=2).reset_steps() == (15000,)
    assert BROConfig(updates_per_step=2, resets=()).reset_steps() == ()


@pytest.mark.parametrize("resets", [(5, 5), (7, 3), (-1, 4)])
def test_resets_that_make_no_sense_are_an_error(resets):
    with pytest.raises(ValueError, match="resets"):
        BROConfig(resets=resets)


# -- learning, blocks, checkpoints -----------------------------------------------------------------------------------


def test_learning_is_updates_on_rows_and_noise_of_the_steps_own_streams():
    seeds = [0, 3]
    agent, twin, replay = build(seeds), build(seeds), filled(seeds)
    terms = agent.learn(replay, 11)
    picks = draw([stream(s, "replay", 11) for s in seeds], replay.size, (3, BATCH))
    noise = normal([stream(s, "noise", 11) for s in seeds], (3, 3, BATCH, ACTION))
    for k in range(3):
        expected = twin.update(replay.rows(picks[:, k]), noise[:, k].unbind(1))
    assert differences(agent.state(), twin.state()) == []
    assert differences(terms, expected) == []
    assert {value.shape for value in terms.values()} == {(2,)}


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


SIZES = [
    (5, 1, {"critic_width": 8, "updates_per_step": 2}),
    (24, 6, {"critic_width": 40, "actor_width": 24, "quantiles": 20, "updates_per_step": 1}),
    (67, 21, {"critic_width": 104, "actor_width": 64, "batch_size": 96, "quantiles": 52, "updates_per_step": 1}),
    (223, 38, {"critic_width": 128, "actor_width": 64, "batch_size": 64, "quantiles": 100, "updates_per_step": 1}),
]


@pytest.mark.parametrize(
    ("obs", "action", "settings"), [*SIZES[:2], *(pytest.param(*size, marks=pytest.mark.slow) for size in SIZES[2:])]
)
def test_a_seed_has_the_same_bits_in_every_block(obs, action, settings):
    alone = everything([0], obs, action, **settings)
    for block in ([0, 1], [3, 0, 1], list(range(10))) if obs < 60 else ([3, 0, 1],):
        together = everything(block, obs, action, **settings)
        assert [k for k in alone if not torch.equal(alone[k][0], together[k][block.index(0)])] == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_restored_checkpoint_continues_with_the_same_bits_before_and_after_a_reset(at):
    seeds = [0, 2]
    straight, replay = build(seeds, resets=(2,)), filled(seeds)
    for step in range(at):
        straight.learn(replay, step)
    file = io.BytesIO()
    torch.save(straight.state(), file)
    file.seek(0)
    resumed = build(seeds, resets=(2,))
    resumed.load(torch.load(file, weights_only=True))
    for step in range(at, 4):
        for agent in (straight, resumed):
            agent.learn(replay, step)
    assert differences(straight.state(), resumed.state()) == []
    for name in ("optimism", "kl_weight"):
        assert torch.equal(straight.adjustment(name), resumed.adjustment(name))


def online(seeds, **settings):
    agent = BROConfig(**SMALL | {"updates_per_step": 1, "resets": (120,)})
    return test_online.build(seeds, agent, test_online.HOPPER, **settings)


def test_an_online_run_has_the_same_bytes_in_a_block_and_where_it_was_interrupted_just_before_a_reset():
    alone, together = test_online.finish(online([0])), online([3, 0])
    while together.done < 115:
        together.step()
    state = together.state()
    resumed = online([3, 0])
    resumed.load(state)
    resumed.metrics = together.metrics
    test_online.finish(resumed)
    assert test_online.everything(resumed, 1) == test_online.everything(alone, 0)
    recorded = {row.metric for row in alone.metrics.rows[0]}
    assert {"entropy", "temperature", "critic/batch_q", "critic/bias_soft", "optimist/optimism"} <= recorded
    assert {"optimist/kl", "optimist/kl_weight"} <= recorded


# -- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parameters_are_as_many_as_the_references():
    agent = BRO(BROConfig(), 223, 38, [0])
    numbers = {
        name: sum(math.prod(s) for s in getattr(agent, name).slots().values())
        for name in ("critic", "actor", "optimist")
    }
    assert numbers == {"critic": 1_241_188, "actor": 209_996, "optimist": 209_920}


def test_update_flops_are_the_published_counts():
    """Which include the first layers' derivatives by their input: up to 5 % that nobody needs."""
    for sizes, published in (((223, 38), 5.5e9), ((67, 21), 5.0e9), ((24, 6), 4.85e9)):
        assert 0.95 * published < BROConfig().update_flops(*sizes) < published


@pytest.mark.parametrize("settings", [{}, {"optimist": False}, {"critic_blocks": 1, "actor_blocks": 2}], ids=str)
def test_update_flops_count_the_products_that_an_update_makes(settings):
    action = 8  # a product goes back to no fewer columns than that
    agent, rows = build(obs=20, action=action, **settings), transitions(obs=20, action=action)
    with FlopCounterMode(display=False) as counter:
        agent.update(rows, noise_of([0], action=action))
    assert counter.get_total_flops() == agent.config.update_flops(20, action)


def test_a_label_says_what_an_arm_goes_without():
    arms = [{}, {"updates_per_step": 2}, {"optimist": False}, {"resets": ()}]
    labels = [BROConfig(**arm).label() for arm in arms]
    assert labels == ["bro-utd10", "bro-utd2", "bro-utd10-plain", "bro-utd10-noreset"]
