"""What every task looks like from outside, and what a snapshot of one holds."""

import abc
import difflib
import importlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dynarep.configs import Units

FloatArray = npt.NDArray[np.float64]
Observation = npt.NDArray[np.float32]

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
    the task ended (no bootstrap). `truncated`: the time limit ended the episode (bootstrap). `success`: the task was
    solved after the last of the repeated frames; False where the suite does not say (`Env.reports_success`).
    """

    obs: Observation
    reward: float
    terminated: bool
    truncated: bool
    success: bool = False


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything the next step depends on; opaque outside this module, can be pickled.

    The snapshots of an episode share what is constant in it (`model`, `attributes`): one of dog-stand costs 6 KB.
    """

    task: str
    seed: int
    frame: int
    over: bool
    physics: FloatArray  # MuJoCo's mjSTATE_INTEGRATION: time, positions, velocities, activations, warm start, controls;
    # of a dial task: the state vector
    derived: Mapping[str, FloatArray] = field(default_factory=dict)  # computed arrays that a reward reads before a step
    model: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # model arrays that the task wrote at its reset
    attributes: bytes = b""  # the task's Python attributes, pickled


class Env(abc.ABC):
    """One task: actions in [-1, 1], flat float32 observations, action repeat, the suite's own time limit.

    `obs_size`, `action_size`: lengths of the vectors. `action_repeat`: frames (control steps of the suite) per agent
    step. `episode_frames`: the time limit in frames. `units`: what the task's own units of observation and reward are
    called in what is reported. An episode depends on task and seed only, whatever the object did before. Made by
    `make`. `reports_success`: whether the suite says if a task is solved.
    """

    reports_success: ClassVar[bool] = False

    obs_size: int
    action_size: int
    action_repeat: int
    episode_frames: int
    units: Units
    _low: FloatArray  # bounds of the suite's own actions, shape (action_size,)
    _high: FloatArray
    _success: bool = False  # after the last frame

    def __init__(self, task: str, action_repeat: int, reward_scale: float) -> None:
        if action_repeat < 1 or not math.isfinite(reward_scale):
            given = f"{action_repeat} and {reward_scale}"
            raise EnvError(f"{task}: action_repeat is 1 or more and reward_scale finite, got {given}")
        self.task, self.action_repeat, self._reward_scale = task, action_repeat, reward_scale
        self.units = Units(reward=reward_scale)
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
        return Step(self._observe(), reward * self._reward_scale, terminated, truncated, self._success)

    def snapshot(self) -> Snapshot:
        """Capture, in float64, all that the next step depends on.

        Raises EnvError before the first reset, after an error, and if the task keeps state that cannot be captured.
        """
        if self._refusal not in ("", _OVER):
            raise EnvError(f"{self.task} {self._refusal}")
        return Snapshot(self.task, self._seed, self._frame, bool(self._refusal), self._state(), **self._capture())

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

    def outcomes(self, cases: Sequence[tuple[Snapshot, npt.NDArray[Any]]]) -> list[Step | None]:
        """Return what follows each action at each snapshot, see `restore`; None where the simulation blows up."""
        found: list[Step | None] = []
        for snapshot, action in cases:
            self.restore(snapshot)
            try:
                found.append(self.step(action))
            except EnvError:
                found.append(None)
        return found

    def expert(self) -> Callable[[Observation], FloatArray]:
        """Return the suite's scripted policy of this task, observation -> action in [-1, 1]; one for each episode.

        Raises EnvError where the suite has none.
        """
        raise EnvError(f"{self.task} has no scripted policy, only metaworld's tasks have: take random actions instead")

    def close(self) -> None:
        """Let go of the simulator. The Env cannot be used afterwards."""
        self._refusal = _CLOSED

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
    def _state(self) -> FloatArray:
        """Return the state vector, an array of its own."""

    def _capture(self) -> dict[str, Any]:
        """Return the fields of a Snapshot beside the state vector."""
        return {}

    @abc.abstractmethod
    def _recover(self, snapshot: Snapshot) -> None:
        """Restore the state vector, what `_capture` gave, and what the next frame expects to find computed."""


class MuJoCo(Env):
    """A task that MuJoCo simulates."""

    _model: Any  # mujoco.MjModel
    _data: Any  # mujoco.MjData

    def __init__(self, task: str, action_repeat: int, reward_scale: float) -> None:
        super().__init__(task, action_repeat, reward_scale)
        self._mujoco = load("mujoco")
        self._kind = int(self._mujoco.mjtState.mjSTATE_INTEGRATION)

    def _state(self) -> FloatArray:
        physics = np.empty(self._mujoco.mj_stateSize(self._model, self._kind))
        self._mujoco.mj_getState(self._model, self._data, physics, self._kind)
        return physics

    def _set_physics(self, snapshot: Snapshot) -> None:
        self._mujoco.mj_setState(self._model, self._data, snapshot.physics, self._kind)

    def _blow_up(self, reason: str) -> EnvError:
        # Clears MuJoCo's warning counters too: they are compared from step to step, a second blow-up would be missed.
        self._mujoco.mj_resetData(self._model, self._data)
        self._refusal = _BROKEN
        where = f"{self.task}, seed {self._seed}, frame {self._frame + 1}"
        return EnvError(f"the simulation blew up ({where}): {reason}. Call reset(seed) or restore(snapshot).")


def unknown(what: str, name: str, known: Iterable[str]) -> EnvError:
    """Return the error for a name that does not exist, with the nearest ones that do, or all of them."""
    by_lower = {word.lower(): word for word in known}  # "hopper-v5" finds "Hopper-v5"
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(by_lower.values())}"
    return EnvError(f"unknown {what} {name!r}: {hint}")


def load(module: str) -> Any:
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
