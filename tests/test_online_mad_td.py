"""MAD-TD online: bytes, the held-out split, true outcomes of the policy's actions, what is recorded, divergence."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dynarep import envs
from dynarep.configs import EnvironmentConfig
from dynarep.configs.frozen import LATENT_METRICS, RETURN_METRICS
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.mbpo import MBPOConfig
from dynarep.configs.online import OnlineConfig
from dynarep.configs.sac import SACConfig
from dynarep.nets import Net
from dynarep.protocols import Metrics, evaluation
from dynarep.protocols.evaluation import EARLY_FRAMES, Evaluator, ceiling, largest, returns_of
from dynarep.protocols.online import Online
from dynarep.protocols.snapshots import play_again
from dynarep.streams import stream

HOPPER = EnvironmentConfig(suite="gymnasium", task="Hopper-v5", action_repeat=1)  # episodes end early
PENDULUM = EnvironmentConfig(suite="dmc", task="pendulum-swingup", action_repeat=10)  # 100 agent steps an episode
STEPS, RANDOM = 64, 54
SMALL = {"width": 16, "batch_size": 32}
AGENTS = {
    "utd-1": MadTDConfig(**SMALL, updates_per_step=1),
    "utd-8": MadTDConfig(**SMALL, updates_per_step=8, model_fraction=0.25),
    "oracle": MadTDConfig(**SMALL, updates_per_step=2, model_fraction=0.25, model_data="simulator"),
    "reset": MadTDConfig(**SMALL, updates_per_step=2, reset="full", reset_every=10),
    "planner": MadTDConfig(
        **SMALL, updates_per_step=1, planner=True, plan_iterations=2, plan_samples=31, plan_elites=8
    ),
    "model-free": MadTDConfig(**SMALL, updates_per_step=1, model_free=True, model_fraction=0.0),
}


def build(seeds=(0,), agent="utd-1", environment=HOPPER, **settings) -> Online:
    given = {"steps": STEPS, "random_steps": RANDOM, "eval_every": 32, "eval_episodes": 1, "measure_every": 8}
    given |= {"horizon_margin": 5, "held_out": 0.2, "held_out_rows": 32}
    config = OnlineConfig(**(given | settings))
    return Online(environment, AGENTS[agent] if isinstance(agent, str) else agent, config, seeds)


def until(protocol: Online, step: int) -> Online:
    while protocol.done < step:
        protocol.step()
    return protocol


def finish(protocol: Online) -> Online:
    return until(protocol, protocol.total)


def everything(protocol: Online, k: int) -> list[str | bytes]:
    """All that a run of one seed leaves: its metrics, replay and networks."""
    replay = [values[k].numpy().tobytes() for values in protocol.replay.data.values()]
    return [protocol.metrics.csv(k), *replay]


def reload(protocol: Online, other: Online) -> Online:
    """What `run` does between a kill and the next start."""
    file = io.BytesIO()
    torch.save(protocol.state(), file)
    other.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    other.done, other.metrics.rows = protocol.done, [list(rows) for rows in protocol.metrics.rows]
    assert np.array_equal(other.obs, protocol.obs)
    return other


def values(protocol: Online, metric: str, k: int = 0) -> list[float]:
    return [row.value for row in protocol.metrics.rows[k] if row.metric == metric]


# -- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS)
def test_bytes_are_the_same_twice_in_every_block_and_wherever_a_run_is_cut(agent):
    """Hopper's episodes differ in length; killed while it acts at random, before and after a reset, and somewhere."""
    settings = {"agent": agent, "sharpness_rows": 32 * (agent == "utd-1")}
    whole = finish(build([3, 0], **settings))
    assert len(whole.starts[0]) > 3
    assert whole.starts[0] != whole.starts[1]
    alone = everything(finish(build([0], **settings)), 0)
    assert everything(whole, 1) == alone
    cut = build([3, 0], **settings)
    for stop in np.sort(np.random.default_rng(len(agent)).choice(np.arange(50, STEPS), 2, replace=False)):
        cut = reload(until(cut, stop), build([3, 0], **settings))
    assert [everything(finish(cut), k) for k in range(2)] == [everything(whole, k) for k in range(2)]


def test_a_cut_run_is_continued_to_the_same_bytes_on_a_dmc_task():
    settings = {"agent": "oracle", "environment": PENDULUM, "steps": 112, "random_steps": 104, "eval_every": 112}
    whole, first = finish(build(**settings)), until(build(**settings), 109)
    assert everything(finish(reload(first, build(**settings))), 0) == everything(whole, 0)
    assert (whole.replay.data["mask"] == 0).nonzero().tolist() == [[0, 99]], "at time limits as well"


def test_measuring_changes_nothing():
    seldom, often = build(measure_every=64), build(measure_every=6, sharpness_rows=32, held_out_rows=64)
    states = [finish(protocol).agent.state() for protocol in (seldom, often)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# -- the held-out part -------------------------------------------------------------------------------------------


def test_the_split_is_the_seeds_own():
    """Neither the block nor the agent decides it."""
    block, alone = build([4, 7], held_out=0.3), build([7], "oracle", held_out=0.3)
    places = torch.arange(10)[None]
    assert torch.equal(block.held.absolute(places.repeat(2, 1))[1], alone.held.absolute(places)[0])
    assert torch.equal(block.training.absolute(places.repeat(2, 1))[1], alone.training.absolute(places)[0])
    for k, seed in enumerate((4, 7)):
        drawn = stream(seed, "held out").random(STEPS) < 0.3
        drawn[:2] = False, True
        for part, own in ((block.training, ~drawn), (block.held, drawn)):
            rows = np.flatnonzero(own)
            assert part.absolute(torch.arange(len(rows)).repeat(2, 1))[k].tolist() == rows.tolist()
    assert until(block, 2).training.sizes.tolist() == block.held.sizes.tolist() == [1, 1]


@pytest.mark.parametrize("agent", ["utd-8", "oracle"])
def test_held_out_transitions_and_the_newest_one_are_never_learned_from(agent):
    protocol = until(build([0, 1], agent, held_out=0.3), RANDOM)
    learned, started, update, simulate = [], [], protocol.agent.update, protocol.simulator.simulate

    def spy(batch, *arguments, **named):
        learned.append(batch["next_obs"].clone())
        return update(batch, *arguments, **named)

    protocol.agent.update = spy
    if agent == "oracle":
        protocol._simulate = lambda indices, actions: (started.append(indices), simulate(indices, actions))[1]
    finish(protocol)
    held = [set(map(int, np.flatnonzero(stream(seed, "held out").random(STEPS) < 0.3))) - {0} | {1} for seed in (0, 1)]
    assert all(len(own) > 9 for own in held)
    for k in range(2):
        where = {row.numpy().tobytes(): i for i, row in enumerate(protocol.replay.data["next_obs"][k])}
        assert len(where) == STEPS
        for step, batch in zip(range(RANDOM, STEPS), learned, strict=True):
            drawn = {where[row.numpy().tobytes()] for row in batch[k].flatten(0, 1)}
            assert not drawn & held[k]
            newest = max(row for row in range(step + 1) if row not in held[k])
            assert max(drawn) < newest
        everything_drawn = {where[row.numpy().tobytes()] for batch in learned for row in batch[k].flatten(0, 1)}
        assert len(everything_drawn) > 30, "nearly all others are"
        assert all(not set(rows[k].flatten().tolist()) & held[k] for rows in started)
    assert bool(started) == (agent == "oracle")


@pytest.mark.parametrize("environment", [HOPPER, PENDULUM], ids=["gymnasium", "dmc"])
def test_on_policy_outcomes_are_what_the_simulator_does_after_the_same_history(monkeypatch, environment):
    """Each is made again from the start of its episode; the mask is the stored transition's."""
    seen = []
    monkeypatch.setattr(evaluation, "generalisation", lambda *sets: seen.append(sets) or {})
    settings = {"steps": 120, "random_steps": 111, "eval_every": 120, "measure_every": 120, "environment": environment}
    protocol = finish(reload(until(build([0, 1], **settings), 115), build([0, 1], **settings)))
    ((_, train, validation, on_policy),) = seen
    assert protocol.simulator.states[0], "kept again after the resume"
    assert torch.equal(on_policy["action"], protocol.agent.act(validation["obs"]))
    assert torch.equal(on_policy["mask"], validation["mask"])
    data, env = protocol.replay.data, envs.from_config(environment)
    for k, seed in enumerate((0, 1)):
        where = {row.numpy().tobytes(): i for i, row in enumerate(data["obs"][k])}
        for j in range(0, 32, 3):
            row = where[validation["obs"][k, j].numpy().tobytes()]
            assert torch.equal(validation["next_obs"][k, j], data["next_obs"][k, row])
            episode = sum(start <= row for start in protocol.starts[k]) - 1
            before = data["action"][k, protocol.starts[k][episode] : row].numpy()
            assert np.array_equal(play_again(env, seed, episode, before), validation["obs"][k, j].numpy())
            step = env.step(on_policy["action"][k, j].numpy())
            assert np.array_equal(step.obs, on_policy["next_obs"][k, j].numpy())
            assert np.float32(step.reward) == on_policy["reward"][k, j]
    known = {row.numpy().tobytes() for row in protocol.replay.data["obs"][0]}
    assert all(row.numpy().tobytes() in known for row in train["obs"][0])


def test_states_are_kept_where_they_are_asked_for_and_made_again_when_they_are_missing():
    protocol = until(build([0, 1]), 50)
    held = [protocol.held.absolute(torch.zeros(2, 1, dtype=torch.int64))[k].item() for k in range(2)]
    assert all(set(states) == set(np.flatnonzero(own[:50])) for states, own in zip(
        protocol.simulator.states, protocol.simulator.wanted, strict=True
    ))  # fmt: skip
    other = reload(protocol, build([0, 1]))
    assert other.simulator.states == [{}, {}], "a checkpoint holds none"
    indices = torch.tensor([[row] for row in held])
    rows = other.replay.rows(indices)
    for made in (protocol, other):
        following, reward, _ = made.simulator.simulate(indices, rows["action"])
        assert torch.equal(following, rows["next_obs"])
        assert torch.equal(reward, rows["reward"])
    first_episode = [row for row in range(other.starts[0][1]) if other.simulator.wanted[0, row]]
    assert set(other.simulator.states[0]) == set(first_episode), "its episode's alone"
    for state, row in ((other.simulator.states[0][r], r) for r in first_episode):
        assert np.array_equal(state.physics, protocol.simulator.states[0][row].physics)


def test_agents_that_want_the_whole_replay_cannot_hold_anything_out():
    for agent in (SACConfig(**SMALL), MBPOConfig(**SMALL)):
        with pytest.raises(ValueError, match=f"held_out, 0.2: {agent.name} learns from the whole replay"):
            build(agent=agent)
    with pytest.raises(ValueError, match=r"held_out, 0.05: needs 2 steps or more, all kept: raise replay_capacity"):
        OnlineConfig(steps=100, random_steps=10, eval_every=50, replay_capacity=99, held_out=0.05)
    with pytest.raises(ValueError, match="replay_capacity, 63: must hold the 64 transitions"):
        build(agent="oracle", held_out=0.0, replay_capacity=63)


# -- what is recorded --------------------------------------------------------------------------------------------


def test_a_run_records_what_is_declared_and_nothing_else():
    recorded = {
        name: {row.metric for row in finish(build([0], name, environment, **settings)).metrics.rows[0]}
        for name, environment, settings in (
            ("utd-1", PENDULUM, {"sharpness_rows": 32, "eval_every": 64}),
            ("oracle", HOPPER, {"held_out": 0.0}),
            ("model-free", HOPPER, {"sharpness_rows": 32}),
        )
    }
    inside = {name for name in LATENT_METRICS if not name.startswith("sharp/")}
    apart = {"td_l2", "td_rms", "td_ce", "q", "model_reward_rms", "model_latent_ce"}
    returns = {"eval/return", "eval/length", "train/return", "return/random", "diverged"}
    returns |= {"return/final", "return/area", "return/area_learning"}
    always = returns | {"drawdown/mean", "drawdown/max", "critic/over_early", "replay/reward"} | RETURN_METRICS
    assert recorded["utd-1"] == always | LATENT_METRICS
    always -= {"critic/q_over_ceiling"}  # rewards of Gymnasium's tasks have no bound
    assert recorded["oracle"] == always | {name for name in inside if name.split("/")[0] not in apart}
    of_models = {name for name in LATENT_METRICS if name.startswith(("model", "latent"))}
    assert recorded["model-free"] == always | LATENT_METRICS - of_models
    assert all(names <= OnlineConfig.metrics for names in recorded.values())


@pytest.mark.parametrize("repeat", [1, 2])
def test_frames_updates_and_both_kinds_of_return(repeat):
    hopper = HOPPER.model_copy(update={"action_repeat": repeat})
    protocol = finish(build([0], "utd-8", hopper))
    rows = protocol.metrics.rows[0]
    assert all(row.frame == repeat * row.agent_step for row in rows)
    assert all(row.update == 8 * max(0, row.agent_step - RANDOM) for row in rows)
    assert [r.agent_step for r in rows if r.metric == "td_rms/on_policy"] == [56, 64]
    assert [r.agent_step for r in rows if r.metric == "eval/return"] == [32, 64]
    rewards, starts = protocol.replay.data["reward"][0].double().numpy(), protocol.starts[0]
    sums = {end: rewards[start:end].sum() for start, end in pairwise(starts)}
    for step, value in [(r.agent_step, r.value) for r in rows if r.metric == "train/return"]:
        assert value == pytest.approx(np.mean([s for end, s in sums.items() if step - 32 < end <= step]), rel=1e-6)
    obs = envs.from_config(hopper).reset(evaluation.integer(0, "evaluation", STEPS, 0))
    env, total = envs.from_config(hopper), 0.0
    assert np.array_equal(env.reset(evaluation.integer(0, "evaluation", STEPS, 0)), obs)
    for _ in range(int(values(protocol, "eval/length")[-1])):
        step = env.step(protocol.agent.act(torch.from_numpy(obs)[None, None])[0, 0].numpy())
        obs, total = step.obs, total + step.reward
    assert step.terminated
    assert values(protocol, "eval/return")[-1] == pytest.approx(total, rel=1e-12), "the policy without noise"


def test_peaks_are_the_largest_so_far_and_early_ones_those_of_the_first_frames():
    metrics, got = Metrics([0, 1]), []
    series = [(1, [3.0, -2.0]), (EARLY_FRAMES, [5.0, math.nan]), (EARLY_FRAMES + 2, [4.0, -3.0]), (10**6, [9.0, 0.5])]
    for frame, over in series:
        peaks = [largest(metrics, "critic/over", over, frame, until) for until in (math.inf, EARLY_FRAMES)]
        metrics.add(frame // 2, frame, 0, {"critic/over": over, "critic/over_peak": peaks[0], "else": [99.0, 99.0]})
        got.append(peaks)
    assert got == [[[3, -2], [3, -2]], [[5, -2], [5, -2]], [[5, -2], [5, -2]], [[9, 0.5], [5, -2]]]
    assert largest(metrics, "none", [math.nan, 1.0], 1) == [pytest.approx(math.nan, nan_ok=True), 1]


def test_a_run_records_its_peaks_after_a_resume_as_well():
    first = until(build([0, 1], eval_every=16), 55)
    protocol = finish(reload(first, build([0, 1], eval_every=16)))
    for k in range(2):
        over = values(protocol, "critic/over", k)
        assert len(over) == 4
        assert values(protocol, "critic/over_peak", k) == np.maximum.accumulate(over).tolist()
        assert values(protocol, "critic/over_early", k) == values(protocol, "critic/over_peak", k)


def test_falls_are_those_of_the_evaluations_after_the_random_steps(monkeypatch):
    seen = []
    monkeypatch.setattr("dynarep.protocols.online.drawdown", lambda curve: seen.append(curve) or (0.25, 0.5))
    protocol = finish(build([0], eval_every=8))
    assert seen == [values(protocol, "eval/return")[6:]]
    assert (values(protocol, "drawdown/mean"), values(protocol, "drawdown/max")) == ([0.25], [0.5])


def test_an_episode_of_500_agent_steps_leaves_states_to_compare():
    """Action repeat 2, the margin of MAD-TD's experiments."""
    walker = EnvironmentConfig(suite="dmc", task="walker-walk", action_repeat=2)
    settings = {"steps": 4, "random_steps": 2, "eval_every": 4, "measure_every": 100, "horizon_margin": 250}
    protocol = finish(build([0], environment=walker, **settings))
    assert values(protocol, "eval/length") == [500]
    assert math.isfinite(values(protocol, "critic/bias")[0])
    assert values(protocol, "critic/mc_tail")[0] > values(protocol, "critic/mc")[0] > 0


class Reporting:
    """A task that an action above 0.5 solves for as long as it is taken; four agent steps an episode."""

    obs_size = action_size = action_repeat = 1
    reports_success = True

    def reset(self, seed):
        self.t = 0
        return np.zeros(1, np.float32)

    def step(self, action):
        self.t += 1
        return envs.Step(np.full(1, self.t, np.float32), 1.0, False, self.t == 4, success=bool(action[0] > 0.5))


def test_success_counts_at_any_time_and_at_the_end(monkeypatch):
    monkeypatch.setattr(envs, "from_config", lambda config: Reporting())

    class Agent:
        plans = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, math.nan, 1, 1]])

        def act(self, obs):
            return self.plans[torch.arange(4), obs[:, 0, 0].long()][:, None, None]

    diverged = np.zeros(4, bool)
    found = returns_of(Evaluator(PENDULUM, range(4), diverged).play(Agent(), 2, at=0))
    assert found["eval/success"][:3] == [1, 1, 0]
    assert found["eval/success_last"][:3] == [0, 1, 0]
    assert math.isnan(found["eval/success"][3])
    assert math.isnan(found["eval/success_last"][3])
    assert diverged.tolist() == [False, False, False, True]
    assert found["eval/return"][:3] == [4, 4, 4]


# -- divergence --------------------------------------------------------------------------------------------------


def test_networks_full_of_nan_neither_stop_a_run_nor_reach_another_seed():
    def poisoned(seeds: list[int]) -> Online:
        protocol = until(build(seeds, "oracle", sharpness_rows=32), RANDOM + 1)
        for net in (n for n in vars(protocol.agent).values() if isinstance(n, Net) and 1 in seeds):
            net.flat.view(len(seeds), -1)[seeds.index(1)] = math.nan
        return finish(protocol)

    block = poisoned([0, 1])
    assert block.diverged.tolist() == [False, True]
    assert everything(block, 0) == everything(poisoned([0]), 0)
    last = {row.metric: row.value for row in block.metrics.rows[1]}
    assert last["diverged"] == 1
    assert all(math.isnan(last[name]) for name in ("td_rms/on_policy", "critic/over", "eval/return", "return/final"))
    assert math.isfinite(last["critic/over_peak"]), "what it was before"


def test_values_beyond_all_possible_returns_are_divergence_while_they_last():
    assert ceiling(PENDULUM, 0.99) == pytest.approx(1000)
    assert ceiling(PENDULUM.model_copy(update={"reward_scale": 0.1, "action_repeat": 2}), 0.98) == pytest.approx(10)
    flags = []
    for environment in (PENDULUM, HOPPER):
        protocol = until(build([0, 1], environment=environment), 31)
        protocol.agent.q = lambda obs, action: torch.tensor([[1100.0], [900.0]]).expand(2, obs.shape[1])
        protocol.step()
        del protocol.agent.q
        protocol.evaluate()
        flags.append([values(protocol, "diverged", k) for k in range(2)])
        assert not protocol.diverged.any()
    assert flags == [[[1, 0], [0, 0]], [[0, 0], [0, 0]]], "Gymnasium's rewards have no bound"
