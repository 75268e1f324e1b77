"""The frozen protocol: bytes, what is learned from, true outcomes at held-out states, when it is measured."""

import io
import math

import numpy as np
import pytest
import torch

from dynarep import envs
from dynarep.configs import EnvironmentConfig
from dynarep.configs.frozen import LATENT_METRICS, RETURN_METRICS, FrozenConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.protocols import evaluation
from dynarep.protocols.collect import random_transitions
from dynarep.protocols.frozen import Frozen
from dynarep.protocols.snapshots import play_again
from dynarep.streams import stream

HOPPER = EnvironmentConfig(suite="gymnasium", task="Hopper-v5", action_repeat=1)  # episodes end early
PENDULUM = EnvironmentConfig(suite="dmc", task="pendulum-swingup", action_repeat=10)  # 100 agent steps an episode
AGENT = {"width": 16, "batch_size": 32, "updates_per_step": 4, "model_fraction": 0.25}


def build(seeds=(0,), environment=HOPPER, settings=None, **agent) -> Frozen:
    given = {"transitions": 64, "held_out": 32, "updates": 24, "measure_at": (8,), "horizon_margin": 5}
    return Frozen(environment, MadTDConfig(**AGENT | agent), FrozenConfig(**given | (settings or {})), seeds)


def finish(protocol: Frozen) -> Frozen:
    while protocol.done < protocol.total:
        protocol.advance()
    return protocol


def reload(protocol: Frozen, other: Frozen) -> Frozen:
    """What `run` does between a kill and the next start."""
    file = io.BytesIO()
    torch.save(protocol.state(), file)
    other.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    other.done, other.metrics.rows = protocol.done, [list(rows) for rows in protocol.metrics.rows]
    return other


def values(protocol: Frozen, metric: str, k: int = 0) -> list[float]:
    return [row.value for row in protocol.metrics.rows[k] if row.metric == metric]


@pytest.mark.parametrize("source", ["model", "simulator"])
def test_bytes_are_the_same_in_every_block_and_wherever_a_run_is_cut(source):
    settings = {"environment": HOPPER, "model_data": source}
    whole = finish(build([3, 0], **settings))
    assert whole.metrics.csv(1) == finish(build([0], **settings)).metrics.csv(0)
    cut = build([3, 0], **settings)
    while cut.done < cut.total:
        cut.advance()
        cut = reload(cut, build([3, 0], **settings))
    assert [cut.metrics.csv(k) for k in range(2)] == [whole.metrics.csv(k) for k in range(2)]


def test_every_arm_learns_from_and_is_judged_on_the_seeds_own_random_transitions():
    protocol = build([4, 7], settings={"transitions": 70, "held_out": 64})
    for k, seed in enumerate((4, 7)):
        data = random_transitions(envs.from_config(HOPPER), seed, 134)
        out = np.sort(stream(seed, "held out").permutation(134)[:64])
        for part, own in ((protocol.held, out), (protocol.training, np.setdiff1d(np.arange(134), out))):
            rows = part.rows(torch.arange(len(own)).repeat(2, 1))
            for name in ("obs", "action", "reward", "next_obs"):
                assert np.array_equal(rows[name][k].numpy(), getattr(data, name)[own]), name
            assert np.array_equal(rows["mask"][k].numpy(), 1.0 - data.ended[own])


def test_a_time_limit_masks_a_transition():
    assert (
        build(environment=PENDULUM, settings={"transitions": 100}).replay.data["mask"][0] == 0
    ).nonzero().tolist() == [[99]]


@pytest.mark.parametrize("source", ["model", "simulator"])
def test_held_out_transitions_and_the_newest_one_are_never_learned_from(source):
    protocol = build([0, 1], model_data=source, settings={"updates": 80, "eval_episodes": 0})
    learned, started, update, simulate = [], [], protocol.agent.update, protocol.simulator.simulate

    def spy(batch, *arguments, **named):
        learned.append(batch["next_obs"].clone())
        return update(batch, *arguments, **named)

    protocol.agent.update = spy
    if source == "simulator":
        protocol._simulate = lambda indices, actions: (started.append(indices), simulate(indices, actions))[1]
    finish(protocol)
    for k in range(2):
        training = protocol.training.absolute(torch.arange(64).repeat(2, 1))[k].tolist()
        where = {row.numpy().tobytes(): i for i, row in enumerate(protocol.replay.data["next_obs"][k])}
        drawn = {where[row.numpy().tobytes()] for batch in learned for row in batch[k].flatten(0, 1)}
        assert drawn == set(training[:-1])
        assert all(set(rows[k].flatten().tolist()) <= drawn for rows in started)
    assert bool(started) == (source == "simulator")


@pytest.mark.parametrize("environment", [HOPPER, PENDULUM], ids=["gymnasium", "dmc"])
def test_on_policy_outcomes_are_what_the_simulator_does_after_the_same_history(monkeypatch, environment):
    """Of every held-out state, each made again from the start of its episode."""
    seen = []
    monkeypatch.setattr(
        evaluation, "generalisation", lambda *sets: seen.append(sets[2:]) or {"q/on_policy": torch.zeros(2)}
    )
    protocol = build([0, 1], environment, {"transitions": 88, "eval_episodes": 0})
    protocol.measure()
    ((validation, on_policy),) = seen
    assert torch.equal(on_policy["action"], protocol.agent.act(validation["obs"]))
    assert torch.equal(on_policy["mask"], validation["mask"])
    env = envs.from_config(environment)
    for k, seed in enumerate((0, 1)):
        actions, starts = protocol.replay.data["action"][k].numpy(), protocol.simulator.starts[k]
        for j, row in enumerate(protocol.held.absolute(torch.arange(32).repeat(2, 1))[k].tolist()):
            episode = sum(start <= row for start in starts) - 1
            obs = play_again(env, seed, episode, actions[starts[episode] : row])
            assert np.array_equal(obs, validation["obs"][k, j].numpy())
            step = env.step(on_policy["action"][k, j].numpy())
            assert np.array_equal(step.obs, on_policy["next_obs"][k, j].numpy())
            assert np.float32(step.reward) == on_policy["reward"][k, j]


@pytest.mark.parametrize("task", ["walker-walk", "Hopper-v5"])
def test_stored_actions_lead_from_restored_states_to_stored_outcomes(task):
    suite, _ = envs.split_task(task)
    protocol = build([0, 1], EnvironmentConfig(suite=suite, task=task, action_repeat=2), {"eval_episodes": 0})
    places = torch.arange(32).flip(0).repeat(2, 1)
    rows, states = protocol.held.rows(places), protocol.held.absolute(places)
    for _ in range(2):
        following, reward, _ = protocol.simulator.simulate(states, rows["action"])
        assert torch.equal(following, rows["next_obs"])
        assert torch.equal(reward, rows["reward"])
        protocol.simulator.states = [{}, {}]  # made again
    other, _, _ = protocol.simulator.simulate(states, -rows["action"])
    assert not torch.equal(other, following)


def test_it_is_measured_at_the_start_at_the_end_and_at_the_end_of_stated_agent_steps():
    protocol = finish(build(settings={"updates": 23, "measure_at": (1, 8, 13), "eval_episodes": 0}))
    rows = [row for row in protocol.metrics.rows[0] if row.metric == "td_rms/train"]
    assert [row.update for row in rows] == [0, 4, 8, 16, 24]
    assert {(row.agent_step, row.frame) for row in protocol.metrics.rows[0]} == {(96, 96)}
    assert protocol.done == protocol.total == 24
    repeated = build(environment=PENDULUM, settings={"eval_episodes": 0})
    repeated.measure()
    assert {(row.agent_step, row.frame) for row in repeated.metrics.rows[0]} == {(96, 960)}
    with pytest.raises(ValueError, match=r"measure_at, 25: must be in 1..updates, 24"):
        FrozenConfig(updates=24, measure_at=(25,))


def test_it_records_what_is_declared_and_nothing_else():
    full = finish(build(environment=PENDULUM, settings={"sharpness_rows": 32}))
    assert {row.metric for row in full.metrics.rows[0]} == FrozenConfig.metrics
    assert len(values(full, "td_rms/train")) == 3
    for once in ("critic/over", "eval/length", "sharp/random/policy"):
        assert len(values(full, once)) == 1, f"{once} costs too much to be measured before the end"
    without = build(settings={"eval_episodes": 0})
    without.measure()
    inside = {name for name in LATENT_METRICS if not name.startswith("sharp/")}
    assert {row.metric for row in without.metrics.rows[0]} == inside | {"diverged"}
    gymnasium = finish(build())
    returns = RETURN_METRICS - {"critic/q_over_ceiling", "critic/over_peak"} | {"eval/return", "eval/length"}
    assert {row.metric for row in gymnasium.metrics.rows[0]} == inside | returns | {"diverged"}


def test_values_beyond_all_possible_returns_are_divergence_while_they_last(monkeypatch):
    """Pendulum: at most 10 a step, 1000 in all."""
    q = torch.tensor([1100.0, 900.0])
    for environment, flags in ((PENDULUM, [[1, 0], [0, 0]]), (HOPPER, [[0, 0], [0, 0]])):
        protocol = build([0, 1], environment, {"eval_episodes": 0})
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "generalisation", lambda *sets: {"q/on_policy": q})
            protocol.measure()
        protocol.measure()
        assert [values(protocol, "diverged", k) for k in range(2)] == flags


def test_networks_full_of_nan_are_divergence_for_good_and_reach_no_other_seed():
    def poisoned(seeds: list[int], cut: bool = False) -> Frozen:
        protocol = build(seeds, model_data="simulator", settings={"sharpness_rows": 32})
        protocol.advance()
        if 1 in seeds:
            protocol.agent.actor.flat.view(len(seeds), -1)[seeds.index(1)] = math.nan
        protocol.measure()
        return finish(reload(protocol, build(seeds, model_data="simulator", settings={"sharpness_rows": 32})))

    block = poisoned([0, 1])
    assert block.metrics.csv(0) == poisoned([0]).metrics.csv(0)
    assert values(block, "diverged", 1)[-2:] == [1, 1]
    assert math.isnan(values(block, "eval/return", 1)[-1])
    well = build([0, 1])
    well.diverged[1] = True
    again = reload(well, build([0, 1]))
    again.measure()
    assert [values(again, "diverged", k) for k in range(2)] == [[0], [1]]
