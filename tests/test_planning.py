"""The sampling planner: what it tries, how it narrows, what it returns, and with which values MAD-TD feeds it."""

import numpy as np
import pytest
import torch

from dynarep.agents.mad_td import MadTD
from dynarep.agents.planning import plan
from dynarep.configs.mad_td import MadTDConfig
from dynarep.streams import stream

OBS, ACTION = 5, 2


def generators(seeds=(0,), purpose="test") -> list[np.random.Generator]:
    return [stream(seed, purpose) for seed in seeds]


def recorded(value, **settings):
    """Plan for one state whose policy's action is (.5, -.5); also every iteration's candidates (N, a)."""
    seen: list[torch.Tensor] = []

    def watched(actions):
        seen.append(actions[0, 0].clone())
        return value(actions)

    found = plan(torch.tensor([[[0.5, -0.5]]]), watched, MadTDConfig(**settings), generators())
    return found, seen


def peak(best, height=100.0):
    return lambda actions: -height * (actions - torch.tensor(best)).square().sum(-1)


# -- the search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [[0.1, 0.2], [-0.2, 0.3], [1.0, -1.0], [3.0, 0.0]])
def test_the_best_action_of_a_known_value_is_found(best):
    found, _ = recorded(peak(best))
    reachable = torch.tensor(best).clamp(-1, 1)
    torch.testing.assert_close(found.mean[0, 0], reachable, rtol=0, atol=0.05)
    torch.testing.assert_close(found.sample[0, 0], reachable, rtol=0, atol=0.15)


def test_every_iteration_tries_the_policys_action_and_so_many_others_inside_the_box():
    found, seen = recorded(peak([1.0, -1.0]), plan_samples=40, plan_elites=5, plan_iterations=3)
    assert [candidates.shape for candidates in seen] == [(41, 2)] * 3
    for candidates in seen:
        assert torch.equal(candidates[0], torch.tensor([0.5, -0.5]))
        assert len(candidates.unique(dim=0)) > 30
        assert candidates.abs().max() == 1.0  # clipped: the peak is in a corner
    assert (seen[-1] == found.sample[0, 0]).all(-1).any()


def test_the_search_starts_at_the_policys_action_with_the_largest_deviation():
    _, seen = recorded(peak([0.0, 0.0]), plan_std_max=0.01, plan_std_min=0.005, plan_iterations=1)
    noise = torch.from_numpy(generators()[0].standard_normal((1, 512, 2), dtype=np.float32))[0]
    torch.testing.assert_close(seen[0][1:], torch.tensor([0.5, -0.5]) + 0.01 * noise)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_mean_and_deviation_are_those_of_the_elites_weighted_by_value_over_temperature(temperature):
    settings = {"plan_temperature": temperature, "plan_iterations": 2, "plan_std_min": 1e-6, "plan_std_max": 5.0}
    found, seen = recorded(peak([0.2, 0.3], 7.0), **settings, plan_samples=30, plan_elites=6)
    noise = generators()[0].standard_normal((2, 30, 2), dtype=np.float32)
    statistics = []
    for candidates in seen:
        a = candidates.double().numpy()
        v = -7.0 * np.square(a - [0.2, 0.3]).sum(-1)
        elites = np.argsort(-v)[:6]
        w = np.exp((v[elites] - v.max()) / temperature)
        w /= w.sum()
        mean = w @ a[elites]
        statistics.append((mean, np.sqrt(w @ np.square(a[elites] - mean))))
    np.testing.assert_allclose(found.mean[0, 0], statistics[1][0], rtol=1e-5)
    second = np.clip(statistics[0][0] + statistics[0][1] * noise[1], -1, 1)
    np.testing.assert_allclose(seen[1][1:], second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "temperature", "expected"),
    [(1e4, 0.5, 0.05), (-1.0, 1e9, 0.3)],
    ids=["elites agree", "elites lie on a ring"],
)
def test_the_deviation_stays_between_its_bounds(height, temperature, expected):
    """Unbounded it would be about 0.01, and 0.4."""
    settings = {"plan_iterations": 2, "plan_samples": 200, "plan_elites": 40, "plan_temperature": temperature}
    _, seen = recorded(peak([0.5, -0.5], height), **settings)
    noise = torch.from_numpy(generators()[0].standard_normal((2, 200, 2), dtype=np.float32))[1]
    inside = (seen[1][1:].abs() < 1).all(-1)
    assert inside.sum() > 100
    mean = (seen[1][1:] - expected * noise)[inside]
    torch.testing.assert_close(mean, mean[:1].expand_as(mean), rtol=0, atol=1e-6)


def test_the_sampled_elite_is_drawn_with_its_weight():
    seeds = range(2000)

    def value(actions):  # the fourth candidate has weight 3/4, the eighth 1/4, at a temperature of 1/2
        values = torch.full(actions.shape[:-1], -100.0)
        values[..., 3], values[..., 7] = 0.5 * np.log(3.0), 0.0
        return values

    config = MadTDConfig(plan_iterations=1, plan_samples=10, plan_elites=4)
    centre = torch.zeros(len(seeds), 1, 1)
    found = plan(centre, value, config, generators(seeds))
    noise = np.stack([g.standard_normal((1, 10, 1), dtype=np.float32) for g in generators(seeds)])
    candidates = torch.from_numpy((0.3 * noise[:, 0, :, 0]).clip(-1, 1))
    first, second = ((found.sample[:, 0, 0] - candidates[:, i]).abs() < 1e-6 for i in (2, 6))
    assert (first | second).all()
    assert first.float().mean().item() == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / len(seeds)))
    torch.testing.assert_close(found.mean[:, 0, 0], 0.75 * candidates[:, 2] + 0.25 * candidates[:, 6])


def test_a_state_is_searched_alike_wherever_it_stands():
    policy = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    value = peak([0.3, -0.3, 0.1], 5.0)
    together = plan(policy, value, MadTDConfig(), generators([4, 9]))
    for i in (0, 3):
        alone = plan(policy[:, i : i + 1], value, MadTDConfig(), generators([4, 9]))
        assert torch.equal(alone.mean[:, 0], together.mean[:, i])
        assert torch.equal(alone.sample[:, 0], together.sample[:, i])
    assert not torch.equal(together.mean[0], together.mean[1])


# -- inside MAD-TD -------------------------------------------------------------------------------------------------


def build(seeds=(0,), **settings) -> MadTD:
    """An agent whose networks, also critics and their targets, are all different functions with large outputs."""
    fixed = {"width": 16, "batch_size": 32, "bins": 21, "value_limit": 10, "planner": True}
    agent = MadTD(MadTDConfig(**(fixed | settings)), OBS, ACTION, seeds)
    for name, net in (agent._nets() | {"target": agent.target}).items():
        rows = net.flat.shape[0] // len(agent.seeds)
        for k, seed in enumerate(agent.seeds):
            noise = stream(seed, "spread", name).standard_normal((rows, net.flat.shape[1]), dtype=np.float32)
            net.flat[k * rows : (k + 1) * rows] += 0.5 * torch.from_numpy(noise)
    return agent


def observations(seeds=(0,), size=1) -> torch.Tensor:
    return torch.from_numpy(np.stack([stream(s, "obs").standard_normal((size, OBS)) for s in seeds]).astype(np.float32))


def lookahead(agent: MadTD, obs: torch.Tensor, action: torch.Tensor, kind: str) -> torch.Tensor:
    """r + gamma Q(z', pi(z')) of one observation (o,) and actions (N, a), (N,)."""
    with torch.no_grad():
        z = agent.encode(obs.expand(1, len(action), -1))
        log_next, reward = agent.imagine(z, action[None])
        next_z = log_next.exp()
        q = agent.values(agent.critic, next_z, agent.policy(next_z))[0]
    return reward[0] + agent.config.discount * {"mean": q.mean(0), "min": q.amin(0), "max": q.amax(0)}[kind]


@pytest.mark.parametrize("kind", ["mean", "min", "max"])
def test_the_agent_plans_with_its_models_reward_and_its_online_critics(kind):
    agent, obs = build(plan_value=kind, discount=0.7), observations()
    with torch.no_grad():
        policy = agent.policy(agent.encode(obs))

    def value(actions):
        return lookahead(agent, obs[0, 0], actions[0, 0], kind)[None, None]

    expected = plan(policy, value, agent.config, [stream(0, "explore", 7)])
    torch.testing.assert_close(agent.explore(obs[:, 0], 7), expected.sample[:, 0], rtol=0, atol=1e-4)
    noise_free = plan(policy, value, agent.config, [stream(0, "plan")])
    torch.testing.assert_close(agent.act(obs), noise_free.mean, rtol=0, atol=1e-4)
    assert (agent.act(obs) - policy).abs().max() > 0.1, "the planner must have moved"


def test_exploring_searches_anew_in_every_step_and_acting_always_finds_the_same():
    agent, obs = build([3, 5]), observations([3, 5])
    first, second = agent.explore(obs[:, 0], 7), agent.explore(obs[:, 0], 8)
    assert torch.equal(first, agent.explore(obs[:, 0], 7))
    assert (first != second).any(-1).any()
    assert torch.equal(agent.act(obs), agent.act(obs))


def test_planned_actions_do_not_depend_on_other_states_or_seeds():
    alone = build([0])
    obs = observations([3, 0, 1], 7)
    together = build([3, 0, 1])
    assert torch.equal(together.explore(obs[:, 0], 2)[1], alone.explore(obs[1:2, 0], 2)[0])
    assert torch.equal(together.act(obs)[1], alone.act(obs[1:2])[0])
    torch.testing.assert_close(alone.act(obs[1:2, :3]), alone.act(obs[1:2])[:, :3], rtol=0, atol=1e-4)
