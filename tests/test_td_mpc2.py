"""TD-MPC2 beyond the arrays of `test_parity_td_mpc2.py`: probes, slices, searches, dropout, blocks, resuming, cost."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import probes
import test_online
from dynarep.agents.mppi import Player
from dynarep.agents.td_mpc2 import TDMPC2
from dynarep.audit import contents
from dynarep.configs import EnvironmentConfig
from dynarep.configs.td_mpc2 import TDMPC2Config
from dynarep.experiment import RunConfig
from dynarep.replay import Replay, draw_slices
from dynarep.streams import stream
from dynarep.two_hot import TwoHot

OBS, ACTION = 5, 2
SMALL = {"width": 16, "encoder_width": 16, "latent": 16, "batch_size": 32, "bins": 21}
SMALL |= {"plan_samples": 32, "plan_elites": 8, "plan_priors": 8, "plan_iterations": 2}
EPISODE = 10


def build(seeds=(0,), obs=OBS, action=ACTION, starts=None, **settings) -> TDMPC2:
    starts = [list(range(0, 101, EPISODE)) for _ in seeds] if starts is None else starts
    return TDMPC2(TDMPC2Config(**SMALL | settings), obs, action, seeds, starts=starts)


def filled(seeds=(0,), size=100, obs=OBS, action=ACTION) -> Replay:
    """What a seed sees depends on the seed alone."""
    replay = Replay(
        {"obs": (obs,), "action": (action,), "reward": (), "next_obs": (obs,), "mask": ()}, len(seeds), size
    )
    parts = []
    for g in (stream(seed, "transitions") for seed in seeds):
        part = {"obs": g.standard_normal((size, obs)), "action": g.uniform(-1, 1, (size, action))}
        part |= {"reward": g.standard_normal(size), "next_obs": g.standard_normal((size, obs))}
        parts.append(part | {"mask": np.ones(size)})
    replay.add({name: np.stack([part[name] for part in parts]) for name in parts[0]})
    return replay


def spread(agent: TDMPC2) -> TDMPC2:
    """Make all networks different functions with large outputs and biases, and let learning have begun."""
    for name, net in agent._nets().items():
        for rows, seed in zip(net.flat.view(len(agent.seeds), -1), agent.seeds, strict=True):
            rows += 0.3 * torch.from_numpy(stream(seed, "spread", name).standard_normal(len(rows), dtype=np.float32))
    agent._learning = True
    return agent


# -- probes ----------------------------------------------------------------------------------------------------------

ALL, DISCOUNT, LENGTH = probes.CONTINUING, 0.5, 4


def episodes(count: int) -> Replay:
    """Seed i's episodes of probe i with random actions; of those whose phase stays, every episode has its own."""
    replay = Replay(probes.FIELDS, len(ALL), count * LENGTH)
    obs = torch.stack([probes.states(probe, count, stream(0, "probe", i)) for i, probe in enumerate(ALL)])
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in probes.FIELDS}
    for t in range(LENGTH):
        drawn = [stream(0, "actions", i, t).uniform(-1, 1, (count, probes.ACTION)) for i in range(len(ALL))]
        action = torch.from_numpy(np.stack(drawn)).float()
        reward = torch.stack([p.reward(o[:, 0], o[:, 1], a[:, 0]) for p, o, a in zip(ALL, obs, action, strict=True)])
        next_obs = torch.stack([p.next_obs(o, a) for p, o, a in zip(ALL, obs, action, strict=True)])
        step = {
            "obs": obs,
            "action": action,
            "reward": reward,
            "next_obs": next_obs,
            "mask": torch.ones(len(ALL), count),
        }
        for name, values in step.items():
            rows[name].append(values)
        obs = next_obs
    replay.add({name: torch.stack(values, 2).flatten(1, 2) for name, values in rows.items()})
    return replay


@pytest.fixture(scope="module")
def learned() -> TDMPC2:
    """One agent whose seed i has learned probe i."""
    torch.set_num_threads(1)
    count = 250
    fast = {"width": 32, "encoder_width": 32, "latent": 32, "lr": 3e-3, "encoder_lr_factor": 1.0, "rate": 0.1}
    fast |= {"reward": 1.0, "value": 1.0, "discount": DISCOUNT, "bins": 41, "bins_limit": 2.0}
    fast |= {"pretrain": False, "updates_per_step": 700}
    fast |= {"plan_samples": 64, "plan_iterations": 4, "plan_temperature": 20.0}
    starts = [list(range(0, count * LENGTH + 1, LENGTH)) for _ in ALL]
    agent = build(range(len(ALL)), probes.OBS, probes.ACTION, starts, **fast)
    agent.learn(episodes(count), count * LENGTH - 1)
    return agent


EACH_PROBE = pytest.mark.parametrize("i", range(len(ALL)), ids=lambda i: ALL[i].name)


@pytest.mark.slow
@EACH_PROBE
def test_probe_is_learned_in_value_and_action(learned, i):
    probe, rows = ALL[i], probes.transitions(ALL, 256, seed=1)
    obs, action = rows["obs"][i], rows["action"][i]
    values = learned.q(rows["obs"], rows["action"])[i]
    torch.testing.assert_close(values, probe.value(obs, action, DISCOUNT), rtol=0, atol=0.2)
    if probe.best is not None:
        where = probe.cares(obs)
        assert where.any()
        chosen, best = learned.act(rows["obs"])[i, where, 0], probe.best(obs[where, 0])
        torch.testing.assert_close(chosen, best, rtol=0, atol=0.15)


@pytest.mark.slow
def test_planner_repairs_a_policy_with_the_model_and_critics(learned):
    rows = probes.transitions(ALL, 8, seed=2)
    agent = build(range(len(ALL)), probes.OBS, probes.ACTION, **dict(learned.config))
    agent.load(learned.state())
    agent.actor.parameter("/2.bias")[..., 0] -= 0.7  # of the mean
    numbers = np.arange(8)[None].repeat(len(ALL), 0)
    plain, found = agent.act(rows["obs"]), agent.player(0).act(rows["obs"], numbers, 0 * numbers)
    for i, probe in enumerate(ALL):
        if probe.best is not None:
            where = probe.cares(rows["obs"][i])
            best = probe.best(rows["obs"][i, where, 0])
            off, off_planned = ((a[i, where, 0] - best).abs().mean() for a in (plain, found))
            assert off > 0.3
            assert off_planned < 0.15, probe.name


# -- slices ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=3),
    under_way=st.integers(0, 8),
    capacity=st.integers(3, 60),
    length=st.integers(1, 3),
)
def test_slices_lie_within_finished_episodes_that_are_still_stored(lengths, under_way, capacity, length):
    """All that do are drawn, and nothing else, wherever there are any."""
    steps = max(map(sum, lengths)) + under_way
    starts = [np.cumsum([0, *own]).tolist() for own in lengths]  # of a shorter seed, the last one lasts longer
    stored = max(0, steps - capacity), steps
    if steps < length:
        return
    generators = [np.random.default_rng(k) for k in range(len(lengths))]
    drawn = draw_slices(generators, starts, stored, length, 600)
    assert drawn.shape == (len(lengths), 600)
    for own, bounds in zip(drawn, starts, strict=True):
        whole = [t for first, end in pairwise(bounds) for t in range(max(first, stored[0]), end - length + 1)]
        if whole:
            assert set(own.tolist()) == set(whole)
        else:
            assert own.min() >= min(max(bounds[-1], stored[0]), steps - length)
            assert own.max() + length <= steps


def test_slices_are_drawn_alike_whatever_their_episodes_length():
    drawn = draw_slices([np.random.default_rng(0)], [[0, 4, 14, 16]], (0, 20), 3, 30_000)[0]
    found, counts = np.unique(drawn, return_counts=True)
    assert found.tolist() == [0, 1, *range(4, 12)]
    assert counts.min() > 2800
    assert counts.max() < 3200


def test_an_update_sees_consecutive_steps_of_finished_episodes_up_to_their_last_observation():
    """Rows say when they are from. The ring has overwritten the first episodes, and the last one is under way."""
    length, size, steps = 7, 40, 61
    starts = list(range(0, steps, length))
    replay = Replay({"obs": (1,), "action": (1,), "reward": (), "next_obs": (1,), "mask": ()}, 1, size)
    for t in range(steps):
        row = {"obs": t, "action": t, "reward": t, "next_obs": t + 0.5, "mask": 1.0}
        shapes = {name: values.shape[2:] for name, values in replay.data.items()}
        replay.add({name: np.full((1, 1, *shapes[name]), value) for name, value in row.items()})
    agent, seen = build(obs=1, action=1, starts=[starts], pretrain=False, batch_size=256), []
    agent.update = lambda batch, noise: seen.append(batch) or {}
    agent.learn(replay, steps - 1)
    (batch,) = seen
    first = batch["obs"][0, 0, :, 0]
    oldest, running = steps - size, starts[-1]
    whole = {t for t in range(oldest, running) if t // length == (t + 2) // length}
    assert set(first.tolist()) == whole
    for t in range(3):
        assert torch.equal(batch["reward"][0, t], first + t)
        assert torch.equal(batch["action"][0, t, :, 0], first + t)
        assert torch.equal(batch["obs"][0, t, :, 0], first + t)
    assert torch.equal(batch["obs"][0, 3, :, 0], first + 2.5)


# -- when it learns and acts -----------------------------------------------------------------------------------------


def test_where_learning_begins_there_are_as_many_updates_as_there_were_random_steps():
    agent, replay, made = build(), filled(), []
    update = agent.update
    agent.update = lambda batch, noise: made.append(batch["obs"]) or update(batch, noise)
    for step in (8, 9, 10):
        agent.learn(replay, step)
        made.append(None)
    counts = [len(part) for part in "".join("x" if m is not None else "|" for m in made).split("|")]
    assert counts == [8, 1, 1, 0]
    assert len({m.numpy().tobytes() for m in made if m is not None}) == 10, "a minibatch was drawn twice"
    assert TDMPC2Config(pretrain=False, **SMALL).updates_per_step == 1


def test_actions_are_uniform_until_learning_has_begun():
    agent = build()
    drawn = torch.stack([agent.explore(torch.zeros(1, OBS), step) for step in range(300)])
    expected = np.stack([stream(0, "explore", step).uniform(-1, 1, ACTION).astype(np.float32) for step in range(300)])
    np.testing.assert_array_equal(drawn[:, 0], expected)
    agent.learn(filled(), 5)
    noise = agent.planner.noise([stream(0, "explore", 7)], explore=True)
    expected, _ = agent.planner.search(torch.ones(1, OBS), torch.zeros(1, 3, ACTION), noise)
    assert torch.equal(agent.explore(torch.ones(1, OBS), 7), expected)


def searches(agent: TDMPC2) -> list[torch.Tensor]:
    """What every search starts from, from now on."""
    seen, search = [], agent.planner.search

    def spy(obs, before, noise):
        action, mean = search(obs, before, noise)
        seen.append((before, mean))
        return action, mean

    agent.planner.search = spy
    return seen


def test_a_search_starts_from_the_one_before_but_in_a_new_episode_of_its_seed():
    starts = [[0], [0]]
    agent, obs = spread(build([0, 1], starts=starts)), torch.randn(2, OBS)
    seen = searches(agent)
    agent.explore(obs, 0)
    agent.explore(obs, 1)
    starts[1].append(2)
    agent.explore(obs, 2)
    agent.explore(obs, 3)
    assert not seen[0][0].any()
    assert torch.equal(seen[1][0], seen[0][1])
    assert torch.equal(seen[2][0][0], seen[1][1][0])
    assert not seen[2][0][1].any()
    assert torch.equal(seen[3][0], seen[2][1])
    assert all(mean.any() for _, mean in seen)


def test_means_are_shifted_by_one_step_and_end_with_zero():
    agent, noise = spread(build(plan_priors=0, plan_iterations=1)), build().planner.noise([stream(0, "x")], True)
    still = noise._replace(prior=noise.prior[:, :, :0], samples=torch.zeros(1, 1, 3, 32, ACTION))
    before = torch.tensor([[[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]])
    _, mean = agent.planner.search(torch.zeros(1, OBS), before, still._replace(value=noise.value[:, :1]))
    torch.testing.assert_close(mean, torch.tensor([[[0.3, 0.4], [0.5, 0.6], [0.0, 0.0]]]))


def test_evaluations_search_without_trainings_memory_and_leave_none():
    agent, obs = spread(build()), torch.randn(1, OBS)
    agent.explore(obs, 0)
    kept = agent.state()
    seen, player = searches(agent), agent.player(10)
    assert isinstance(player, Player)
    for episode, step in ((0, 0), (0, 1), (1, 0)):
        player.act(obs.unsqueeze(1), np.array([[episode]]), np.array([[step]]))
    assert not seen[0][0].any()
    assert torch.equal(seen[1][0], seen[0][1])
    assert not seen[2][0].any()
    assert all(torch.equal(value, kept[name]) for name, value in agent.state().items())


def test_evaluations_noise_is_that_of_seed_evaluation_episode_and_step():
    agent, obs = spread(build([0, 1])), torch.randn(1, 1, OBS).repeat(2, 2, 1)
    places = np.array([[0, 3], [2, 0]]), np.array([[0, 0], [0, 0]])
    together = agent.player(10).act(obs, *places)
    for k in range(2):
        alone = spread(build([k]))
        for e in range(2):
            found = alone.player(10).act(obs[:1, :1], *(place[k : k + 1, e : e + 1] for place in places))
            assert torch.equal(found[0, 0], together[k, e])
    again = agent.player(10).act(obs, *places)
    other = [agent.player(11).act(obs, *places), agent.player(10).act(obs, places[0] + 1, places[1])]
    assert torch.equal(again, together)
    assert all((actions != together).any(-1).all() for actions in other)  # an action can be clipped twice


def test_what_is_found_gets_noise_in_training_alone():
    """With one elite, the first action is its own but for that noise."""
    agent, obs = spread(build(plan_elites=1)), torch.randn(1, OBS)
    noise = agent.planner.noise([stream(0, "x")], explore=True)
    plain, mean = agent.planner.search(obs, torch.zeros(1, 3, ACTION), noise._replace(action=None))
    noisy, _ = agent.planner.search(obs, torch.zeros(1, 3, ACTION), noise)
    torch.testing.assert_close(plain, mean[:, 0])
    torch.testing.assert_close(noisy, (plain + 0.05 * noise.action).clamp(-1, 1))
    assert agent.planner.noise([stream(0, "x")], explore=False).action is None


def test_without_the_planner_the_policy_acts():
    agent, obs = spread(build(planner=False)), torch.randn(1, 3, OBS)
    assert agent.player(0) is None
    mean, log_std = (x.detach() for x in agent.policy(agent.encode(torch.nn.functional.pad(obs, (0, 0, 0, 29)))))
    torch.testing.assert_close(agent.act(obs), mean[:, :3].tanh())
    noise = torch.from_numpy(stream(0, "explore", 4).standard_normal((1, ACTION), np.float32))
    expected = (mean[:, 0] + log_std[:, 0].exp() * noise).tanh()
    torch.testing.assert_close(agent.explore(obs[:, 0], 4), expected)


@pytest.mark.parametrize(("size", "iterations"), [(19, 6), (20, 8)])
def test_large_actions_are_searched_longer(size, iterations):
    assert TDMPC2Config().iterations(size) == iterations
    assert TDMPC2Config(plan_iterations=3).iterations(size) == 3


# -- learning --------------------------------------------------------------------------------------------------------


def batch_and_noise(agent: TDMPC2) -> tuple[dict[str, torch.Tensor], object]:
    rows = filled(agent.seeds).data
    part = lambda name, steps: rows[name][:, : 32 * steps].unflatten(1, (steps, 32))  # noqa: E731
    batch = {"obs": torch.cat([part("obs", 3), part("next_obs", 1)], 1)}
    batch |= {name: part(name, 3) for name in ("action", "reward")}
    return batch, agent.noise([stream(seed, "noise") for seed in agent.seeds])


def test_dropout_reaches_the_value_loss_and_the_policys_step_and_nothing_else():
    found, targets = [], []
    for dropped in ((0, 0), (1, 0), (1, 1)):
        agent = spread(build(dropout=0.5))
        batch, noise = batch_and_noise(agent)
        factors = [f if drop else torch.ones_like(f) for f, drop in zip(noise.dropped, dropped, strict=True)]
        target = agent.td_target
        agent.td_target = lambda *given, target=target: targets.append(target(*given)) or targets[-1]
        found.append(agent.update(batch, noise._replace(dropped=tuple(factors))))
    assert torch.equal(targets[0], targets[1])
    changed = [{k for k in one if not torch.equal(one[k], other[k])} for one, other in pairwise(found)]
    model = {"value_loss", "total_loss", "grad_norm", "q1"}
    assert model <= changed[0]
    assert changed[1] == {"actor_loss", "actor_grad_norm", "scale"}
    assert changed[0] == model | changed[1]
    searched = [a.planner.search(torch.ones(1, OBS), torch.zeros(1, 3, ACTION), a.planner.noise([stream(0, "x")], True))
                for a in (spread(build(dropout=p)) for p in (0.0, 0.5))]  # fmt: skip
    assert torch.equal(searched[0][0], searched[1][0])


def test_dropout_keeps_the_mean_and_drops_its_share():
    agent = build([0, 1], dropout=0.1, width=64)
    model, policy = agent.noise([stream(seed, "noise") for seed in (0, 1)]).dropped
    assert model.shape == (2, 5, 3 * 32, 64)
    assert policy.shape == (2, 2, 4 * 32, 64)
    for factors in (model, policy):
        assert factors.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
        assert factors.mean(dim=(1, 2, 3)).numpy() == pytest.approx([1, 1], abs=0.02)
    assert agent.noise([stream(0, "a"), stream(1, "a")]).target_pair.unique().numel() > 1


def test_pairs_are_two_different_q_functions_and_all_of_them_in_turn():
    agent = build()
    drawn = torch.stack([agent.noise([stream(0, "noise", k)]).target_pair[0] for k in range(200)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert all((np.bincount(drawn[:, k], minlength=5) > 20).all() for k in range(2))


def test_two_chosen_members_are_computed_as_among_all():
    agent, pair = spread(build([0, 1, 2])), torch.tensor([[4, 0], [1, 2], [3, 1]])
    with torch.no_grad():
        z, action = agent.encode(torch.randn(3, 32, OBS)), torch.rand(3, 32, ACTION)
        every = agent.values.decode(agent.critic((z, action)))
        both = agent.two(agent.critic, pair, z, action)
    assert torch.equal(both, every[torch.arange(3).unsqueeze(1), pair])


def test_published_entropy_has_the_tanhs_correction_beside_it():
    found = {}
    for form in ("scaled", "published"):
        agent = spread(build(entropy_form=form))
        batch, noise = batch_and_noise(agent)
        agent._optimisers["actor"].lr = 0.0
        found[form] = agent.update(batch, noise)
    gaussian = -found["scaled"]["scaled_entropy"] / ACTION  # log-density of the Gaussian alone
    squash = found["scaled"]["entropy"] + gaussian
    torch.testing.assert_close(found["published"]["scaled_entropy"], -ACTION * gaussian + squash)
    assert (squash < -0.1).all()
    assert not torch.equal(found["scaled"]["actor_grad_norm"], found["published"]["actor_grad_norm"])


def test_q_is_the_mean_of_all_q_functions_for_any_number_of_rows():
    agent, obs, action = spread(build()), torch.randn(1, 45, OBS), torch.rand(1, 45, ACTION)
    with torch.no_grad():
        z = agent.encode(torch.nn.functional.pad(obs, (0, 0, 0, 19)))[:, :45]
        every = agent.values.decode(agent.critic((z, action)))
    assert every.shape == (1, 5, 45)
    torch.testing.assert_close(agent.q(obs, action), every.mean(1), rtol=1e-5, atol=1e-4)


def test_networks_start_as_published():
    agent = TDMPC2(TDMPC2Config(), 24, 6, [0])
    for net, heads in ((agent.critic, ["/2"]), (agent.model, ["reward/2"])):
        assert not any(net.parameter(f"{head}.kernel").any() for head in heads)
    for net, slot in ((agent.critic, "/0"), (agent.actor, "/2"), (agent.model, "dynamics/1"), (agent.encoder, "/0")):
        assert net.parameter(f"{slot}.kernel").std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(agent.target.flat, agent.critic.flat)
    with torch.no_grad():
        assert agent.q(torch.randn(1, 2, 24), torch.rand(1, 2, 6)).abs().max() < 1e-5


@pytest.mark.parametrize(("obs", "action", "published"), [(223, 38, 5_159_082), (24, 6, 4_960_618), (39, 4, 4_955_238)])
def test_parameters_are_as_many_as_published(obs, action, published):
    w, za = 512, 512 + action
    norms = {"encoder": 256 + 512, "dynamics": 3 * w, "head": 2 * w, "actor": 2 * w}
    biases = norms | {"head": 2 * w + 101, "actor": 2 * w + 2 * action}
    n = TDMPC2Config()._multiply_adds(obs, action)
    times = {"encoder": 1, "dynamics": 1, "head": 6, "actor": 1}
    assert n["dynamics"] == za * w + 2 * w * w
    assert sum(times[k] * (n[k] + biases[k] + 2 * norms[k]) for k in times) == published


# -- blocks, checkpoints, divergence ---------------------------------------------------------------------------------


def everything(seeds, obs, action, **settings) -> dict[str, torch.Tensor]:
    """Learn, explore and evaluate; everything that a seed can show, seed axis first."""
    agent, replay = build(seeds, obs, action, **settings), filled(seeds, 101, obs, action)
    agent.learn(replay, 3)
    seen = agent.learn(replay, 100)
    rows = {name: values[:, :45] for name, values in replay.data.items()}  # an odd number of rows on purpose
    for step in range(2):
        seen[f"explore{step}"] = agent.explore(rows["obs"][:, step], step)
    seen["act"], seen["q"] = agent.act(rows["obs"]), agent.q(rows["obs"], rows["action"])
    numbers = np.zeros((len(seeds), 1), np.int64)
    player = agent.player(5)
    for step in range(2):
        seen[f"played{step}"] = player.act(rows["obs"][:, step : step + 1], numbers, numbers + step)
    seen |= {name: value for name, value in agent.state().items() if value.dim()}
    return {name: value.reshape(len(seeds), -1) for name, value in seen.items()}


@pytest.mark.parametrize(
    ("obs", "action", "settings"),
    [
        (5, 1, {"width": 8, "plan_elites": 5, "plan_priors": 3}),
        pytest.param(24, 6, {"width": 64, "latent": 64, "batch_size": 64}, marks=pytest.mark.slow),
        pytest.param(67, 21, {"width": 104, "latent": 40, "encoder_width": 24, "bins": 101}, marks=pytest.mark.slow),
    ],
)
def test_a_seed_has_the_same_bits_in_every_block(obs, action, settings):
    alone = everything([0], obs, action, **settings)
    for block in ([0, 1], [3, 0, 1], list(range(10))):
        together = everything(block, obs, action, **settings)
        assert [k for k in alone if not torch.equal(alone[k][0], together[k][block.index(0)])] == []


def test_a_restored_checkpoint_continues_with_the_same_bits_in_mid_episode():
    seeds, replay, obs = [0, 2], filled([0, 2]), torch.randn(2, OBS)
    straight = build(seeds)
    for step in (5, 6):
        straight.learn(replay, step)
        straight.explore(obs, step)
    file = io.BytesIO()
    torch.save(straight.state(), file)
    kept = {name: value.clone() for name, value in straight.state().items()}
    resumed = build(seeds)
    resumed.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    actions = []
    for agent in (straight, resumed):
        agent.learn(replay, 7)
        actions.append([agent.explore(obs, 8), agent.explore(obs, 9)])
    before, after = straight.state(), resumed.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(*pair) for pair in zip(*actions, strict=True))
    changed = {name for name in kept if not torch.equal(kept[name], before[name])}
    assert {"encoder", "model", "critic", "actor", "target", "plan/means"} <= changed


def test_a_seed_that_diverges_disturbs_no_other():
    outcomes = []
    for broken in (False, True):
        agent, replay = spread(build([0, 1])), filled([0, 1])
        if broken:
            agent.encoder.flat[0] = math.nan
        agent.learn(replay, 10)
        actions = agent.explore(torch.ones(2, OBS), 0), agent.explore(torch.ones(2, OBS), 1)
        outcomes.append([*actions, agent.scale, agent.critic.flat.view(2, -1)])
    assert all(torch.equal(plain[1], beside[1]) for plain, beside in zip(*outcomes, strict=True))
    assert not outcomes[1][0][0].isfinite().any()


# -- online ----------------------------------------------------------------------------------------------------------

HOPPER = test_online.HOPPER  # episodes of unequal length
AGENT = TDMPC2Config(**SMALL | {"plan_iterations": 1})


def online(seeds, **settings):
    return test_online.build(seeds, AGENT, HOPPER, **{"steps": 60, "random_steps": 46, "eval_every": 30} | settings)


@pytest.mark.slow
def test_bytes_are_the_same_in_every_block_and_wherever_a_run_is_cut():
    """Evaluations too, although seeds that have finished theirs wait for others."""
    whole = test_online.finish(online([3, 0], eval_episodes=2))
    lengths = {row.value for own in whole.metrics.rows for row in own if row.metric == "eval/length"}
    assert len(lengths) > 2
    alone = test_online.finish(online([0], eval_episodes=2))
    assert whole.metrics.csv(1) == alone.metrics.csv(0)
    cut = online([3, 0], eval_episodes=2)
    for stop in (46, 51, 57):
        while cut.done < stop:
            cut.step()
        other = online([3, 0], eval_episodes=2)
        other.load(cut.state())
        other.done, other.metrics.rows = cut.done, [list(rows) for rows in cut.metrics.rows]
        cut = other
    test_online.finish(cut)
    assert [cut.metrics.csv(k) for k in range(2)] == [whole.metrics.csv(k) for k in range(2)]
    states = cut.state()["agent"], whole.state()["agent"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_records_what_it_should_and_counts_the_updates_where_learning_begins():
    run = test_online.finish(online([0], measure_every=2))
    rows = {(row.agent_step, row.metric): row for row in run.metrics.rows[0]}
    assert [rows[at, "batch/reward"].update for at in (48, 50, 60)] == [47, 49, 59]
    found = {metric for _, metric in rows}
    assert found <= run.config.metrics
    assert {"critic/batch_q", "entropy", "critic/over", "critic/q", "critic/mc_tail", "return/final"} <= found
    assert "critic/mc_soft" not in found
    assert run.agent.config.discount == 0.995  # of 1000 agent steps
    assert run.agent.starts is run.starts
    recorded = sorted({row[:3] for row in rows.values()})
    assert contents.times(RunConfig(HOPPER, AGENT, run.config)) == recorded  # as the audit expects


def test_bounded_values_are_seen_to_diverge_beyond_what_rewards_allow():
    task = EnvironmentConfig(task="pendulum-swingup", action_repeat=10)
    run = test_online.build([0], AGENT, task, steps=40, random_steps=30, eval_every=40)
    assert run._ceiling == pytest.approx(10 / (1 - run.agent.config.discount))
    assert run.agent.config.discount == pytest.approx(0.95)  # of 100 agent steps


def test_less_than_a_slice_and_held_out_rows_are_refused():
    with pytest.raises(ValueError, match="random_steps, 2: must be at least 3"):
        online([0], random_steps=2)
    with pytest.raises(ValueError, match="held_out"):
        online([0], held_out=0.1)


@pytest.mark.slow
def test_episodes_played_at_once_are_searched_one_by_one():
    dial = EnvironmentConfig(suite="dial", task="dial-reach", dials={"episode_steps": 6})
    settings = {"steps": 20, "random_steps": 14, "eval_every": 20, "eval_episodes": 3}
    runs = [test_online.finish(test_online.build(seeds, AGENT, dial, **settings)) for seeds in ([3, 0], [0])]
    assert runs[0].metrics.csv(1) == runs[1].metrics.csv(0)


# -- values as histograms, settings, cost ----------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.floats(-2e4, 2e4, width=32), min_size=1, max_size=50))
def test_two_hot_vectors_are_distributions_that_mean_their_value(values):
    histogram, x = TwoHot(101, 10.0), torch.tensor(values)
    p = histogram.encode(x)
    torch.testing.assert_close(p.sum(-1), torch.ones(len(values)))
    assert (p > 0).sum(-1).max() <= 2
    torch.testing.assert_close(histogram.decode((p + 1e-30).log()), x, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"latent": 24, "simnorm_group": 16}, "simnorm_group, 16: must divide latent, 24"),
        ({"plan_samples": 32}, "plan_samples, 32: must be at least plan_elites and plan_priors"),
        ({"plan_std_min": 3.0}, "plan_std_min, 3: must be at most plan_std_max"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TDMPC2Config(**settings)


def test_update_flops_count_the_products_that_an_update_makes():
    agent = TDMPC2(TDMPC2Config(**SMALL | {"encoder_width": 24, "width": 40}), 20, 4, [0])
    rows = filled([0], 100, 20, 4).data
    batch = {"obs": rows["obs"][:, :96].unflatten(1, (3, 32)), "action": rows["action"][:, :96].unflatten(1, (3, 32))}
    batch |= {"reward": rows["reward"][:, :96].unflatten(1, (3, 32))}
    batch["obs"] = torch.cat([batch["obs"], batch["obs"][:, :1]], 1)
    with FlopCounterMode(display=False) as counter:
        agent.update(batch, agent.noise([stream(0, "noise")]))
    # The policy's step goes back to 8 columns of the input, not to the action's.
    too_many = 2 * 32 * 4 * 2 * (8 - 4) * 40
    assert counter.get_total_flops() == agent.config.update_flops(20, 4) + too_many


def test_plan_flops_count_the_products_that_a_search_makes():
    agent = TDMPC2(TDMPC2Config(**SMALL | {"encoder_width": 24, "width": 40, "plan_priors": 32}), 20, 4, [0])
    with FlopCounterMode(display=False) as counter:
        agent.explore(torch.zeros(1, 20), 0)
        agent._learning = True
        agent.explore(torch.zeros(1, 20), 0)
    encoded = 2 * 31 * agent.config._multiply_adds(20, 4)["encoder"]  # one row, filled up to 32
    assert counter.get_total_flops() == agent.config.plan_flops(20, 4) + encoded


def test_costs_are_near_the_published_ones():
    """An update's are counted without the derivatives that nobody needs."""
    config = TDMPC2Config()
    assert config.update_flops(223, 38) == pytest.approx(31.5e9, rel=0.06)
    assert config.plan_flops(223, 38) == pytest.approx(49e9, rel=0.03)
    assert config.plan_flops(24, 6) == pytest.approx(36e9, rel=0.03)
    rates = [piece.rate for piece in config.learning_work(10, 24, 6)]
    assert rates == ["td_mpc2", "plan"]
    assert [piece.rate for piece in TDMPC2Config(planner=False).learning_work(10, 24, 6)] == ["td_mpc2"]
    assert [piece.updates for piece in config.learning_work(10, 24, 6)] == [10, 0]
