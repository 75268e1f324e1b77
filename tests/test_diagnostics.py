"""Diagnostics on cases with a known answer."""

import numpy as np
import pytest

from dynarep import envs
from dynarep.diagnostics import on_policy_step, reward_fit
from dynarep.protocols.collect import random_transitions

REAL = np.random.default_rng(0).uniform(0, 1, 1000)


def test_a_right_reward_model_has_no_error_and_slope_one():
    fit = reward_fit(REAL, REAL)
    assert fit["nmse"] == 0
    assert fit["slope"] == pytest.approx(1)
    assert fit["mean_ratio"] == pytest.approx(1)
    assert fit["top_ratio"] == pytest.approx(1)


def test_a_model_that_predicts_the_mean_has_error_equal_to_the_variance():
    fit = reward_fit(np.full(1000, REAL.mean()), REAL)
    assert fit["nmse"] == pytest.approx(1)
    assert fit["slope"] == pytest.approx(0)


def test_a_model_collapsed_to_zero_has_ratio_zero_and_error_variance_plus_squared_mean():
    fit = reward_fit(np.zeros(1000), REAL)
    assert fit["mean_ratio"] == 0
    assert fit["nmse"] == pytest.approx(1 + REAL.mean() ** 2 / REAL.var())


def test_a_model_that_halves_and_shifts_has_slope_one_half_and_the_negative_share_it_has():
    fit = reward_fit(0.5 * REAL - 0.25, REAL)
    assert fit["slope"] == pytest.approx(0.5)
    assert fit["negative"] == np.mean(REAL < 0.5)


def test_deciles_sort_by_real_reward_and_hold_a_tenth_each():
    fit = reward_fit(REAL * 2, REAL)
    real = [fit[f"decile/{k}/real"] for k in range(10)]
    assert real == sorted(real)
    assert real[9] == pytest.approx(np.sort(REAL)[900:].mean())
    assert fit["decile/3/predicted"] == pytest.approx(2 * real[3])


def test_constant_rewards_say_nothing_instead_of_dividing_by_zero():
    assert np.isnan(reward_fit(REAL, np.ones(1000))["nmse"])


@pytest.mark.parametrize("task", ["walker-walk", "Hopper-v5"])
def test_on_policy_steps_with_the_stored_actions_give_the_stored_transitions(task):
    suite, name = envs.split_task(task)
    env = envs.make(suite, task, action_repeat=2)
    assert name
    data = random_transitions(env, 5, 40, snapshots=True)
    alive = np.flatnonzero(~data.ended)
    order = np.random.default_rng(1).permutation(alive)
    reward, following = on_policy_step(env, [data.snapshots[i] for i in order], data.action[order])
    np.testing.assert_array_equal(reward, data.reward[order])
    np.testing.assert_array_equal(following, data.next_obs[order])


def test_random_transitions_are_the_seeds_own_and_counted():
    env = envs.make("dmc", "walker-walk", action_repeat=2)
    a, b, c = (random_transitions(env, seed, 30) for seed in (1, 2, 1))
    assert len(a) == 30
    assert np.array_equal(a.obs, c.obs)
    assert not np.array_equal(a.action, b.action)
    np.testing.assert_array_equal(a.next_obs[:-1], a.obs[1:])  # one episode
    assert not a.ended.any()
