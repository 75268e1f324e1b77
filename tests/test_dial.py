"""Dial tasks: each test names what a dose-response curve could no longer be believed for if it failed."""

import numpy as np
import pytest
import torch

from dynarep import envs
from dynarep.agents.mbpo import MBPO
from dynarep.configs import Dials, EnvironmentConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.mbpo import MBPOConfig
from dynarep.configs.online import OnlineConfig
from dynarep.configs.sac import SACConfig
from dynarep.envs import EnvError
from dynarep.envs.dial import WALL, Dynamics, Fleet
from dynarep.protocols.collect import collect
from dynarep.protocols.evaluation import Evaluator, ceiling
from dynarep.protocols.online import Online

TASKS = ("dial-reach", "dial-glide")
SMALL = {"width": 16, "batch_size": 32, "updates_per_step": 1, "unit_free": True, "initial_temperature": 0.1}
MODEL = {
    **SMALL, "members": 2, "elites": 2, "model_width": 16, "model_layers": 1, "weight_decay": (5e-5, 5e-5),
    "model_batch_size": 32, "retrain_every": 20, "model_chunks": 1, "first_model_chunks": 2, "chunk_steps": 5,
    "rollouts_per_step": 8, "rollout_every": 4, "synthetic_capacity": 320,
}  # fmt: skip
SHORT = {
    "steps": 80,
    "random_steps": 40,
    "eval_every": 40,
    "eval_episodes": 3,
    "measure_every": 20,
    "horizon_margin": 20,
}


def config(task="dial-reach", rho=1.0, **dials):
    return EnvironmentConfig(suite="dial", task=task, reward_scale=rho, dials=Dials(**dials))


def finished(environment, agent, seeds=(0, 1), **changes):
    protocol = Online(environment, agent, OnlineConfig(**SHORT | changes), seeds)
    while protocol.done < protocol.total:
        protocol.advance()
    return protocol


def recorded(protocol, metric):
    return [[row.value for row in rows if row.metric == metric] for rows in protocol.metrics.rows]


# The task


def test_second_order_step_follows_its_formula():
    dynamics = Dynamics("dial-reach", Dials(process_noise=0.1, nuisance=2, correlation=0.6))
    x, v, xi = np.array([0.5, -0.2]), np.array([1.0, -1.0]), np.array([0.3, -2.0])
    action, eps, zeta = np.array([1.0, -0.5]), np.array([0.7, -0.1]), np.array([1.0, 0.5])
    following, reward = dynamics.step(np.concatenate([x, v, xi]), action, np.concatenate([eps, zeta]))
    v = v + 0.1 * (4.0 * action - v) + 0.1 * eps
    x = x + 0.1 * v
    assert following == pytest.approx(np.concatenate([x, v, 0.6 * xi + 0.8 * zeta]), abs=1e-15)
    assert reward == pytest.approx(np.exp(-(x @ x) / (2 * 0.25 * 2)), abs=1e-15)


def test_first_order_step_follows_its_formula():
    following, reward = Dynamics("dial-glide", Dials(actuators=3)).step(np.full(3, 0.4), np.ones(3), np.zeros(3))
    assert following == pytest.approx(np.full(3, 0.6))  # + 0.1 * 4 / 2
    assert reward == pytest.approx(np.exp(-0.36 / 0.5))


def test_a_wall_stops_what_runs_into_it_and_nothing_else():
    dynamics = Dynamics("dial-reach", Dials())
    following, _ = dynamics.step(np.array([WALL, 0.0, 5.0, 5.0]), np.zeros(2), np.zeros(2))
    assert following[:3].tolist() == pytest.approx([WALL, 0.45, 0.0])
    assert following[3] == pytest.approx(4.5)


@pytest.mark.parametrize("task", TASKS)
def test_the_true_outcome_of_any_observation_and_action_is_what_the_task_does(task):
    env = envs.make("dial", task, 1, 0.25, dials=Dials(nuisance=3, process_noise=0.05, obs_unit=8.0, correlation=0.5))
    obs = env.reset(11)
    _, noise = env.dynamics.episode(11)
    for t, action in enumerate(np.random.default_rng(0).uniform(-1, 1, (50, 2))):
        following, reward = env.dynamics.step(obs.astype(np.float64) / 8.0, action, noise[t])
        step = env.step(action)
        assert step.obs / 8.0 == pytest.approx(following, abs=1e-5)
        assert step.reward == pytest.approx(0.25 * reward, abs=1e-6)
        obs = step.obs
    assert step.truncated
    assert not step.terminated


@pytest.mark.parametrize("task", TASKS)
def test_a_fleet_plays_the_episodes_that_single_environments_play(task):
    env = envs.make("dial", task, 1, 2.0, dials=Dials(nuisance=2, process_noise=0.1, obs_unit=4.0, episode_steps=20))
    seeds = [5, 0, 2**31 - 2]
    actions = np.random.default_rng(1).uniform(-1, 1, (20, 3, 2)).astype(np.float32)
    fleet = Fleet(env, seeds)
    together = [(fleet.obs, 0.0)] + [(None, fleet.step(a)) and (fleet.obs.copy(), None) for a in actions]
    fleet = Fleet(env, seeds)
    rewards = np.stack([fleet.step(a) for a in actions])
    assert fleet.over
    with pytest.raises(EnvError, match="over"):
        fleet.step(actions[0])
    for k, seed in enumerate(seeds):
        assert env.reset(seed).tobytes() == together[0][0][k].tobytes()
        for t in range(20):
            step = env.step(actions[t, k])
            assert step.obs.tobytes() == together[t + 1][0][k].tobytes()
            assert step.reward == rewards[t, k]


@pytest.mark.parametrize("task", TASKS)
def test_a_restored_snapshot_goes_on_to_the_last_bit(task):
    env, other = (envs.make("dial", task, dials=Dials(nuisance=2, process_noise=0.1)) for _ in range(2))
    env.reset(3)
    for _ in range(7):
        env.step(np.array([0.3, -0.8]))
    snapshot = env.snapshot()
    steps = [env.step(np.array([1.0, 0.1])) for _ in range(5)]
    for again in (env, other):
        again.reset(99)
        again.restore(snapshot)
        for step in steps:
            now = again.step(np.array([1.0, 0.1]))
            assert (now.obs.tobytes(), now.reward) == (step.obs.tobytes(), step.reward)


def test_tasks_that_differ_in_nuisance_begin_alike_and_are_disturbed_alike():
    few, many = (Dynamics("dial-reach", Dials(nuisance=m)).episode(4) for m in (1, 12))
    assert few[0][:4].tolist() == many[0][:4].tolist()
    assert few[1][:, :2].tolist() == many[1][:, :2].tolist()


def test_nuisance_has_unit_variance_its_correlation_and_no_part_in_the_reward():
    dynamics = Dynamics("dial-reach", Dials(nuisance=400, correlation=0.8))
    state, noise = dynamics.episode(0)
    xi, rewards = [], []
    for t in range(50):
        other = np.concatenate([state[:4], -state[4:]])
        assert dynamics.step(state, np.ones(2), noise[t])[1] == dynamics.step(other, np.ones(2), noise[t])[1]
        state, reward = dynamics.step(state, np.ones(2), noise[t])
        xi.append(state[4:])
        rewards.append(reward)
    xi = np.array(xi)
    assert xi.var() == pytest.approx(1.0, abs=0.05)
    assert np.mean(xi[1:] * xi[:-1]) == pytest.approx(0.8, abs=0.05)


def test_dials_of_another_suite_or_an_action_repeat_are_refused():
    with pytest.raises(EnvError, match="dials are for dial tasks"):
        envs.make("dmc", "walker-walk", dials=Dials(nuisance=1))
    with pytest.raises(EnvError, match="time_step"):
        envs.make("dial", "dial-reach", action_repeat=2)
    with pytest.raises(EnvError, match="did you mean dial-reach"):
        envs.split_task("dial-reech")


# Agents in it


@pytest.mark.parametrize(("rho", "kappa"), [(2.0**-7, 1.0), (1.0, 2.0**5), (2.0**-9, 2.0**-3)])
def test_sac_does_not_feel_the_units_to_the_last_bit(rho, kappa):
    agent = SACConfig(**SMALL)
    plain = finished(config(nuisance=3), agent)
    scaled = finished(config(nuisance=3, rho=rho, obs_unit=kappa), agent)
    for name, value in plain.agent.state().items():
        assert torch.equal(value, scaled.agent.state()[name]), name
    for metric in ("eval/return", "train/return", "return/area_learning"):
        assert recorded(plain, metric) == recorded(scaled, metric), metric
    q, scaled_q = recorded(plain, "critic/q"), recorded(scaled, "critic/q")
    assert scaled_q == pytest.approx(np.array(q) * rho, rel=1e-6)  # values are in the units of the rewards reported


def test_without_unit_free_the_same_agent_feels_them():
    agent = SACConfig(**{**SMALL, "unit_free": False})
    assert recorded(finished(config(), agent), "eval/return") != recorded(
        finished(config(rho=2.0**-7), agent), "eval/return"
    )


def test_raw_models_feel_the_unit_of_the_reward_and_normalised_ones_hardly():
    def learned(normalised, rho):
        agent = MBPOConfig(**MODEL, normalise_targets=normalised)
        return np.array(recorded(finished(config(rho=rho), agent), "critic/q"))[:, -1] / rho

    assert learned(True, 1.0) == pytest.approx(learned(True, 2.0**-7), rel=0.02)
    assert np.abs(learned(False, 1.0) - learned(False, 2.0**-7)).max() > 0.05


class Recorded(MBPO):
    """MBPO that remembers what it put into the synthetic buffer."""

    def _rollout(self, replay, step, simulate):
        before = int(self.synthetic._next[0])
        super()._rollout(replay, step, simulate)
        rows = torch.arange(before, before + self.config.rollouts_per_step * self.config.rollout_every)
        self.made = self.synthetic.rows((rows % self.synthetic.capacity).repeat(len(self.seeds), 1))


def synthetic(oracle, **dials):
    environment = config(rho=0.5, obs_unit=2.0, **dials)
    agent = MBPOConfig(**MODEL, oracle=oracle)
    protocol = Online(environment, agent, OnlineConfig(**SHORT), (0, 1))
    protocol.agent = Recorded(agent, protocol.envs[0].obs_size, 2, (0, 1), "dial-reach", protocol.envs[0].units)
    while protocol.done < 41:  # the first rollout: no arm has acted otherwise yet
        protocol.step()
    return {name: values.double().numpy() for name, values in protocol.agent.made.items()}, protocol.agent


def outcome(rows, **dials):
    dynamics = Dynamics("dial-reach", Dials(obs_unit=2.0, **dials))
    noise = np.zeros((*rows["reward"].shape, dynamics.noise_size))
    following, reward = dynamics.step(rows["obs"] / 2.0, rows["action"], noise)
    return 2.0 * following, 0.5 * reward


def test_the_reward_oracle_replaces_the_reward_alone():
    rows, _ = synthetic("reward")
    following, reward = outcome(rows)
    assert rows["reward"] == pytest.approx(reward, abs=1e-5)
    assert np.abs(rows["next_obs"] - following).mean() > 1e-2


def test_the_state_oracle_replaces_the_next_state_alone():
    rows, _ = synthetic("next_obs")
    following, reward = outcome(rows)
    assert rows["next_obs"] == pytest.approx(following, abs=1e-5)
    assert np.abs(rows["reward"] - reward).mean() > 1e-2


def test_true_next_states_have_noise_of_their_own():
    rows, _ = synthetic("next_obs", nuisance=3)
    made = rows["next_obs"][..., 4:]
    assert made.std() == pytest.approx(2.0, rel=0.2)  # kappa
    assert abs(np.corrcoef(made.ravel(), rows["obs"][..., 4:].ravel())[0, 1]) < 0.2
    assert len(np.unique(made)) == made.size  # a state that is drawn twice is not followed by the same noise


def test_the_mean_oracle_takes_the_noise_out_and_changes_no_draw():
    (noisy, _), (mean, agent) = synthetic("none", nuisance=8), synthetic("mean", nuisance=8)
    assert (mean["obs"] == noisy["obs"]).all()
    assert (mean["action"] == noisy["action"]).all()

    def nearest_member(rows):
        members = agent.ensemble.predict(*(torch.from_numpy(rows[name]).float() for name in ("obs", "action")))
        return np.abs(members.next_obs.numpy() - rows["next_obs"][:, None]).max(-1).min(1)

    assert nearest_member(mean).max() < 1e-4
    assert nearest_member(noisy).min() > 0.1


def test_an_oracle_beside_another_source_of_transitions_is_refused():
    with pytest.raises(ValueError, match="oracle"):
        MBPOConfig(oracle="reward", rollouts="simulator")
    with pytest.raises(ValueError, match="oracle"):
        MBPOConfig(oracle="mean", rollout_length=3)


def test_the_simulator_as_model_of_a_dial_task_is_its_formula():
    agent = MBPOConfig(**MODEL, rollouts="simulator")
    protocol = Online(config(), agent, OnlineConfig(**SHORT), (0,))
    while protocol.done < 50:
        protocol.advance()
    data = {name: values[:, :40] for name, values in protocol.agent.synthetic.data.items()}
    following, reward = Dynamics("dial-reach", Dials()).step(
        data["obs"].double().numpy(), data["action"].double().numpy(), np.zeros((1, 40, 2))
    )
    assert data["next_obs"].numpy() == pytest.approx(following, abs=1e-5)
    assert data["reward"].numpy() == pytest.approx(reward, abs=1e-5)


@pytest.mark.parametrize("oracle", ["none", "next_obs"])
def test_a_run_that_is_interrupted_goes_on_to_the_same_bytes(oracle):
    agent, environment = MBPOConfig(**MODEL, oracle=oracle), config(nuisance=2, process_noise=0.1)
    whole = finished(environment, agent, steps=120)
    first, second = (Online(environment, agent, OnlineConfig(**SHORT | {"steps": 120}), (0, 1)) for _ in range(2))
    while first.done < 75:  # in the middle of the second episode
        first.advance()
    second.load(first.state())
    second.metrics.rows = [list(rows) for rows in first.metrics.rows]
    while second.done < second.total:
        second.advance()
    assert [second.metrics.csv(k) for k in range(2)] == [whole.metrics.csv(k) for k in range(2)]


def test_mad_td_learns_from_true_transitions_of_a_dial_task():
    agent = MadTDConfig(
        width=16,
        batch_size=32,
        updates_per_step=2,
        model_fraction=0.25,
        model_data="simulator",
        bins=21,
        value_limit=40.0,
    )
    protocol = finished(config("dial-glide", actuators=4), agent, held_out=0.1, held_out_rows=32)
    assert np.isfinite(recorded(protocol, "critic/over")).all()
    assert np.isfinite(recorded(protocol, "td_rms/on_policy")).all()
    assert ceiling(config("dial-glide", rho=2.0), 0.98) == pytest.approx(100.0)


def test_evaluations_do_not_depend_on_the_block_of_seeds():
    class Agent:
        def act(self, obs):
            return (-obs[..., :2]).clamp(-1, 1)

    both, one = (
        Evaluator(config(process_noise=0.1), seeds, np.zeros(len(seeds), bool)).play(Agent(), 3, at=0)
        for seeds in ((3, 4), (4,))
    )
    assert [e.reward.tolist() for e in both[1]] == [e.reward.tolist() for e in one[0]]
    assert np.mean([e.reward.sum() for e in one[0]]) > 25  # it brings them to 0


def test_a_policy_without_actions_has_no_return():
    class Agent:
        def act(self, obs):
            action = torch.zeros(*obs.shape[:-1], 2)
            action[0] = float("nan")
            return action

    diverged = np.zeros(2, bool)
    played = Evaluator(config(), (0, 1), diverged).play(Agent(), 2, at=0)
    assert diverged.tolist() == [True, False]
    assert np.isnan(played[0][0].reward).all()
    assert np.isfinite(played[1][0].reward).all()


def test_random_transitions_of_a_dial_task_are_those_that_online_runs_begin_with():
    environment = config(nuisance=1, process_noise=0.1)
    [data] = collect(environment, [7], 80)
    protocol = finished(environment, SACConfig(**SMALL), seeds=(7,), random_steps=80)
    for name in ("obs", "action", "reward", "next_obs"):
        assert protocol.replay.data[name][0].numpy().tobytes() == getattr(data, name).tobytes(), name
    assert data.ended.nonzero()[0].tolist() == [49]
