"""The online loop: bytes, what is stored, what is counted, what divergence does, and the critic against the return."""

import io
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from dynarep import envs
from dynarep.configs import EnvironmentConfig
from dynarep.configs.frozen import LATENT_METRICS, RETURN_METRICS
from dynarep.configs.mbpo import MBPOConfig
from dynarep.configs.online import OnlineConfig
from dynarep.configs.sac import SACConfig
from dynarep.diagnostics.critic import Episode, against_return, entropies, returns_to_go, values
from dynarep.nets import Net
from dynarep.protocols import online
from dynarep.protocols.collect import random_transitions
from dynarep.protocols.online import Online

# Ten frames a step: an episode has 100 agent steps.
PENDULUM = EnvironmentConfig(suite="dmc", task="pendulum-swingup", action_repeat=10)
HOPPER = EnvironmentConfig(suite="gymnasium", task="Hopper-v5", action_repeat=1)
SMALL = {"width": 16, "batch_size": 32}
MODEL = SMALL | {
    "model_width": 16, "model_batch_size": 32, "holdout_draws": 64, "model_chunks": 1, "chunk_steps": 4,
    "retrain_every": 16, "rollouts_per_step": 32, "synthetic_capacity": 256,
}  # fmt: skip
AGENTS = {
    "sac": SACConfig(**SMALL, updates_per_step=1),
    "sac-8": SACConfig(**SMALL, updates_per_step=8),
    "mbpo": MBPOConfig(**MODEL, updates_per_step=1),
    "ftfl-8": MBPOConfig(**MODEL, updates_per_step=8, target="direct", normalise_targets=True),
    "simulator": MBPOConfig(**MODEL | {"rollouts_per_step": 8}, updates_per_step=1, rollouts="simulator"),
}


def build(seeds=(0,), agent="sac", environment=PENDULUM, **settings) -> Online:
    given = {"steps": 130, "random_steps": 110, "eval_every": 65, "eval_episodes": 1, "measure_every": 10}
    config = OnlineConfig(**(given | {"horizon_margin": 50} | settings))
    return Online(environment, AGENTS[agent] if isinstance(agent, str) else agent, config, seeds)


def finish(protocol: Online) -> Online:
    while protocol.done < protocol.total:
        protocol.advance()
    return protocol


def everything(protocol: Online, k: int) -> list[str | bytes]:
    """All that a run of one seed leaves: its metrics, replay and networks."""
    replay = [values[k].numpy().tobytes() for values in protocol.replay.data.values()]
    return [protocol.metrics.csv(k), *replay]


# -- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS)
def test_bytes_are_the_same_twice_and_in_every_block(agent):
    """Hopper's episodes differ in length, so seeds meet their evaluations and resets at different times."""
    settings = {"environment": HOPPER, "eval_episodes": 2}
    alone = everything(finish(build([0], agent, **settings)), 0)
    for seeds in ([0, 1], [3, 0, 1]):
        assert everything(finish(build(seeds, agent, **settings)), seeds.index(0)) == alone, f"in block {seeds}"


@pytest.mark.parametrize("agent", ["sac", "ftfl-8"])
def test_bytes_do_not_depend_on_the_block_on_a_dmc_task(agent):
    alone = everything(finish(build([0], agent, eval_every=130)), 0)
    assert everything(finish(build([3, 0], agent, eval_every=130)), 1) == alone


@pytest.mark.parametrize(
    ("agent", "environment"),
    [*((agent, HOPPER) for agent in AGENTS), ("simulator", PENDULUM)],
    ids=[*AGENTS, "simulator-dmc"],
)
def test_a_run_cut_anywhere_and_continued_gives_the_same_bytes(agent, environment):
    """Killed in the random phase, as an episode ends, before and after retrainings, and somewhere."""
    settings = {"agent": agent, "environment": environment, "eval_every": 130}
    whole, cut = finish(build([0, 1], **settings)), build([0, 1], **settings)
    step = 1 if environment is HOPPER else 2  # DMC's tasks take a tenth of a second to load, four of them in a build
    for stop in sorted({60, 100, 112, 127, int(np.random.default_rng(len(agent)).integers(61, 130))})[::step]:
        while cut.done < stop:
            cut.step()
        cut = _reload(cut, build([0, 1], **settings))
    assert [everything(finish(cut), k) for k in range(2)] == [everything(whole, k) for k in range(2)]


def _reload(protocol: Online, other: Online) -> Online:
    """What `run` does between a kill and the next start."""
    file = io.BytesIO()
    torch.save(protocol.state(), file)
    other.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    other.done, other.metrics.rows = protocol.done, [list(rows) for rows in protocol.metrics.rows]
    assert (other.starts, other.returns, other._return) == (protocol.starts, protocol.returns, protocol._return)
    assert np.array_equal(other.obs, protocol.obs)
    assert np.array_equal(other.diverged, protocol.diverged)
    return other


def test_evaluating_more_often_does_not_change_training():
    seldom, often = (
        finish(build([0, 1], eval_every=n, eval_episodes=e, environment=HOPPER)) for n, e in ((130, 1), (26, 3))
    )
    assert [r for r in seldom.metrics.rows[0] if r.metric.startswith(("critic/batch", "entropy"))] == [
        r for r in often.metrics.rows[0] if r.metric.startswith(("critic/batch", "entropy"))
    ]
    for one, other in ((seldom.agent.state(), often.agent.state()), (seldom.replay.state(), often.replay.state())):
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


# -- what is stored and counted ----------------------------------------------------------------------------------


def test_the_first_transitions_are_those_of_the_random_policy():
    protocol = build([4, 7])
    for _ in range(110):
        protocol.step()
    for k, seed in enumerate((4, 7)):
        data = random_transitions(envs.from_config(PENDULUM), seed, 110)
        for name in ("obs", "action", "reward", "next_obs"):
            assert np.array_equal(protocol.replay.data[name][k, :110].numpy(), getattr(data, name)), name
    assert protocol.starts == [[0, 100], [0, 100]]


def test_what_is_stored_is_what_the_environment_was_given_and_gave():
    protocol = build([0])
    given, step = [], protocol.envs[0].step

    def spy(action):
        given.append((np.array(action), step(action)))
        return given[-1][1]

    protocol.envs[0].step = spy
    finish(protocol)
    rows = {name: values[0].numpy() for name, values in protocol.replay.data.items()}
    assert len(given) == 130
    for t, (action, result) in enumerate(given):
        assert action.dtype == np.float32
        assert np.array_equal(action, rows["action"][t])
        assert np.array_equal(result.obs, rows["next_obs"][t])
        assert np.float32(result.reward) == rows["reward"][t]
        if t not in (99,):
            assert t == 129 or np.array_equal(result.obs, rows["obs"][t + 1])
    assert not np.array_equal(rows["next_obs"][99], rows["obs"][100]), "the episode's end and the next one's start"


def test_a_time_limit_keeps_the_mask_and_a_true_end_does_not():
    assert (finish(build([0])).replay.data["mask"] == 1).all()
    hopper = finish(build([0, 1], environment=HOPPER, steps=120, random_steps=110, eval_every=120))
    for k in range(2):
        ends = np.array(hopper.starts[k][1:]) - 1
        assert len(ends) > 2
        assert np.flatnonzero(hopper.replay.data["mask"][k].numpy() == 0).tolist() == ends.tolist()


def test_frames_are_agent_steps_times_the_repeat_and_updates_are_counted():
    protocol = finish(build([0], "sac-8", repeated(2)))
    for row in protocol.metrics.rows[0]:
        assert row.frame == 2 * row.agent_step
        assert row.update == 8 * max(0, row.agent_step - 110)
    steps = {row.metric: row.agent_step for row in protocol.metrics.rows[0]}
    evaluated = [row.agent_step for row in protocol.metrics.rows[0] if row.metric == "eval/return"]
    measured = [row.agent_step for row in protocol.metrics.rows[0] if row.metric == "entropy"]
    assert evaluated == [65, 130]
    assert measured == [120, 130]
    assert steps["return/random"] == 110
    length = next(row.value for row in protocol.metrics.rows[0] if row.metric == "eval/length")
    assert length == 500, "agent steps of an episode of 1000 frames"


def repeated(repeat: int) -> EnvironmentConfig:
    return PENDULUM.model_copy(update={"action_repeat": repeat})


def test_training_returns_are_those_of_the_episodes_that_ended():
    protocol = finish(build([0], environment=HOPPER, steps=120, random_steps=100, eval_every=60))
    rewards, starts = protocol.replay.data["reward"][0].double().numpy(), protocol.starts[0]
    sums = {end: rewards[start:end].sum() for start, end in pairwise(starts)}
    recorded = [(r.agent_step, r.value) for r in protocol.metrics.rows[0] if r.metric == "train/return"]
    for step, value in recorded:
        assert value == pytest.approx(np.mean([s for end, s in sums.items() if step - 60 < end <= step]), rel=1e-6)
    random = next(r.value for r in protocol.metrics.rows[0] if r.metric == "return/random")
    assert random == pytest.approx(np.mean([s for end, s in sums.items() if end <= 100]), rel=1e-6)


def test_the_final_return_is_the_mean_of_five_and_the_area_of_all_evaluations():
    protocol = finish(build([0, 1], steps=140, random_steps=130, eval_every=20, environment=HOPPER))
    for rows in protocol.metrics.rows:
        curve = [row.value for row in rows if row.metric == "eval/return"]
        last = {row.metric: row.value for row in rows}
        assert len(curve) == 7
        assert last["return/final"] == np.mean(curve[2:])
        assert last["return/area"] == np.mean(curve)


@pytest.mark.parametrize("agent", ["sac", "mbpo"])
def test_everything_recorded_is_declared(agent):
    recorded = {row.metric for row in finish(build([0], agent, measure_every=16)).metrics.rows[0]}
    assert recorded <= OnlineConfig.metrics
    if agent == "mbpo":
        not_its_own = LATENT_METRICS | RETURN_METRICS | {"critic/over_early", "eval/success", "eval/success_last"}
        not_its_own |= {"simulator/unstable"}
        not_its_own |= {metric for metric in OnlineConfig.metrics if metric.startswith("optimist/")}
        assert recorded == OnlineConfig.metrics - (not_its_own - {"critic/q", "critic/mc", "critic/bias"})


def test_settings_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match="multiple of eval_every"):
        OnlineConfig(steps=100, random_steps=10, eval_every=30)
    with pytest.raises(ValueError, match="random_steps, 100: must be at most steps, 50"):
        OnlineConfig(steps=50, random_steps=100, eval_every=50)
    with pytest.raises(ValueError, match="replay_capacity, 60: must hold the 100 transitions"):
        build(replay_capacity=60)
    with pytest.raises(ValueError, match="replay_capacity, 120: must hold the 130 transitions"):
        build(agent="simulator", replay_capacity=120)


def test_a_full_replay_forgets_the_oldest_and_is_still_played_again():
    settings = {"replay_capacity": 100, "steps": 250, "random_steps": 240, "eval_every": 250}
    first = build([0], **settings)
    while first.done < 230:
        first.step()
    continued = finish(_reload(first, build([0], **settings)))
    assert everything(continued, 0) == everything(finish(build([0], **settings)), 0)


# -- the model ---------------------------------------------------------------------------------------------------


def test_the_model_is_judged_on_the_transitions_since_its_last_training(monkeypatch):
    seen = []
    monkeypatch.setattr(online, "report", lambda ensemble, new, streams, old: seen.append((new, old)) or {})
    protocol = finish(build([0, 1], "mbpo", measure_every=8))
    obs = protocol.replay.data["obs"]
    # Learning begins after step 110 and the model is trained there, after steps 112 and 128 (every 16).
    expected = [(111, 112), (113, 120), (113, 128)]
    expected = [(first, done) for first, done in expected if done - first >= online.UNSEEN]
    assert [new["obs"].shape[1] for new, _ in seen] == [done - first for first, done in expected] != []
    for (first, done), (new, old) in zip(expected, seen, strict=True):
        assert torch.equal(new["obs"], obs[:, first:done])
        assert old["obs"].shape == new["obs"].shape
        known = {row.numpy().tobytes() for row in obs[0, :first]}
        assert all(row.numpy().tobytes() in known for row in old["obs"][0])


def test_the_simulator_as_a_model_tells_the_truth():
    protocol = build([0, 1], "simulator")
    for _ in range(112):
        protocol.step()
    indices = torch.tensor([[0, 99, 100, 57], [99, 3, 110, 100]])
    rows = protocol.replay.rows(indices)
    following, reward, mask = protocol.simulator.simulate(indices, rows["action"])
    assert torch.equal(following, rows["next_obs"])
    assert torch.equal(reward, rows["reward"])
    assert torch.equal(mask, rows["mask"])
    other, _, _ = protocol.simulator.simulate(indices, -rows["action"])
    assert not torch.equal(other, following)
    assert not protocol.diverged.any()


# -- divergence --------------------------------------------------------------------------------------------------


class Unwell:
    """An agent whose second seed's network turns to NaN after some steps; the others act on their observation."""

    def __init__(self, config, obs_size, action_size, seeds, task=""):
        self.config, self.seeds, self.size, self.after = config, list(seeds), action_size, 115

    def explore(self, obs, step):
        return self._sick(obs[:, : self.size].tanh(), step >= self.after)

    def act(self, obs):
        return self._sick(obs[..., : self.size].tanh(), self.learned >= self.after)

    def _sick(self, values, now):
        values = values.clone()
        if now and 1 in self.seeds:
            values[self.seeds.index(1)] = math.nan
        return values

    learned = 0

    def learn(self, replay, step, simulate=None):
        self.learned = step
        return {"entropy": self._sick(torch.ones(len(self.seeds)), step >= self.after)}

    def q(self, obs, action):
        return self._sick(obs.sum(-1), self.learned >= self.after)

    def log_prob_sample(self, obs, generators):
        return None, obs.sum(-1)

    @property
    def temperature(self):
        return torch.ones(len(self.seeds))

    def state(self):
        return {"learned": self.learned}

    def load(self, state):
        self.learned = state["learned"]


class UnwellConfig(SACConfig):
    implementation = f"{__name__}:Unwell"


def test_a_seed_that_diverges_is_recorded_and_disturbs_no_other():
    agent = UnwellConfig(**SMALL, updates_per_step=1)
    alone = everything(finish(build([0], agent, HOPPER)), 0)
    block = finish(build([0, 1, 2], agent, HOPPER))
    assert everything(block, 0) == alone
    assert block.diverged.tolist() == [False, True, False]
    last = [{row.metric: row.value for row in rows} for rows in block.metrics.rows]
    assert [row["diverged"] for row in last] == [0, 1, 0]
    assert math.isnan(last[1]["critic/q"])
    assert [math.isnan(row["return/final"]) for row in last] == [False, True, False], "not what doing nothing returns"
    assert last[1]["eval/length"] > 0
    assert (block.replay.data["action"][1, 115:] == 0).all()
    assert all(values.isfinite().all() for values in block.replay.data.values())
    first = build([0, 1, 2], agent, HOPPER)
    while first.done < 121:
        first.step()
    assert everything(finish(_reload(first, build([0, 1, 2], agent, HOPPER))), 1) == everything(block, 1)


@pytest.mark.parametrize("agent", ["sac-8", "mbpo"])
def test_networks_full_of_nan_neither_stop_a_run_nor_reach_another_seed(agent):
    def poisoned(seeds: list[int]) -> Online:
        protocol = build(seeds, agent, HOPPER, measure_every=16)
        while protocol.done < 113:
            protocol.step()
        nets = [
            net for part in ("sac", "ensemble") for net in vars(getattr(protocol.agent, part, protocol.agent)).values()
        ]
        for net in (net for net in nets if isinstance(net, Net) and 1 in seeds):
            net.flat.view(len(seeds), -1)[seeds.index(1)] = math.nan
        return finish(protocol)

    block = poisoned([0, 1])
    assert block.diverged.tolist() == [False, True]
    assert everything(block, 0) == everything(poisoned([0]), 0)


def explode(env: envs.Env, frames: set[int]) -> None:
    """Make an environment blow up when it is stepped at these frames of any episode."""
    step = env.step

    def unstable(action):
        if env.frame in frames and np.any(action):
            raise envs.EnvError("the simulation blew up")
        return step(action)

    env.step = unstable


@pytest.mark.parametrize("agent", ["sac", "simulator"])
def test_a_simulation_that_blows_up_ends_its_episode_and_the_run_goes_on(agent):
    def unstable() -> Online:
        protocol = build([0, 1], agent, HOPPER)
        explode(protocol.envs[1], {7})
        return protocol

    whole = finish(unstable())
    assert whole.starts[0] != whole.starts[1] == list(range(0, 130, 7))
    assert whole.diverged.tolist() == [False, True]
    rows = {name: values[1].numpy() for name, values in whole.replay.data.items()}
    assert (rows["mask"] == 1).all()
    assert (rows["action"][7::7] == 0).all()
    assert np.array_equal(rows["obs"][7], whole.envs[1].reset(online.integer(1, "environment", 1)))
    assert everything(whole, 0) == everything(finish(build([0], agent, HOPPER)), 0)
    first = unstable()
    while first.done < 115:
        first.step()
    assert everything(finish(_reload(first, unstable())), 1) == everything(whole, 1)


def test_an_evaluation_that_blows_up_ends_its_episode():
    protocol = build([0, 1], eval_episodes=2)
    explode(protocol.evaluator.envs[0], {300})
    finish(protocol)
    lengths = [[row.value for row in rows if row.metric == "eval/length"] for rows in protocol.metrics.rows]
    assert lengths == [[30, 30], [100, 100]]
    assert protocol.diverged.tolist() == [True, False]
    at_once = build([0], eval_episodes=2)
    explode(at_once.evaluator.envs[0], {0})
    rows = finish(at_once).metrics.rows[0]
    assert {row.value for row in rows if row.metric in ("eval/length", "eval/return")} == {0}


def test_a_simulated_model_that_blows_up_stands_still():
    protocol = build([0], "simulator")
    for _ in range(112):
        protocol.step()
    explode(protocol.simulator.envs[0], {50})
    indices = torch.tensor([[4, 5]])
    following, reward, mask = protocol.simulator.simulate(indices, torch.ones(1, 2, 1))
    assert torch.equal(following[0, 1], protocol.replay.data["obs"][0, 5])
    assert (reward[0, 1], mask[0].tolist()) == (0, [1, 0])
    assert protocol.diverged.all()
    _, reward, _ = protocol.simulator.simulate(indices[:, :1], torch.full((1, 1, 1), math.nan))
    assert torch.equal(reward, protocol.simulator.simulate(indices[:, :1], torch.zeros(1, 1, 1))[1])


# -- critic against return ---------------------------------------------------------------------------------------


def chain(length: int, terminated: bool = False) -> Episode:
    """State t of a chain pays t + 1."""
    numbers = np.arange(length, dtype=np.float32)
    return Episode(numbers[:, None], np.zeros((length, 1), np.float32), numbers + 1.0, terminated)


def test_returns_of_a_chain_are_its_discounted_sums():
    assert returns_to_go(np.array([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]
    assert returns_to_go(np.array([]), 0.5).tolist() == []


def test_the_critic_of_a_chain_is_compared_with_the_return_that_followed():
    # Rewards 1, 2, 3, 4, discount 1/2; entropies 8, 4, 2, 1 times 1/4 add 2, 1, 1/2, 1/4, from the next step on.
    episode, entropy = chain(4), np.array([8.0, 4.0, 2.0, 1.0])
    plain = np.array([1 + 1 + 3 / 4 + 4 / 8, 2 + 3 / 2 + 4 / 4, 3 + 4 / 2, 4.0])
    soft = plain + np.array([1 / 2 + 1 / 8 + 1 / 32, 1 / 4 + 1 / 16, 1 / 8, 0.0])
    q = np.array([10.0, 20.0, 30.0, 40.0])
    for margin, rows in ((1, slice(0, 4)), (3, slice(0, 2)), (4, slice(0, 1))):
        got = against_return([episode], q, entropy, 0.5, 0.25, margin)
        want = {"q": q[rows].mean(), "mc": plain[rows].mean(), "mc_soft": soft[rows].mean()}
        want |= {"bias": want["q"] - want["mc"], "bias_soft": want["q"] - want["mc_soft"]}
        assert got == pytest.approx(want), margin
    assert all(math.isnan(v) for v in against_return([episode], q, entropy, 0.5, 0.25, 5).values())
    whole = against_return([replace(episode, terminated=True)], q, entropy, 0.5, 0.25, 5)
    assert whole["mc"] == pytest.approx(plain.mean()), "after a true end nothing is missing"


def test_episodes_are_compared_one_by_one_and_states_count_alike():
    two = [chain(4), chain(2)]
    got = against_return(two, np.zeros(6), np.zeros(6), 0.5, 1.0, 2)
    assert got["mc"] == pytest.approx(np.mean([3.25, 4.5, 5.0, 2.0]))
    assert all(math.isnan(v) for v in against_return([], np.zeros(0), np.zeros(0), 0.5, 1.0, 2).values())


class Summing:
    """Values and log-probabilities that tell which row they belong to."""

    def q(self, obs, action):
        assert obs.shape[1] == action.shape[1] == 512
        return obs.sum(-1) + 1000 * action.sum(-1)

    def log_prob_sample(self, obs, generators):
        return None, obs.sum(-1)


def test_every_seed_gets_its_own_number_of_values_in_order():
    obs = [np.arange(n, dtype=np.float32)[:, None] for n in (700, 3, 0)]
    action = [np.ones((len(o), 2), np.float32) for o in obs]
    got = values(Summing(), obs, action)
    assert [len(v) for v in got] == [700, 3, 0]
    for value, own in zip(got, obs, strict=True):
        assert np.array_equal(value, own[:, 0] + 2000)
    assert np.array_equal(entropies(Summing(), obs, [None] * 3)[1], [0, -1, -2])
