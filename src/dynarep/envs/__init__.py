"""The simulated tasks behind one small interface, with a physics snapshot that replays to the last bit.

    env = make("dmc", "walker-walk", action_repeat=2)
    obs = env.reset(seed=0)
    before = env.snapshot()
    step = env.step(action)  # action in [-1, 1]
    env.restore(before)  # the same action now gives the same reward and the same next observation

Four suites: "dmc" (the DeepMind Control suite; MAD-TD and FTFL), "gymnasium" (MuJoCo; FTFL's spared tasks),
"metaworld" (MAD-TD's appendix) and "dial" (ours: synthetic tasks whose properties can be turned up and down). FTFL's
Gym tasks were those of gym 0.23; v4 is nearest to them, v5 changed observations and rewards (FTFL section 6.2).
"garnet" names small random decision problems, for theory: tables of probabilities that a protocol reads
(`dynarep.envs.garnet`) and nobody can step.
No simulator is imported before `make`: the command line checks task names without paying for them.
"""

import math
from collections.abc import Sequence

from dynarep.configs import Dials, EnvironmentConfig
from dynarep.envs.base import Env, EnvError, Snapshot, Step, unknown
from dynarep.envs.control_suite import ControlSuite
from dynarep.envs.dial import Dial, sizes
from dynarep.envs.gymnasium_suite import Gymnasium
from dynarep.envs.metaworld_suite import FRAME_BEFORE, MetaWorld

__all__ = [
    "Env",
    "EnvError",
    "Snapshot",
    "Step",
    "episode_steps",
    "frame_before",
    "from_config",
    "known_tasks",
    "make",
    "sizes",
    "split_task",
]

_UNTURNED = Dials()

# suite.ALL_TASKS of dm-control 1.0.28, Gymnasium's MuJoCo tasks, all of Meta-World 3.1.1 (tests compare them).
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
    "metaworld": """
        metaworld-assembly metaworld-basketball metaworld-bin-picking metaworld-box-close
        metaworld-button-press-topdown metaworld-button-press-topdown-wall metaworld-button-press
        metaworld-button-press-wall metaworld-coffee-button metaworld-coffee-pull metaworld-coffee-push
        metaworld-dial-turn metaworld-disassemble metaworld-door-close metaworld-door-lock metaworld-door-open
        metaworld-door-unlock metaworld-hand-insert metaworld-drawer-close metaworld-drawer-open metaworld-faucet-open
        metaworld-faucet-close metaworld-hammer metaworld-handle-press-side metaworld-handle-press
        metaworld-handle-pull-side metaworld-handle-pull metaworld-lever-pull metaworld-pick-place-wall
        metaworld-pick-out-of-hole metaworld-pick-place metaworld-plate-slide metaworld-plate-slide-side
        metaworld-plate-slide-back metaworld-plate-slide-back-side metaworld-peg-insert-side metaworld-peg-unplug-side
        metaworld-soccer metaworld-stick-push metaworld-stick-pull metaworld-push metaworld-push-wall
        metaworld-push-back metaworld-reach metaworld-reach-wall metaworld-shelf-place metaworld-sweep-into
        metaworld-sweep metaworld-window-open metaworld-window-close
    """,
    "dial": "dial-reach dial-glide",
    "garnet": "garnet-20-4-1 garnet-20-4-3",
}


def known_tasks(suite: str) -> list[str]:
    """Names of the tasks of a suite; imports no simulator. EnvError for an unknown suite."""
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
    dials: Dials = _UNTURNED,
) -> Env:
    """Make a task of a suite; call `reset` next.

    Args:
        suite: "dmc", "gymnasium", "metaworld" or "dial".
        task: one of `known_tasks(suite)`.
        action_repeat: frames per agent step (MAD-TD section 6.2: 2 on DMC; FTFL section 6: 1; TD-MPC2: 2
            on Meta-World, BRO: 1).
        reward_scale: factor on every reward (ours: dose-response of FTFL's first cause, small rewards beside states; on
            Meta-World 0.1 keeps values, 2000 without it, within the range of MAD-TD's critic).
        drop_observations: names of observation entries that nobody gets to see, "dmc" only (FTFL section 6.1: hopper
            without "touch").
        zero_contact_forces: contact forces in the observation read 0, "gymnasium" only; tasks that do not observe any
            stay as they are (FTFL section 6.2: Humanoid-v4 as mujoco-py shows it).
        dials: the properties of a task of suite "dial".

    Raises:
        EnvError: an unknown suite, task or observation entry, with the nearest names; a value out of range, or one that
            the suite does not have.
    """
    tasks = known_tasks(suite)
    if task not in tasks:
        raise unknown("task", task, tasks)
    if suite == "garnet":
        raise EnvError(f"{task} is a table of probabilities for the protocol td_spectrum: it has no simulator to step")
    if drop_observations and suite != "dmc":
        given = ", ".join(drop_observations)
        raise EnvError(f"{task}: drop_observations ({given}) is for dmc tasks, the entries of others have no names")
    if zero_contact_forces and suite != "gymnasium":
        raise EnvError(f"{task}: zero_contact_forces is for Gymnasium's tasks; drop_observations removes an entry")
    if suite == "dial":
        return Dial(task, action_repeat, reward_scale, dials)
    if dials != _UNTURNED:
        raise EnvError(f"{task}: dials are for dial tasks ({', '.join(known_tasks('dial'))}), others cannot be turned")
    if suite == "dmc":
        return ControlSuite(task, action_repeat, reward_scale, drop_observations)
    if suite == "metaworld":
        return MetaWorld(task, action_repeat, reward_scale)
    return Gymnasium(task, action_repeat, reward_scale, zero_contact_forces)


def from_config(config: EnvironmentConfig) -> Env:
    """Make the task of a resolved configuration; see `make`."""
    return make(**dict(config))


def episode_steps(config: EnvironmentConfig) -> int:
    """Return the agent steps of an episode by its time limit; imports no simulator."""
    if config.suite == "dial":
        return config.dials.episode_steps
    return math.ceil({"metaworld": 200}.get(config.suite, 1000) / config.action_repeat)


def frame_before(config: EnvironmentConfig) -> slice:
    """Return the entries of an observation that say again what was there one frame earlier; imports no simulator."""
    return FRAME_BEFORE if config.suite == "metaworld" else slice(0)
