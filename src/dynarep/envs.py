"""The simulated tasks behind one small interface, with a physics snapshot that replays to the last bit.

    env = make("dmc", "walker-walk", action_repeat=2)
    obs = env.reset(seed=0)
    before = env.snapshot()
    step = env.step(action)  # action in [-1, 1]
    env.restore(before)  # the same action now gives the same reward and the same next observation

Two suites: "dmc" (the DeepMind Control suite; MAD-TD and FTFL) and "gymnasium" (MuJoCo v5; FTFL's spared tasks).
Neither simulator is imported before `make`: the command line checks task names without paying for them.
"""

import abc
import difflib
import importlib
import inspect
import logging
import math
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Observation = npt.NDArray[np.float32]

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
        Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 HumanoidStandup-v5 InvertedDoublePendulum-v5
        InvertedPendulum-v5 Pusher-v5 Reacher-v5 Swimmer-v5 Walker2d-v5
    """,
}
_UNLIMITED_FRAMES = 1000  # ours: an episode of lqr, the one domain without a time limit

# Why an Env refuses to step.
_NEW = "was never reset: call reset(seed) or restore(snapshot) first"
_OVER = "is at the end of its episode: call reset(seed)"
_BROKEN = "has no valid state after an error: call reset(seed) or restore(snapshot)"
_CLOSED = "is closed: make it again"


class EnvError(ValueError):
    """A task, action, seed or snapshot that cannot be used; the message says which and what to do instead."""


@dataclass(frozen=True)
class Step:
    """What one agent step gave.

    `obs`: float32, shape (obs_size,). `reward`: summed over the repeated frames, times `reward_scale`. `terminated`:
    the task ended (no bootstrap). `truncated`: the time limit ended the episode (bootstrap).
    """

    obs: Observation
    reward: float
    terminated: bool
    truncated: bool


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything the next step depends on; opaque outside this module, can be pickled.

    The snapshots of an episode share what is constant in it (`model`, `attributes`): one of dog-stand costs 6 KB.
    """

    task: str
    seed: int
    frame: int
    over: bool
    physics: FloatArray  # MuJoCo's mjSTATE_INTEGRATION: time, positions, velocities, activations, warm start, controls
    derived: Mapping[str, FloatArray] = field(default_factory=dict)  # computed arrays that a reward reads before a step
    model: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # model arrays that the task wrote at its reset
    attributes: bytes = b""  # the task's Python attributes, pickled


class Env(abc.ABC):
    """One task: actions in [-1, 1], flat float32 observations, action repeat, the suite's own time limit.

    `obs_size`, `action_size`: lengths of the vectors. `action_repeat`: frames (control steps of the suite) per agent
    step. `episode_frames`: the time limit in frames. An episode depends on task and seed only, whatever the object did
    before. Made by `make`.
    """

    obs_size: int
    action_size: int
    action_repeat: int
    episode_frames: int
    _low: FloatArray  # bounds of the suite's own actions, shape (action_size,)
    _high: FloatArray
    _model: Any  # mujoco.MjModel
    _data: Any  # mujoco.MjData

    def __init__(self, task: str, action_repeat: int, reward_scale: float) -> None:
        if action_repeat < 1 or not math.isfinite(reward_scale):
            given = f"{action_repeat} and {reward_scale}"
            raise EnvError(f"{task}: action_repeat is 1 or more and reward_scale finite, got {given}")
        self.task, self.action_repeat, self._reward_scale = task, action_repeat, reward_scale
        self._mujoco = _import("mujoco")
        self._kind = int(self._mujoco.mjtState.mjSTATE_INTEGRATION)
        self._seed, self._frame = -1, 0
        self._refusal = _NEW  # empty: `step` may go on

    @property
    def frame(self) -> int:
        """Frames (not agent steps) since the reset."""
        return self._frame

    def reset(self, seed: int) -> Observation:
        """Start the episode that belongs to `seed` (0 .. 2**32 - 1); returns the first observation, (obs_size,).

        Raises EnvError for another seed, or if the simulator cannot start the episode.
        """
        if self._refusal == _CLOSED:
            raise EnvError(f"{self.task} {_CLOSED}")
        if not 0 <= seed < 2**32:
            raise EnvError(f"{self.task}: a seed is an integer from 0 to 2**32 - 1, got {seed}")
        self._seed, self._frame, self._refusal = int(seed), 0, _BROKEN
        self._begin(self._seed)
        self._refusal = ""
        return self._observe()

    def step(self, action: npt.ArrayLike) -> Step:
        """Repeat `action`, shape (action_size,) in [-1, 1], for `action_repeat` frames or to the end of the episode.

        Raises EnvError if the action has another size, is not finite or leaves [-1, 1] (by more than rounding), if
        there is no episode to continue, or if the simulation blows up.
        """
        if self._refusal:
            raise EnvError(f"{self.task} {self._refusal}")
        action = np.asarray(action, np.float64)
        if action.shape != (self.action_size,):
            raise EnvError(f"{self.task}: an action has shape ({self.action_size},), got {action.shape}")
        if not np.abs(action).max() <= 1 + 1e-6:  # written so that a NaN fails it
            raise EnvError(f"{self.task}: actions are finite and in [-1, 1], got {action}: clip or squash them first")
        # Centre and half range, not low + share * range: bounds of +-1 then pass the action on bit by bit.
        control = (self._high + self._low) / 2 + (self._high - self._low) / 2 * action
        control = np.clip(control, self._low, self._high)
        reward, terminated, truncated = 0.0, False, False
        for _ in range(self.action_repeat):
            frame_reward, terminated, truncated = self._advance(control)
            self._frame += 1
            reward += frame_reward
            if terminated or truncated:
                self._refusal = _OVER
                break
        return Step(self._observe(), reward * self._reward_scale, terminated, truncated)

    def snapshot(self) -> Snapshot:
        """Capture, in float64, all that the next step depends on.

        Raises EnvError before the first reset, after an error, and if the task keeps state that cannot be captured.
        """
        if self._refusal not in ("", _OVER):
            raise EnvError(f"{self.task} {self._refusal}")
        physics = np.empty(self._mujoco.mj_stateSize(self._model, self._kind))
        self._mujoco.mj_getState(self._model, self._data, physics, self._kind)
        return Snapshot(self.task, self._seed, self._frame, bool(self._refusal), physics, **self._capture())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back: the next `step` gives exactly what it would have given when `snapshot` was taken.

        Works in the Env that took it and in any other of the same task, reset or not (MAD-TD section 4.2: the on-policy
        error needs the true outcome of another action). Returns no observation: force sensors show the step before,
        which the caller has seen and the state does not hold. Raises EnvError for a snapshot of another task.
        """
        if self._refusal == _CLOSED:
            raise EnvError(f"{self.task} {_CLOSED}")
        if snapshot.task != self.task:
            raise EnvError(f"a snapshot of {snapshot.task} cannot be restored into {self.task}: make that task")
        self._refusal = _BROKEN
        self._recover(snapshot)
        self._seed, self._frame, self._refusal = snapshot.seed, snapshot.frame, _OVER if snapshot.over else ""

    def close(self) -> None:
        """Let go of the simulator. The Env cannot be used afterwards."""
        self._refusal = _CLOSED

    def _set_physics(self, snapshot: Snapshot) -> None:
        self._mujoco.mj_setState(self._model, self._data, snapshot.physics, self._kind)

    def _blow_up(self, reason: str) -> EnvError:
        # Clears MuJoCo's warning counters too: they are compared from step to step, a second blow-up would be missed.
        self._mujoco.mj_resetData(self._model, self._data)
        self._refusal = _BROKEN
        where = f"{self.task}, seed {self._seed}, frame {self._frame + 1}"
        return EnvError(f"the simulation blew up ({where}): {reason}. Call reset(seed) or restore(snapshot).")

    @abc.abstractmethod
    def _begin(self, seed: int) -> None:
        """Put the simulator at the start of the episode that belongs to `seed`."""

    @abc.abstractmethod
    def _advance(self, control: FloatArray) -> tuple[float, bool, bool]:
        """Simulate one frame, the one after `self._frame`; returns reward, terminated, truncated."""

    @abc.abstractmethod
    def _observe(self) -> Observation:
        """Return the current observation, an array of its own."""

    @abc.abstractmethod
    def _capture(self) -> dict[str, Any]:
        """Return the fields of a Snapshot beside MuJoCo's state vector."""

    @abc.abstractmethod
    def _recover(self, snapshot: Snapshot) -> None:
        """Restore the state vector, what `_capture` gave, and what the next frame expects to find computed."""


class _ControlSuite(Env):
    """A task of the DeepMind Control suite, stepped through its public physics and task objects.

    The rewards and observations of `control.Environment`, bit by bit. Differences (ours): a task's end and the time
    limit are told apart; lqr has neither control bounds nor a time limit, here they are [-1, 1] and 1000 frames, and
    its springs, drawn when it is loaded, are the same in every process.
    """

    def __init__(self, task: str, action_repeat: int, reward_scale: float) -> None:
        super().__init__(task, action_repeat, reward_scale)
        suite = _import("dm_control.suite")
        self._physics_error: type[RuntimeError] = _import("dm_control.rl.control").PhysicsError
        domain, name = task.split("-", 1)
        env = suite.load(domain, name, task_kwargs={"random": 0})  # `reset` seeds anew: 0 matters to lqr's model only
        self._physics, self._task = env.physics, env.task
        self._model, self._data = env.physics.model.ptr, env.physics.data.ptr
        self._sub_steps = round(env.control_timestep() / env.physics.timestep())
        limit = inspect.signature(getattr(suite, domain).SUITE[name]).parameters["time_limit"].default
        # The expression of control.Environment, so that rounding cannot make the episodes differ by a frame.
        self.episode_frames = math.ceil(limit / env.control_timestep()) if limit < math.inf else _UNLIMITED_FRAMES
        spec, unbounded = env.action_spec(), self._mujoco.mjMAXVAL
        self._low = np.where(spec.minimum <= -unbounded, -1.0, spec.minimum)
        self._high = np.where(spec.maximum >= unbounded, 1.0, spec.maximum)
        self.action_size = self._low.size
        self.obs_size = sum(math.prod(entry.shape) for entry in env.observation_spec().values())
        # Tasks write their target into the model (geom_pos, site_pos, wrap_prm, hfield_data ...). Assets are left out:
        # no task writes them, and dog has 90 MB of them.
        names = [name for name in dir(self._model) if not name.startswith(("_", "tex_", "mesh_", "skin_", "bvh_"))]
        views = {name: getattr(self._model, name) for name in names}
        self._views = {name: view for name, view in views.items() if isinstance(view, np.ndarray)}
        self._loaded = {name: array.copy() for name, array in self._views.items()}
        self._written: Mapping[str, npt.NDArray[Any]] = {}
        self._attributes = b""

    def _begin(self, seed: int) -> None:
        # The simulator's own reset computes contacts and a warm start from the model: no trace of the last target.
        self._write_model({})
        self._task.random.seed(seed)
        try:
            with self._physics.reset_context():
                self._task.initialize_episode(self._physics)
        except RuntimeError as error:  # PhysicsError; no collision-free start; no renderer (quadruped-escape)
            hint = (
                " Its terrain goes through a renderer: set MUJOCO_GL=egl or osmesa." if "OpenGL" in str(error) else ""
            )
            raise EnvError(f"{self.task} cannot start an episode with seed {seed}: {error}{hint}") from error
        finally:
            changed = [name for name, array in self._views.items() if array.tobytes() != self._loaded[name].tobytes()]
            self._written = {name: self._views[name].copy() for name in changed}

    def _write_model(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        if arrays is not self._written:
            for name in {*self._written, *arrays}:
                self._views[name][...] = arrays.get(name, self._loaded[name])
            self._written = arrays

    def _advance(self, control: FloatArray) -> tuple[float, bool, bool]:
        try:
            self._task.before_step(control, self._physics)
            self._physics.step(self._sub_steps)
        except self._physics_error as error:
            raise self._blow_up(str(error)) from error
        self._task.after_step(self._physics)
        reward = float(self._task.get_reward(self._physics))
        if self._frame + 1 >= self.episode_frames:  # goes before the task's own end, as in control.Environment
            return reward, False, True
        discount = self._task.get_termination(self._physics)
        return reward, discount == 0, discount is not None and discount != 0

    def _observe(self) -> Observation:
        entries = self._task.get_observation(self._physics).values()
        flat: Observation = np.concatenate([np.ravel(entry) for entry in entries]).astype(np.float32)
        return flat

    def _capture(self) -> dict[str, Any]:
        # The generator is left out: no task of the suite draws a number after its reset.
        kept = {name: value for name, value in vars(self._task).items() if name != "_random"}
        try:
            attributes = pickle.dumps(kept)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            hint = "take another task for measurements that restore the simulator, or make the attribute picklable"
            raise EnvError(f"{self.task} keeps state that a snapshot cannot hold ({error}): {hint}") from error
        if attributes != self._attributes:
            self._attributes = attributes  # otherwise the bytes of the last snapshot are shared
        return {"model": self._written, "attributes": self._attributes}

    def _recover(self, snapshot: Snapshot) -> None:
        self._write_model(snapshot.model)
        vars(self._task).update(pickle.loads(snapshot.attributes))
        self._set_physics(snapshot)
        # dm_control's step begins with mj_step2 and expects what mj_step1 computes. Not mj_forward: it overwrites the
        # warm start, and the next step would differ in its last bits.
        self._mujoco.mj_step1(self._model, self._data)


class _Gymnasium(Env):
    """A MuJoCo task of Gymnasium: `gymnasium.make(task).unwrapped` with the time limit of its registration."""

    # Ant's and Humanoid's rewards read these before they step. Recomputing them would not do: after mj_step they are
    # one sub-step behind the positions.
    _LAGGING: ClassVar[tuple[str, ...]] = ("xpos", "xipos")

    def __init__(self, task: str, action_repeat: int, reward_scale: float) -> None:
        super().__init__(task, action_repeat, reward_scale)
        gymnasium = _import("gymnasium")
        self._env = gymnasium.make(task, disable_env_checker=True).unwrapped
        self._model, self._data = self._env.model, self._env.data
        self._mujoco.set_mju_user_warning(logging.getLogger(__name__).warning)  # not a MUJOCO_LOG.TXT where we stand
        kinds = self._mujoco.mjtWarning
        self._bad = [int(kind) for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)]
        self.episode_frames = int(gymnasium.spec(task).max_episode_steps)
        box = self._env.action_space
        self._low, self._high = box.low.astype(np.float64), box.high.astype(np.float64)
        self.action_size, self.obs_size = math.prod(box.shape), math.prod(self._env.observation_space.shape)

    def _begin(self, seed: int) -> None:
        self._obs: FloatArray = self._env.reset(seed=seed)[0]

    def _advance(self, control: FloatArray) -> tuple[float, bool, bool]:
        self._obs, reward, terminated, _, _ = self._env.step(control.astype(self._env.action_space.dtype))
        # MuJoCo silently restarts a simulation that blew up; only its counters tell.
        if self._data.warning.number[self._bad].any():
            raise self._blow_up("qpos, qvel or qacc is not finite or too large")
        return float(reward), bool(terminated), self._frame + 1 >= self.episode_frames

    def _observe(self) -> Observation:
        return self._obs.astype(np.float32)

    def _capture(self) -> dict[str, Any]:
        return {"derived": {name: getattr(self._data, name).copy() for name in self._LAGGING}}

    def _recover(self, snapshot: Snapshot) -> None:
        self._set_physics(snapshot)
        for name, array in snapshot.derived.items():
            getattr(self._data, name)[...] = array


_SUITES: dict[str, type[_ControlSuite] | type[_Gymnasium]] = {"dmc": _ControlSuite, "gymnasium": _Gymnasium}


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
    raise EnvError(_unknown(name, " ".join(_TASKS.values()).split()))


def make(suite: str, task: str, action_repeat: int = 1, reward_scale: float = 1.0) -> Env:
    """Make a task of a suite; call `reset` next.

    `action_repeat`: frames per agent step (MAD-TD section 6.2: 2 on DMC; FTFL section 6: 1). `reward_scale`: factor on
    every reward (ours: dose-response of FTFL's first cause, rewards small against states). Raises EnvError for an
    unknown suite or task, with the nearest names, and for values out of range.
    """
    tasks = known_tasks(suite)
    if task not in tasks:
        raise EnvError(_unknown(task, tasks))
    return _SUITES[suite](task, action_repeat, reward_scale)


def _unknown(name: str, tasks: list[str]) -> str:
    by_lower = {task.lower(): task for task in tasks}  # "hopper-v5" finds "Hopper-v5"
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower)]
    return f"unknown task {name!r}: " + (f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(tasks)}")


def _import(module: str) -> Any:
    """Import a simulator without a renderer, unless MUJOCO_GL asks for one, and without glfw's complaint about it."""
    os.environ.setdefault("MUJOCO_GL", "disabled")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*DISPLAY environment variable.*")
        try:
            return importlib.import_module(module)
        except Exception as error:  # what a missing system library raises depends on the renderer
            raise EnvError(
                f"{module} cannot be loaded with MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}. Training needs no"
                " renderer: unset MUJOCO_GL, or install what it asks for (Debian: libosmesa6 libgl1, or libegl1)"
            ) from None
