"""The simulated tasks behind one small interface, with a physics snapshot that replays to the last bit.

    env = make("dmc", "walker-walk", action_repeat=2)
    obs = env.reset(seed=0)
    before = env.snapshot()
    step = env.step(action)  # action in [-1, 1]
    env.restore(before)  # the same action now gives the same reward and the same next observation

Two suites: "dmc" (the DeepMind Control suite; MAD-TD and FTFL) and "gymnasium" (MuJoCo; FTFL's spared tasks). FTFL's
Gym tasks were those of gym 0.23; v4 is nearest to them, v5 changed observations and rewards (FTFL section 6.2).
Neither simulator is imported before `make`: the command line checks task names without paying for them.
"""

from collections.abc import Sequence

from dynarep.configs import EnvironmentConfig
from dynarep.envs.base import Env, EnvError, Snapshot, Step, unknown
from dynarep.envs.control_suite import ControlSuite
from dynarep.envs.gymnasium_suite import Gymnasium

__all__ = ["Env", "EnvError", "Snapshot", "Step", "from_config", "known_tasks", "make", "split_task"]

# suite.ALL_TASKS of dm-control 1.0.28 (a test compares them), and Gymnasium's MuJoCo tasks.
_TASKS = {
    "dmc": """
        acrobot-swingup acrobot-swingup_sparse ball_in_cup-catch cartpole-balance cartpole-balance_sparse
        cartpole-swingup cartpole-swingup_sparse cartpole-two_poles cartpole-three_poles cheetah-run dog-stand
        dog-walk dog-trot dog-run dog-fetch finger-spin finger-turn_easy finger-turn_hard fish-upright fish-swim
        hopper-stand hopper-hop humanoid-stand humanoid-walk humanoid-run humanoid-run_pure_state
        humanoid_CMU-stand humanoid_CMU-walk humanoid_CMU-run lqr-lqr_2_1 lqr-lqr_6_2 manipulator-bring_ball
        manipulator-bring_peg manipulator-insert_ball manipulator-insert_peg pendulum-swingup point_mass-easy
        point_mass-hard quadruped-walk quadruped-run quadruped-escape quadruped-fetch reacher-easy reacher-hard
        stacker-stack_2 stacker-stack_4 swimmer-swimmer6 swimmer-swimmer15 walker-stand walker-walk walker-run
    """,
    "gymnasium": """
        Ant-v4 HalfCheetah-v4 Hopper-v4 Humanoid-v4 InvertedPendulum-v4 Walker2d-v4
        Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 HumanoidStandup-v5 InvertedDoublePendulum-v5
        InvertedPendulum-v5 Pusher-v5 Reacher-v5 Swimmer-v5 Walker2d-v5
    """,
}


def known_tasks(suite: str) -> list[str]:
    """Names of the tasks of a suite ("dmc" or "gymnasium"); imports no simulator. EnvError for another suite."""
    if suite not in _TASKS:
        raise EnvError(f"unknown suite {suite!r}: {' or '.join(_TASKS)}")
    return _TASKS[suite].split()


def split_task(name: str) -> tuple[str, str]:
    """Return (suite, task): "walker-walk" is of "dmc", "Hopper-v5" of "gymnasium".

    Raises EnvError for an unknown name, with the nearest known ones.
    """
    for suite in _TASKS:
        if name in known_tasks(suite):
            return suite, name
    raise unknown("task", name, " ".join(_TASKS.values()).split())


def make(
    suite: str,
    task: str,
    action_repeat: int = 1,
    reward_scale: float = 1.0,
    drop_observations: Sequence[str] = (),
    zero_contact_forces: bool = False,
) -> Env:
    """Make a task of a suite; call `reset` next.

    Args:
        suite: "dmc" or "gymnasium".
        task: one of `known_tasks(suite)`.
        action_repeat: frames per agent step (MAD-TD section 6.2: 2 on DMC; FTFL section 6: 1).
        reward_scale: factor on every reward (ours: dose-response of FTFL's first cause, small rewards beside states).
        drop_observations: names of observation entries that nobody gets to see, "dmc" only (FTFL section 6.1: hopper
            without "touch").
        zero_contact_forces: contact forces in the observation read 0, "gymnasium" only; tasks that do not observe any
            stay as they are (FTFL section 6.2: Humanoid-v4 as mujoco-py shows it).

    Raises:
        EnvError: an unknown suite, task or observation entry, with the nearest names; a value out of range, or one that
            the suite does not have.
    """
    tasks = known_tasks(suite)
    if task not in tasks:
        raise unknown("task", task, tasks)
    if suite == "dmc":
        if zero_contact_forces:
            raise EnvError(f"{task}: zero_contact_forces is for Gymnasium's tasks; drop_observations removes an entry")
        return ControlSuite(task, action_repeat, reward_scale, drop_observations)
    if drop_observations:
        given = ", ".join(drop_observations)
        raise EnvError(f"{task}: drop_observations ({given}) is for dmc tasks, Gymnasium's entries have no names")
    return Gymnasium(task, action_repeat, reward_scale, zero_contact_forces)


def from_config(config: EnvironmentConfig) -> Env:
    """Make the task of a resolved configuration; see `make`."""
    return make(**config.model_dump())
