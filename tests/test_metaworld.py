"""Meta-World: the library's own numbers, scripted experts that succeed, snapshots that replay exactly."""

import functools
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

import test_online
from dynarep import plan
from dynarep.configs import EnvironmentConfig
from dynarep.envs import Env, EnvError, Snapshot, Step, frame_before, known_tasks, make, split_task
from dynarep.envs.base import load
from dynarep.protocols.online import Online

ASKED_FOR = [f"metaworld-{name}" for name in ("assembly", "coffee-push", "coffee-pull", "stick-pull")]  # by a reviewer
EXPERTS = [f"metaworld-{name}" for name in ("reach", "push", "pick-place", "button-press", "hammer", "sweep")]
QUICK = [*EXPERTS, "metaworld-assembly", "metaworld-coffee-pull"]
# Fixtures placed by editing the model; a target that is a view of a site; a reward that reads views of the fingers.
FEW = ["metaworld-coffee-push", "metaworld-basketball", "metaworld-sweep"]
EVERY_TASK = known_tasks("metaworld")


@functools.cache
def shared(task: str, action_repeat: int = 2) -> Env:
    """One Env for several tests: that it has been used before must not matter."""
    return make(*split_task(task), action_repeat=action_repeat)


def random_actions(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 4)).astype(np.float32)


def content(step: Step) -> tuple[bytes, float, bool, bool, bool]:
    return step.obs.tobytes(), step.reward, step.terminated, step.truncated, step.success


def library(task: str, seed: int):
    """The library's own environment at the start of the episode of a seed."""
    load("metaworld.env_dict")
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task.removeprefix('metaworld-')}-v3-goal-observable"](seed=0)
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    env.seed(seed)
    return env, env.reset()[0]


def expert(task: str):
    """Return the library's scripted policy: observation -> action in [-1, 1]."""
    load("metaworld.policies")
    from metaworld.policies import ENV_POLICY_MAP

    policy = ENV_POLICY_MAP[f"{task.removeprefix('metaworld-')}-v3"]()

    def act(obs: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*may be too high")
            return np.clip(policy.get_action(np.asarray(obs, np.float64)), -1, 1)

    return act


def play(env: Env, n: int, seed: int, scripted: int = 0) -> list[tuple[Snapshot, np.ndarray, Step]]:
    """n agent steps of an episode as (state before, action, outcome): at first the expert's, so that objects move."""
    act, obs, record = expert(env.task), env.reset(seed), []
    for i, drawn in enumerate(random_actions(n, seed)):
        action = act(obs) if i < scripted else drawn
        before = env.snapshot()
        step = env.step(action)
        obs = step.obs
        record.append((before, action, step))
    return record


def successes(task: str, seed: int, scripted: bool, action_repeat: int = 2) -> list[bool]:
    env, act = shared(task, action_repeat), expert(task)
    obs, found = env.reset(seed), []
    for drawn in random_actions(200 // action_repeat, seed):
        step = env.step(act(obs) if scripted else drawn)
        obs = step.obs
        found.append(step.success)
    assert step.truncated
    return found


# Names and numbers


def test_table_of_tasks_is_the_installed_library() -> None:
    load("metaworld.env_dict")
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert [f"metaworld-{name.removesuffix('-v3')}" for name in ALL_V3_ENVIRONMENTS] == EVERY_TASK
    assert len(set(EVERY_TASK)) == 50


def test_import_leaves_the_library_alone() -> None:
    code = "import sys, dynarep.envs; dynarep.envs.split_task('metaworld-reach'); print('metaworld' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_names_say_the_suite_and_slips_are_met_with_the_nearest() -> None:
    assert split_task("metaworld-assembly") == ("metaworld", "metaworld-assembly")
    with pytest.raises(EnvError, match=r"metaworld-assemble.*did you mean.*metaworld-assembly"):
        split_task("metaworld-assemble")


@pytest.mark.parametrize("task", FEW)
def test_steps_are_those_of_the_library(task: str) -> None:
    env, (reference, obs) = shared(task), library(task, 7)
    act = expert(task)
    assert env.reset(7).tobytes() == obs.astype(np.float32).tobytes()
    for i, drawn in enumerate(random_actions(60)):
        action = act(obs).astype(np.float32) if i < 40 else drawn
        step = env.step(action)
        rewards = []
        for _ in range(2):
            obs, reward, _, _, info = reference.step(action)
            rewards.append(reward)
        assert step.obs.tobytes() == obs.astype(np.float32).tobytes()
        assert step.reward == float(rewards[0]) + float(rewards[1])
        assert step.success == bool(info["success"])
    assert env.frame == 120


def test_an_episode_has_200_frames_and_no_end_of_its_own() -> None:
    env = shared("metaworld-reach")
    assert (env.episode_frames, env.obs_size, env.action_size, env.action_repeat) == (200, 39, 4, 2)
    env.reset(0)
    steps = [env.step(action) for action in random_actions(100)]
    assert [step.truncated for step in steps] == [False] * 99 + [True]
    assert not any(step.terminated for step in steps)
    with pytest.raises(EnvError, match="end of its episode"):
        env.step(np.zeros(4))


def test_entries_that_repeat_the_frame_before_are_those_named() -> None:
    named = frame_before(EnvironmentConfig(suite="metaworld", task="metaworld-coffee-push"))
    env = shared("metaworld-coffee-push", 1)
    obs = env.reset(0)
    for action in random_actions(5):
        following = env.step(action).obs
        np.testing.assert_array_equal(following[named], obs[:18])
        assert (following[:18] != obs[:18]).any()
        obs = following
    assert not np.zeros(99)[frame_before(EnvironmentConfig(task="walker-walk"))].size


def test_only_this_suite_says_whether_a_task_is_solved() -> None:
    assert shared("metaworld-reach").reports_success
    other = make("dmc", "reacher-easy")
    assert not other.reports_success
    other.reset(0)
    assert other.step(np.zeros(other.action_size)).success is False


def test_reward_scale_changes_the_reward_and_nothing_else() -> None:
    plain, scaled = shared("metaworld-reach"), make("metaworld", "metaworld-reach", 2, reward_scale=0.1)
    plain.reset(0)
    scaled.reset(0)
    for action in random_actions(10):
        one, other = plain.step(action), scaled.step(action)
        assert other.reward == one.reward * 0.1 > 0
        assert other.obs.tobytes() == one.obs.tobytes()


@pytest.mark.parametrize("setting", [{"drop_observations": ["goal"]}, {"zero_contact_forces": True}])
def test_settings_of_other_suites_are_refused(setting: dict) -> None:
    with pytest.raises(EnvError, match=f"metaworld-reach: {next(iter(setting))}"):
        make("metaworld", "metaworld-reach", **setting)


def test_every_task_has_a_measured_cost() -> None:
    for task in ASKED_FOR + EXPERTS:
        assert plan.rates()["tasks"][task][:2] == [39, 4]


# Experts


@pytest.mark.parametrize("task", EXPERTS[:2])
def test_the_scripted_expert_succeeds_and_random_actions_do_not(task: str) -> None:
    """Names, goals that can be seen, order of actions, repeat and success, all at once."""
    assert any(successes(task, 0, scripted=True))
    assert not any(successes(task, 0, scripted=False))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "action_repeat"), [(t, 2) for t in ASKED_FOR + EXPERTS] + [(t, 1) for t in QUICK])
def test_every_named_expert_succeeds_on_three_goals(task: str, action_repeat: int) -> None:
    """Within 200 frames; at action repeat 1 the expert of stick-pull may need more."""
    assert all(any(successes(task, seed, True, action_repeat)) for seed in range(3))
    assert not any(successes(task, 0, False, action_repeat))


def test_the_suites_expert_is_the_librarys_clipped() -> None:
    env, act = shared("metaworld-coffee-push"), expert("metaworld-coffee-push")
    obs, own, clipped = env.reset(3), env.expert(), 0
    for _ in range(30):
        action = own(obs)
        np.testing.assert_array_equal(action, act(obs))
        clipped += int((np.abs(action) == 1).any())
        obs = env.step(action).obs
    assert 0 < clipped < 30


def test_success_can_end_again() -> None:
    """So "at any time" and "at the last step" differ, and both have to be reported."""
    found = successes("metaworld-coffee-button", 0, scripted=True)
    assert any(found)
    assert not found[-1]


# Seeds


def assert_depends_on_its_seed_only(task: str, scripted: int) -> None:
    used, new, another = shared(task), make("metaworld", task, 2), make("metaworld", task, 2)
    used.restore(play(another, scripted + 5, 6, scripted)[-1][0])
    play(used, scripted + 5, 4, scripted)
    firsts = [env.reset(8) for env in (new, used)]
    assert firsts[0].tobytes() == firsts[1].tobytes()
    states = [env.snapshot() for env in (new, used)]
    assert states[0].physics.tobytes() == states[1].physics.tobytes()
    assert all(array.tobytes() == states[1].model[name].tobytes() for name, array in states[0].model.items())
    for action in random_actions(20):
        assert content(new.step(action)) == content(used.step(action))


def test_an_episode_depends_on_its_seed_only() -> None:
    assert_depends_on_its_seed_only("metaworld-coffee-push", scripted=25)


@pytest.mark.slow
@pytest.mark.parametrize("task", EVERY_TASK)
def test_every_tasks_episode_depends_on_its_seed_only(task: str) -> None:
    assert_depends_on_its_seed_only(task, scripted=60)


def test_every_seed_draws_a_goal_of_its_own() -> None:
    env = shared("metaworld-coffee-push")
    assert len({env.reset(seed)[-3:].tobytes() for seed in range(8)}) == 8


def test_no_global_generator_is_touched() -> None:
    before = np.random.get_state()[1].tobytes()
    play(make("metaworld", "metaworld-reach", 2), 3, 1)
    assert np.random.get_state()[1].tobytes() == before


# Snapshots


def assert_replays(task: str, scripted: int, drawn: int, probes: int) -> None:
    """From any moment, in the Env that was there or in a fresh one, whatever has happened since."""
    env, other = shared(task), make("metaworld", task, 2)
    record = [row for seed in (1, 11) for row in play(env, scripted + drawn, seed, scripted)]
    env.reset(31)
    for i in np.random.default_rng(3).permutation(len(record))[:probes]:
        before, action, step = record[i]
        for name, target in (("the same", env), ("a fresh", other)):
            target.restore(before)
            assert target.frame == before.frame
            assert content(target.step(action)) == content(step), f"{task}: step {i} differs, restored into {name} Env"
    middle = record[scripted // 2][0]
    other.restore(middle)
    env.restore(other.snapshot())  # what was restored can be captured again
    assert set(middle.model) == {"body_pos", "site_pos"}
    for name, array in middle.model.items():
        assert getattr(env._model, name).tobytes() == array.tobytes(), f"{task}: {name} was left as it was"
    for _, action, step in record[scripted // 2 : scripted + drawn]:
        assert content(env.step(action)) == content(step), f"{task}: the episode does not go on as before"


@pytest.mark.parametrize("task", FEW)
def test_restored_state_replays_to_the_last_bit(task: str) -> None:
    assert_replays(task, scripted=30, drawn=10, probes=10)


@pytest.mark.slow
@pytest.mark.parametrize("task", EVERY_TASK)
def test_every_task_replays_to_the_last_bit(task: str) -> None:
    assert_replays(task, scripted=65, drawn=35, probes=40)


@pytest.mark.slow
@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_task_edits_no_array_of_the_model_but_those_that_a_snapshot_holds(task: str) -> None:
    env = make("metaworld", task, 2)
    arrays = {
        name: getattr(env._model, name) for name in dir(env._model) if not name.startswith(("_", "mesh_", "tex_"))
    }
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    loaded = {name: array.copy() for name, array in arrays.items()}
    play(env, 60, 1, scripted=50)
    edited = {name for name, array in arrays.items() if array.tobytes() != loaded[name].tobytes()}
    assert edited <= set(env.snapshot().model)


def test_taking_a_snapshot_disturbs_nothing() -> None:
    watched, alone = shared("metaworld-coffee-push"), make("metaworld", "metaworld-coffee-push", 2)
    watched.reset(0)
    alone.reset(0)
    for action in random_actions(20):
        watched.snapshot()
        assert content(watched.step(action)) == content(alone.step(action))


def test_a_snapshot_survives_pickling_and_is_small() -> None:
    env = shared("metaworld-coffee-push")
    record = play(env, 20, 2)
    before, action, step = record[5]
    env.reset(3)
    env.restore(pickle.loads(pickle.dumps(before)))
    assert content(env.step(action)) == content(step)
    assert len(pickle.dumps([snapshot for snapshot, _, _ in record])) < 20 * 7_000
    assert record[0][0].model is record[9][0].model


def test_state_that_cannot_be_captured_is_refused() -> None:
    env = make("metaworld", "metaworld-reach", 2)
    env.reset(0)
    env._env.memory = lambda: None
    with pytest.raises(EnvError, match=r"metaworld-reach keeps state that a snapshot cannot hold.*another task"):
        env.snapshot()


# Errors


@pytest.mark.slow
def test_blow_ups_are_counted_in_training_and_evaluation_beside_both_kinds_of_success() -> None:
    """The flag `diverged` alone would not tell a simulator's fault from a network's."""
    task = EnvironmentConfig(suite="metaworld", task="metaworld-reach")
    settings = {"steps": 24, "random_steps": 20, "eval_every": 8, "measure_every": 24}

    def unstable() -> Online:
        protocol = test_online.build([1], "sac", task, **settings)
        test_online.explode(protocol.envs[0], {3})
        test_online.explode(protocol.evaluator.envs[0], {5})
        return protocol

    whole, first, second = test_online.finish(unstable()), unstable(), unstable()
    found = {
        metric: [row.value for row in whole.metrics.rows[0] if row.metric == metric]
        for metric in ("simulator/unstable", "eval/success", "eval/success_last")
    }
    assert found["simulator/unstable"] == [2 + 1, 5 + 2, 7 + 3]  # every third step, every evaluation
    assert len(found["eval/success"]) == len(found["eval/success_last"]) == 3
    while first.done < 13:
        first.step()
    assert test_online.finish(test_online._reload(first, second)).metrics.csv(0) == whole.metrics.csv(0)


def test_a_blow_up_is_an_error_and_can_be_left() -> None:
    """The library hides it behind a reward of 0."""
    env = make("metaworld", "metaworld-reach", 2)
    record = play(env, 4, 6)
    before, action, step = record[3]
    for _ in range(2):  # the second blow-up must be noticed as well
        env.restore(before)
        env._data.qvel[:] = 1e12
        with pytest.raises(EnvError, match=r"blew up \(metaworld-reach, seed 6, frame 7\)"):
            env.step(action)
        with pytest.raises(EnvError, match="no valid state"):
            env.step(action)
    env.restore(before)
    assert content(env.step(action)) == content(step)
