"""The environments: the suites' own numbers, episodes that depend on the seed only, snapshots that replay exactly."""

import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from dynarep import envs
from dynarep.configs import EnvironmentConfig
from dynarep.envs import Env, EnvError, Snapshot, Step, from_config, known_tasks, make, split_task

# Contacts, force sensors, actuator states, targets kept in the model, rewards that read a lagging array.
REPLAYED = [
    *("walker-walk", "humanoid-stand", "dog-stand", "quadruped-walk", "hopper-stand", "finger-turn_hard"),
    *("reacher-hard", "point_mass-hard", "Hopper-v5", "HalfCheetah-v5", "Humanoid-v5", "Ant-v5"),
    *("InvertedPendulum-v4", "Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4"),
]
EVERY_TASK = [task for suite in ("dmc", "gymnasium") for task in known_tasks(suite)]


def fresh(task: str, action_repeat: int = 1, reward_scale: float = 1.0) -> Env:
    return make(*split_task(task), action_repeat, reward_scale)


@functools.cache
def shared(task: str, action_repeat: int = 1) -> Env:
    """One Env for several tests: that it has been used before must not matter."""
    return fresh(task, action_repeat)


def random_actions(env: Env, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, env.action_size)).astype(np.float32)


def content(step: Step) -> tuple[bytes, float, bool, bool]:
    return step.obs.tobytes(), step.reward, step.terminated, step.truncated


def play(env: Env, n: int, episode_seed: int, action_seed: int = 0) -> list[tuple[Snapshot, np.ndarray, Step]]:
    """n agent steps as (state before, action, outcome), over as many episodes as they need."""
    env.reset(episode_seed)
    record = []
    for action in random_actions(env, n, action_seed):
        before = env.snapshot()
        step = env.step(action)
        record.append((before, action, step))
        if step.terminated or step.truncated:
            episode_seed += 1
            env.reset(episode_seed)
    return record


def assert_replays(task: str, n: int) -> None:
    env, other = shared(task, 2), fresh(task, 2)
    record = play(env, n, episode_seed=1) + play(env, n, episode_seed=11, action_seed=1)
    play(env, 5, episode_seed=21, action_seed=2)
    env.reset(31)
    for i in np.random.default_rng(3).permutation(len(record))[:16]:
        before, action, step = record[i]
        for name, target in (("the same", env), ("a fresh", other)):
            target.restore(before)
            assert target.frame == before.frame
            assert content(target.step(action)) == content(step), f"{task}: step {i} differs, restored into {name} Env"


# Names


def test_table_of_dmc_tasks_is_the_installed_suite() -> None:
    shared("walker-walk")  # sets MUJOCO_GL before dm_control is imported
    from dm_control import suite

    assert known_tasks("dmc") == [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]


def test_gymnasium_tasks_are_registered() -> None:
    import gymnasium

    for task in known_tasks("gymnasium"):
        assert gymnasium.spec(task).max_episode_steps


def test_import_leaves_the_simulators_alone() -> None:
    code = (
        "import sys, dynarep.envs as e; e.split_task('walker-walk'); e.known_tasks('gymnasium'); "
        "print({'mujoco', 'dm_control', 'gymnasium', 'torch'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def test_split_task_finds_the_suite() -> None:
    assert split_task("ball_in_cup-catch") == ("dmc", "ball_in_cup-catch")
    assert split_task("Hopper-v5") == ("gymnasium", "Hopper-v5")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("finger-turn-hard", "finger-turn_hard"),
        ("walker_walk", "walker-walk"),
        ("hopper-v5", "Hopper-v5"),
        ("Hopper-v3", "Hopper-v4"),
    ],
)
def test_unknown_task_suggests_the_spelling_of_the_suite(wrong: str, right: str) -> None:
    with pytest.raises(EnvError, match=f"{wrong}.*did you mean.*{right}"):
        split_task(wrong)


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(EnvError, match=r"xyzzy.*one of .*walker-walk"):
        split_task("xyzzy")
    with pytest.raises(EnvError, match="'atari': dmc or gymnasium"):
        make("atari", "Pong")
    with pytest.raises(EnvError, match="Hopper-v5"):
        make("dmc", "Hopper-v5")


# The suites' own numbers


@pytest.mark.parametrize(
    "task", ["walker-walk", "humanoid-stand", "finger-turn_hard", "quadruped-walk", "cartpole-swingup", "fish-swim"]
)
def test_dmc_steps_are_those_of_the_suite(task: str) -> None:
    env = shared(task)
    from dm_control import suite

    reference = suite.load(*task.split("-", 1), task_kwargs={"random": 7})
    spec = reference.action_spec()
    assert env.reset(7).tobytes() == flat(reference.reset().observation)
    for action in random_actions(env, 100):
        step = env.step(action)
        centre, half = (spec.maximum + spec.minimum) / 2, (spec.maximum - spec.minimum) / 2
        timestep = reference.step(centre + half * action.astype(np.float64))
        assert step.reward == timestep.reward
        assert step.obs.tobytes() == flat(timestep.observation)
        assert step.obs.shape == (env.obs_size,)


def flat(observation: dict[str, np.ndarray]) -> bytes:
    return np.concatenate([np.ravel(entry) for entry in observation.values()]).astype(np.float32).tobytes()


@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
@pytest.mark.parametrize(
    "task", ["Hopper-v5", "Humanoid-v5", "Reacher-v5", "InvertedPendulum-v5", "Ant-v4", "Humanoid-v4"]
)
def test_gymnasium_steps_are_those_of_the_suite(task: str) -> None:
    import gymnasium

    env, reference = shared(task), gymnasium.make(task)
    high = reference.action_space.high
    assert (reference.action_space.low == -high).all()
    assert env.reset(7).tobytes() == reference.reset(seed=7)[0].astype(np.float32).tobytes()
    for action in random_actions(env, 100):
        step = env.step(action)
        obs, reward, terminated, truncated, _ = reference.step(action * high)
        assert content(step) == (obs.astype(np.float32).tobytes(), reward, terminated, truncated)
        if terminated or truncated:
            break
    else:
        pytest.fail("no episode end was compared")


@pytest.mark.parametrize("task", ["pendulum-swingup", "reacher-hard"])
def test_dmc_time_limit_truncates_where_the_suite_ends(task: str) -> None:
    env = shared(task)
    from dm_control import suite

    reference = suite.load(*task.split("-", 1))
    env.reset(0)
    reference.reset()
    for action in random_actions(env, 1000):
        step, timestep = env.step(action), reference.step(action)
        assert step.truncated == timestep.last()
        assert not step.terminated
    assert env.frame == env.episode_frames == 1000


def test_task_end_terminates_and_does_not_truncate() -> None:
    env = shared("lqr-lqr_2_1")
    env.reset(0)
    at_rest = env.snapshot()
    env.restore(dataclasses.replace(at_rest, physics=np.zeros_like(at_rest.physics)))
    step = env.step(np.zeros(1))
    assert (step.terminated, step.truncated) == (True, False)


def test_action_is_mapped_to_the_bounds_of_the_suite() -> None:
    env = shared("quadruped-walk")  # [-1, 1.1] for some of its actuators
    from dm_control import suite

    spec = suite.load("quadruped", "walk").action_spec()
    assert spec.maximum.max() > 1
    seen = []
    advance = env._advance
    env._advance = lambda control: (seen.append(control), advance(control))[1]
    try:
        env.reset(0)
        for value in (-1, 1, 0):
            env.step(np.full(env.action_size, value))
    finally:
        del env._advance
    np.testing.assert_array_equal(seen[0], spec.minimum)
    np.testing.assert_array_equal(seen[1], spec.maximum)
    np.testing.assert_allclose(seen[2], (spec.minimum + spec.maximum) / 2)


# Sizes, and returns of uniformly random actions (FTFL sections 6.1, 6.2, 6.4)

# The intervals hold single episodes, the table's means are of many: quadruped's depend on the pose it starts in.
SPECIFIED = {  # task: observations, actions, interval
    "hopper-stand": (15, 4, 0, 30),  # table 1.5; seen 12.1 and 0.0
    "humanoid-stand": (67, 21, 0, 25),  # table 4.6; seen 6.0 and 3.1
    "quadruped-walk": (78, 12, 0, 900),  # table 254; seen 490 and 483
    "InvertedPendulum-v4": (4, 1, 2, 30),  # table 6; seen 5 and 5
    "Hopper-v4": (11, 3, 5, 80),  # table 20; seen 19 and 10
    "HalfCheetah-v4": (17, 6, -450, -120),  # table -283; seen -319 and -276
    "Walker2d-v4": (17, 6, -20, 60),  # table 3; seen 37 and 2
    "Ant-v4": (27, 8, -400, 60),  # table -44; seen 5 and -40
    "Humanoid-v4": (376, 17, 60, 220),  # table 121; seen 107 and 121
}


@pytest.mark.parametrize("task", SPECIFIED)
def test_sizes_and_random_returns_are_those_of_the_specification(task: str) -> None:
    env, (obs_size, action_size, low, high) = shared(task), SPECIFIED[task]
    assert (env.obs_size, env.action_size) == (obs_size, action_size)
    for seed in (0, 1):
        env.reset(seed)
        total, ended = 0.0, False
        rng = np.random.default_rng(seed)
        while not ended:
            step = env.step(rng.uniform(-1, 1, env.action_size))
            total, ended = total + step.reward, step.terminated or step.truncated
        assert low <= total <= high


# What is not observed


def test_a_dropped_entry_is_gone_and_the_rest_is_as_before() -> None:
    plain, without = shared("hopper-stand"), make("dmc", "hopper-stand", drop_observations=["touch"])
    assert (plain.obs_size, without.obs_size) == (15, 13)  # touch comes last
    assert without.reset(3).tobytes() == plain.reset(3)[:13].tobytes()
    touched = False
    for action in random_actions(plain, 60):
        one, other = plain.step(action), without.step(action)
        assert other.obs.tobytes() == one.obs[:13].tobytes()
        assert other.reward == one.reward
        touched |= bool(one.obs[13:].any())
    assert touched


def test_snapshots_do_not_depend_on_what_is_observed() -> None:
    plain, without = shared("hopper-stand", 2), make("dmc", "hopper-stand", 2, drop_observations=["touch"])
    for before, action, step in play(without, 40, episode_seed=1)[::7]:
        plain.restore(before)
        assert plain.step(action).obs[:13].tobytes() == step.obs.tobytes()
        without.restore(before)
        assert content(without.step(action)) == content(step)


def test_entries_that_cannot_be_dropped_are_refused() -> None:
    with pytest.raises(EnvError, match=r"observation entry of hopper-stand 'Tuch': did you mean touch"):
        make("dmc", "hopper-stand", drop_observations=["Tuch"])
    with pytest.raises(EnvError, match=r"'xyzzy': one of position, velocity, touch"):
        make("dmc", "hopper-stand", drop_observations=["touch", "xyzzy"])
    with pytest.raises(EnvError, match=r"hopper-stand.*leaves nothing.*position, velocity, touch"):
        make("dmc", "hopper-stand", drop_observations=["velocity", "position", "touch"])
    with pytest.raises(EnvError, match=r"Hopper-v4: drop_observations \(touch\) is for dmc"):
        make("gymnasium", "Hopper-v4", drop_observations=["touch"])


@pytest.mark.parametrize(("task", "forces"), [("Humanoid-v4", 84), ("Humanoid-v5", 78), ("Ant-v5", 78)])
def test_zeroed_contact_forces_change_these_entries_alone(task: str, forces: int) -> None:
    live, zeroed = shared(task), make("gymnasium", task, zero_contact_forces=True)
    live.reset(0)
    assert not zeroed.reset(0)[-forces:].any()
    seen = np.zeros(forces, bool)
    for action in random_actions(live, 40):
        one, other = live.step(action), zeroed.step(action)
        assert other.obs[:-forces].tobytes() == one.obs[:-forces].tobytes()
        assert not other.obs[-forces:].any()
        assert other.reward == one.reward
        seen |= one.obs[-forces:] != 0
        if one.terminated:
            break
    assert seen.any(), "no contact: the test saw nothing"
    zeroed._data.cfrc_ext[:] = 0.5  # what the simulator calls contact forces
    observed = zeroed._env._get_obs()
    assert (observed[-forces:] == 0.5).all()
    assert observed[-forces - 1] != 0.5
    zeroed._obs = observed
    assert not zeroed._observe()[-forces:].any()


def test_zeroed_contact_forces_leave_tasks_alone_that_do_not_observe_them() -> None:
    plain, zeroed = shared("Ant-v4"), make("gymnasium", "Ant-v4", zero_contact_forces=True)
    assert zeroed.reset(1).tobytes() == plain.reset(1).tobytes()
    with pytest.raises(EnvError, match="humanoid-stand: zero_contact_forces is for Gymnasium"):
        make("dmc", "humanoid-stand", zero_contact_forces=True)


def test_a_configuration_says_everything_about_its_environment() -> None:
    hopper = {"suite": "dmc", "task": "hopper-stand", "action_repeat": 3, "drop_observations": ("touch",)}
    env = from_config(EnvironmentConfig(**hopper))
    assert (env.task, env.obs_size, env.action_repeat) == ("hopper-stand", 13, 3)
    humanoid = {"suite": "gymnasium", "task": "Humanoid-v4", "reward_scale": 0.5, "zero_contact_forces": True}
    plain, changed = shared("Humanoid-v4"), from_config(EnvironmentConfig(**humanoid))
    plain.reset(0)
    changed.reset(0)
    touched = False
    while not touched:
        action = np.zeros(17)
        one, other = plain.step(action), changed.step(action)
        assert other.reward == one.reward * 0.5
        assert not other.obs[-84:].any()
        touched = bool(one.obs[-84:].any())


def test_older_gymnasium_tasks_are_made_without_a_warning() -> None:
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        fresh("Hopper-v4")
    assert not complaints


# Action repeat and reward scale


@pytest.mark.parametrize("task", ["walker-walk", "HalfCheetah-v5"])
def test_action_repeat_sums_the_rewards_of_its_frames(task: str) -> None:
    once, twice = shared(task), shared(task, 2)
    once.reset(3)
    twice.reset(3)
    for action in random_actions(once, 20):
        first, second, both = once.step(action), once.step(action), twice.step(action)
        assert both.reward == first.reward + second.reward
        assert both.obs.tobytes() == second.obs.tobytes()
    assert twice.frame == 40


def test_action_repeat_stops_at_the_end_of_the_episode() -> None:
    limited = shared("Reacher-v5", 4)  # 50 frames: the 13th step has two
    limited.reset(0)
    steps = [limited.step(action) for action in random_actions(limited, 13)]
    assert [step.truncated for step in steps] == [False] * 12 + [True]
    assert limited.frame == 50

    once, often = shared("Hopper-v5"), shared("Hopper-v5", 500)  # falls within one agent step
    action = random_actions(once, 1)[0]
    once.reset(0)
    often.reset(0)
    fall, total = once.step(action), 0.0
    while not fall.terminated:
        total, fall = total + fall.reward, once.step(action)
    step = often.step(action)
    assert content(step) == (fall.obs.tobytes(), total + fall.reward, True, False)
    assert often.frame == once.frame < 500


def test_reward_scale_changes_the_reward_and_nothing_else() -> None:
    plain, scaled = shared("HalfCheetah-v5", 2), fresh("HalfCheetah-v5", 2, reward_scale=0.03)
    plain.reset(0)
    scaled.reset(0)
    for action in random_actions(plain, 10):
        one, other = plain.step(action), scaled.step(action)
        assert other.reward == one.reward * 0.03
        assert other.obs.tobytes() == one.obs.tobytes()


# Seeds


@pytest.mark.parametrize("task", REPLAYED)
def test_episode_depends_on_its_seed_only(task: str) -> None:
    used, new = shared(task, 2), fresh(task, 2)
    play(used, 10, episode_seed=4)
    used.reset(5)
    firsts = [env.reset(8) for env in (new, used)]
    states = [env.snapshot().physics for env in (new, used)]
    assert firsts[0].dtype == np.float32
    assert firsts[0].tobytes() == firsts[1].tobytes()
    assert states[0].tobytes() == states[1].tobytes()
    for action in random_actions(new, 5):
        step = new.step(action)
        assert content(step) == content(used.step(action))
        if step.terminated:
            break
    assert used.reset(9).tobytes() != firsts[0].tobytes()


def test_lqr_is_the_same_system_in_every_process() -> None:
    one, other = fresh("lqr-lqr_6_2"), fresh("lqr-lqr_6_2")
    one.reset(0)
    other.reset(0)
    for action in random_actions(one, 20):
        assert content(one.step(action)) == content(other.step(action))


# Snapshots


@pytest.mark.parametrize("task", REPLAYED)
def test_restored_state_replays_to_the_last_bit(task: str) -> None:
    assert_replays(task, 30)


@pytest.mark.slow
@pytest.mark.parametrize("task", EVERY_TASK)
def test_every_task_replays_to_the_last_bit(task: str) -> None:
    if task == "quadruped-escape" and os.environ.get("MUJOCO_GL", "disabled") == "disabled":
        pytest.skip("needs a renderer: MUJOCO_GL=egl")
    assert_replays(task, 200)


@pytest.mark.parametrize("task", ["walker-walk", "Humanoid-v5"])
def test_taking_a_snapshot_disturbs_nothing(task: str) -> None:
    watched, alone = shared(task), fresh(task)
    watched.reset(0)
    alone.reset(0)
    for action in random_actions(alone, 20):
        watched.snapshot()
        assert content(watched.step(action)) == content(alone.step(action))


def test_restored_episode_goes_on_as_before() -> None:
    env = shared("humanoid-stand", 2)
    record = play(env, 40, episode_seed=0)
    env.reset(1)
    env.restore(record[10][0])
    for _, action, step in record[10:]:
        assert content(env.step(action)) == content(step)


def test_snapshot_survives_pickling_and_later_steps() -> None:
    env = shared("reacher-hard")
    before, action, step = play(env, 12, episode_seed=2)[5]
    env.reset(3)
    env.restore(pickle.loads(pickle.dumps(before)))
    assert content(env.step(action)) == content(step)


def test_ten_thousand_snapshots_of_dog_fit_in_80_megabytes() -> None:
    snapshots = [before for before, _, _ in play(shared("dog-stand", 2), 20, episode_seed=0)]
    assert len(pickle.dumps(snapshots)) < 20 * 8_000
    assert all(snapshot.model is snapshots[0].model for snapshot in snapshots)
    assert all(snapshot.attributes is snapshots[0].attributes for snapshot in snapshots[1:])


def test_snapshots_share_the_target_of_their_episode_and_not_of_the_next() -> None:
    env = shared("finger-turn_hard")
    (one, _, _), (two, _, _) = play(env, 2, episode_seed=0)
    (other, _, _), *_ = play(env, 1, episode_seed=1)
    assert one.model is two.model
    assert not np.array_equal(one.model["site_pos"], other.model["site_pos"])


def test_task_attributes_changed_by_a_step_are_restored() -> None:
    env = fresh("walker-walk")
    env.reset(0)
    before = env.snapshot()
    speed, env._task._move_speed = env._task._move_speed, 0  # what a task with a memory would do
    env.restore(before)
    assert env._task._move_speed == speed


def test_state_that_cannot_be_captured_is_refused() -> None:
    env = fresh("walker-walk")
    env.reset(0)
    env._task.memory = lambda: None
    with pytest.raises(EnvError, match=r"walker-walk keeps state that a snapshot cannot hold.*another task"):
        env.snapshot()


def test_snapshot_of_another_task_is_refused() -> None:
    env, other = shared("walker-walk"), shared("reacher-hard")
    env.reset(0)
    other.reset(0)
    with pytest.raises(EnvError, match="reacher-hard cannot be restored into walker-walk"):
        env.restore(other.snapshot())


def test_snapshot_at_the_end_of_an_episode_stays_at_the_end() -> None:
    env = shared("Reacher-v5", 50)
    env.reset(0)
    assert env.step(np.zeros(env.action_size)).truncated
    end = env.snapshot()
    env.reset(1)
    env.restore(end)
    with pytest.raises(EnvError, match="end of its episode"):
        env.step(np.zeros(env.action_size))


# Errors


@pytest.mark.parametrize("task", ["walker-walk", "Hopper-v5"])
def test_unusable_actions_are_refused(task: str) -> None:
    env = shared(task)
    env.reset(0)
    good = np.zeros(env.action_size)
    for bad, message in ((good[1:], "shape"), (good + np.nan, "finite"), (good + np.inf, "finite"), (good + 2, "clip")):
        with pytest.raises(EnvError, match=f"{task}.*{message}"):
            env.step(bad)
    assert env.frame == 0
    env.step(good)


@pytest.mark.parametrize("task", ["walker-walk", "Hopper-v5"])
def test_stepping_without_an_episode_is_refused(task: str) -> None:
    env = fresh(task)
    with pytest.raises(EnvError, match="never reset"):
        env.step(np.zeros(env.action_size))
    with pytest.raises(EnvError, match="never reset"):
        env.snapshot()
    env.reset(0)
    env.close()
    for use in (lambda: env.step(np.zeros(env.action_size)), lambda: env.reset(0), env.snapshot):
        with pytest.raises(EnvError, match="closed"):
            use()


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(EnvError, match="action_repeat"):
        make("dmc", "walker-walk", action_repeat=0)
    with pytest.raises(EnvError, match="reward_scale"):
        make("dmc", "walker-walk", reward_scale=float("nan"))
    for seed in (-1, 2**32):
        with pytest.raises(EnvError, match="seed"):
            shared("walker-walk").reset(seed)


@pytest.mark.parametrize("task", ["walker-walk", "HalfCheetah-v5"])
def test_blow_up_names_task_seed_and_frame_and_can_be_left(task: str) -> None:
    env = fresh(task)
    env.reset(6)
    action = np.full(env.action_size, 0.5)
    for _ in range(3):
        env.step(action)
    before = env.snapshot()
    step = env.step(action)
    for _ in range(2):  # the second blow-up must be noticed as well
        env.restore(before)
        env._data.qvel[:] = 1e12
        with pytest.raises(EnvError, match=rf"blew up \({task}, seed 6, frame 4\)"):
            env.step(action)
        with pytest.raises(EnvError, match="no valid state"):
            env.step(action)
        with pytest.raises(EnvError, match="no valid state"):
            env.snapshot()
    env.restore(before)
    assert content(env.step(action)) == content(step)


def test_gymnasium_blow_up_leaves_no_log_in_the_working_directory(tmp_path: Path) -> None:
    # In a process of its own: dm_control, once imported, silences MuJoCo's log as well.
    code = (
        "import dynarep.envs as e; env = e.make('gymnasium', 'HalfCheetah-v5'); env.reset(0); "
        "env._data.qvel[:] = 1e12; env.step([0] * 6)"
    )
    found = {**os.environ, "PYTHONPATH": str(Path(envs.__file__).parents[2])}  # PYTHONPATH may be relative to here
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=found)
    assert "EnvError: the simulation blew up" in answer.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.environ.get("MUJOCO_GL", "disabled") != "disabled", reason="has a renderer")
def test_task_that_needs_a_renderer_says_so() -> None:
    with pytest.raises(EnvError, match=r"quadruped-escape.*MUJOCO_GL=egl"):
        fresh("quadruped-escape").reset(0)


def test_rendering_is_off_unless_asked_for() -> None:
    code = "import os, dynarep.envs as e; e.make('gymnasium', 'Hopper-v5'); print(os.environ['MUJOCO_GL'])"
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == "disabled"
    assert "DISPLAY" not in answer.stderr
